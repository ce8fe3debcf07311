r"""What an evaluation says and writes: lines on the screen, one JSON, its pictures."""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ddpm.evaluation.choices import setting_of
from ddpm.tools.files import write_atomically
from ddpm.tools.grids import save_png

RESULT = "result.json"
PREVIOUS = "result.previous.json"
UNFINISHED = "result.unfinished.json"  # of an evaluation that failed or was stopped
NAMES = ("pictures", "neighbours", "adherence", "wordings", "latents", "loss", "guidance", "steps")
PICTURES = [f"{name}.png" for name in NAMES]


def summary(part: str, result: dict | list) -> Iterator[str]:
    r"""The main figures of one part in lines."""
    if part == "adherence":
        for name in ("held_out", "unseen", "far"):
            if name in result:
                yield _adherence_line(name.replace("_", "-"), result[name])
    elif part == "wordings":
        yield from _wordings_lines(result)
    elif part == "frechet":
        for name, row in result.items():
            yield (
                f"Frechet distance, n {row['n']}, {name}: {row['distance']:.3g}; "
                f"precision {row['precision']:.2f}, recall {row['recall']:.2f}"
            )
    elif part == "spread":
        within, between = (result[name] / result["held_out"] for name in ("within", "between"))
        yield (
            f"spread, {result['prompts']} prompts, {result['each']} pictures each: those of one prompt are "
            f"{within:.2f} times as far apart as held-out pictures, those of different prompts {between:.2f} times"
        )
    elif part == "neighbours":
        for space, row in result.items():
            yield _neighbours_line(space, row)
    elif part == "vae":
        yield f"VAE, n {result['n']}: {result['psnr']:.2f} dB PSNR, {result['ssim']:.4f} SSIM"
    elif part == "loss":
        yield f"loss ({result['prediction']}), n {result['n']}: {result['mean']:.4f}"
    elif part == "bits":
        yield _bits_line(result)
    elif part in ("guidance", "steps"):
        for point in result:
            figures = [f"{y} {point[y]:.3g}" for y in ("adherence", "frechet") if point.get(y) is not None]
            yield f"{setting_of(point)}, n {point['n']}: {', '.join(figures)}"


def _adherence_line(name: str, sources: dict) -> str:
    generated = sources["generated"]
    real, reconstructed = _number(sources["real"]["mean"]), _number(sources["reconstructed"]["mean"])
    return (
        f"adherence, {name}, {generated['n']} pictures of {generated['prompts']} prompts: {_mean(generated)}; "
        f"real pictures {real:.3f}, through the VAE {reconstructed:.3f}"
    )


def _wordings_lines(result: dict) -> Iterator[str]:
    for kind in ("trained", "kept"):
        row = result[kind]
        yield f"wordings, {kind}, {row['n']} pictures of {row['prompts']} rows: {_mean(row)}"
    free = result["free"]
    rates = {prompt: row["right"] for prompt, row in free["prompts"].items() if row["stated"]}
    least = ", ".join(f"{prompt!r} {rates[prompt]:.0%}" for prompt in sorted(rates, key=rates.get)[:3])
    mean = _number(free["mean"])
    yield f"wordings, free prompts: all that they state in {mean:.1%} of the pictures of a prompt; least: {least}"


def _mean(row: dict) -> str:
    r"""A mean balanced accuracy with its interval."""
    low, high = row["interval"] or (math.nan, math.nan)
    return f"{_number(row['mean']):.3f} ({low:.3f} to {high:.3f}) over {row['counted']} attributes"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _neighbours_line(space: str, row: dict) -> str:
    sources = {"held_out": "held-out ones", "reconstructed": "held-out ones through the VAE"}
    figures = [
        f"{row[f'ratio_to_{source}']:.2f} of the distance of {meaning}, "
        f"{row[f'nearer_than_1_percent_of_{source}']:.1%} nearer than the nearest 1 % of those"
        for source, meaning in sources.items()
    ]
    return f"nearest training picture, {space}: {'; '.join(figures)}"


def _bits_line(result: dict) -> str:
    latent = result["latent"][result["variance"]]
    picture = result["picture"]
    return (
        f"bits/dim, n {result['n']}: latents {latent['total']:.2f} +- {latent['standard_error']:.2f} "
        f"(Sigma {result['variance']}), pictures {picture['total']:.2f} +- {picture['standard_error']:.2f}: "
        f"latent {picture['latent']:.2f}, error {picture['error']:.2f}"
    )


def rounded(value):
    r"""The same with six digits a number; what is not a number becomes null."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_unfinished(out: Path, result: dict) -> Path:
    r"""Keep the parts that an evaluation had measured before it ended, beside an earlier evaluation."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / UNFINISHED, json_of(result))
    return out / UNFINISHED


def json_of(result: dict) -> bytes:
    return (json.dumps(rounded(result), indent=2, allow_nan=False) + "\n").encode()


def write(out: Path, result: dict, pictures: dict[str, Figure | Image.Image]):
    r"""Replace the evaluation in `out` once the new one is on the disk; the old JSON stays as result.previous.json.

    The JSON comes last, so a folder that has it is whole. `pictures` are by name, one of PICTURES.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as folder:
        new = Path(folder)
        for name, picture in pictures.items():
            if isinstance(picture, Figure):
                write_atomically(new / name, partial(picture.savefig, format="png", dpi=110))
            else:
                save_png(new / name, picture, picture.info)
        write_atomically(new / RESULT, json_of(result))
        if (out / RESULT).exists():
            (out / RESULT).replace(out / PREVIOUS)
        if (out / PREVIOUS).exists():  # else a picture of such a name is no evaluation's
            for name in PICTURES:
                (out / name).unlink(missing_ok=True)
        for name in (*pictures, RESULT):
            (new / name).replace(out / name)
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
        if set(json.loads((out / UNFINISHED).read_bytes())) <= set(result):
            (out / UNFINISHED).unlink()
