r"""JSON files that may be a stranger's."""

import json
import math
from pathlib import Path

MOST_JSON = 2**20  # bytes of a file of settings


def read_json(path: Path, constants: bool = False):
    r"""The content of a small JSON file, by `parse_json`; raises OSError or ValueError."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        data = file.read(MOST_JSON + 1)
    if len(data) > MOST_JSON:
        raise ValueError(f"it has more than {MOST_JSON:,} bytes")
    return parse_json(data.decode("utf-8-sig"), constants)


def parse_json(text: str, constants: bool = False):
    r"""JSON without what Python lets pass.

    ValueError for a name given twice, NaN, infinities and 1e999, whole numbers beyond 64 bits, and brackets nested too
    deep.

    Args: constants: let NaN, Infinity and -Infinity pass, which diffusers writes.
    """

    def once(pairs: list) -> dict:
        values = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"{name!r} is given twice")
            values[name] = value
        return values

    def whole(digits: str) -> int:
        if len(digits) > 20 or not fits_in_64_bits(int(digits)):
            raise ValueError(f"{digits[:25]} is beyond 64 bits")
        return int(digits)

    def finite(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise ValueError(f"{digits[:25]} is not finite")
        return float(digits)

    hooks = {"object_pairs_hook": once, "parse_int": whole, "parse_float": finite}
    try:
        return json.loads(text, **hooks, parse_constant=float if constants else finite)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def fits_in_64_bits(value: int) -> bool:
    return -(2**63) <= value < 2**63
