r"""Parquet files with the pictures in them, as data sets on Hugging Face have them; pyarrow reads them."""

import contextlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.refusals import AGAIN, DataError, first_few, kind_of, quoted
from ddpm.celeba.sheets import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    LABEL,
    MAX_BYTES,
    PLAIN_ATTRIBUTES,
    Sheet,
    plain_name,
)
from ddpm.tools.errors import UserError
from ddpm.tools.strict_json import parse_json

ROWS = 64  # read at a time: a small file may say one long caption in each of its rows
COLUMNS = {*CAPTION_COLUMNS, *PLAIN_ATTRIBUTES, LABEL, "attributes", "split"}
# the types of columns, as pyarrow writes them
PICTURE = re.compile(r"(struct<.*\bbytes: )?(large_)?binary")
ONE_LABEL = re.compile(r"u?int|bool|(large_)?string|dictionary")


def read_parquet(file: Path) -> Sheet:
    r"""The cells of a file beside its pictures, whose rows count from 0; no picture is read.

    The column `path` has the name that each picture had, or "". A list of `attributes` becomes 40 columns.
    """
    sheet = Sheet(file, [], [], is_list=True)
    columns = {}
    found = _columns(file)
    if found.keys() & {*CAPTION_COLUMNS}:
        found.pop("attributes", None)  # which need not be CelebA's
    for name, values in found.items():
        if name == "attributes":
            columns |= _forty_columns(sheet, values)
        else:
            columns[name] = values if name in CAPTION_COLUMNS else _texts(values)
    sheet.header = list(columns)
    sheet.rows = list(enumerate(zip(*columns.values(), strict=True)))
    return sheet


def picture_bytes(file: Path, at_a_time: int) -> Iterator[list[bytes]]:
    r"""The pictures in a file as they are encoded, so many at a time; b"" where a row has none."""
    with _refusing(file):
        parquet = _opened(file)
        column = _picture_column(file, parquet.schema_arrow)
        for batch in parquet.iter_batches(at_a_time, columns=[column]):
            values = batch.column(0).to_pylist()
            yield [(value["bytes"] if isinstance(value, dict) else value) or b"" for value in values]


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # pyarrow on damaged files: ArrowInvalid, OSError, NotImplementedError, ...
        raise DataError(file, "a parquet file that can be read", quoted(error), AGAIN) from error


def _opened(file: Path):
    r"""pyarrow's ParquetFile, which has read the columns' names and nothing else."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        advice = "pip install -e '.[parquet]'"
        raise DataError(file, "the package pyarrow, which reads it", "none", advice) from None
    if not file.is_file():
        raise OSError("no file")
    with open(file, "rb") as start:
        if kind := kind_of(start.read(512)):
            raise DataError(file, "a parquet file", kind, AGAIN)
    return ParquetFile(file)


def _picture_column(file: Path, schema) -> str:
    found = [field.name for field in schema if PICTURE.match(str(field.type))]
    named = [name for name in found if plain_name(name) in FILE_COLUMNS] or found
    if not named:
        got = f"the columns {first_few(schema.names)}"
        advice = "take a copy that has the pictures in it"
        raise DataError(file, "a column with the bytes of pictures", got, advice)
    if len(named) > 1:
        raise DataError(file, "one column of pictures", first_few(named), "call the right one image")
    return named[0]


def _is_useful(field) -> bool:
    name = plain_name(field.name)
    return name in COLUMNS and (name != LABEL or ONE_LABEL.match(str(field.type)) is not None)


def _columns(file: Path) -> dict[str, list]:
    r"""The useful columns by `plain_name`, and `path`, as long as they are small."""
    columns = defaultdict(list)
    with _refusing(file):
        parquet = _opened(file)
        schema = parquet.schema_arrow
        picture = _picture_column(file, schema)
        names = [field.name for field in schema if _is_useful(field)]
        size = 0
        for batch in parquet.iter_batches(ROWS, columns=[*names, f"{picture}.path"]):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if hasattr(column, "dictionary_decode"):  # else each of its texts counts once
                    column = column.dictionary_decode()
                size += column.nbytes
                if size > MAX_BYTES:
                    expected = f"at most {MAX_BYTES // 2**20} MiB beside the pictures"
                    raise DataError(file, expected, "more", "use a part of the data")
                columns[name] += column.to_pylist()
        if not parquet.metadata.num_rows:
            raise DataError(file, "rows with pictures", "none", AGAIN)
    values = columns.pop(picture, [None] * parquet.metadata.num_rows)
    columns = {plain_name(name): column for name, column in columns.items()}
    if LABEL in columns:
        classes = dict(enumerate(_class_names(schema.metadata)))
        columns[LABEL] = [classes.get(value, value) for value in columns[LABEL]]
    return columns | {"path": [(value or {}).get("path") or "" for value in values]}


def _class_names(metadata) -> list[str]:
    r"""The names of the classes in `label`, which Hugging Face's `datasets` writes beside the columns."""
    with contextlib.suppress(TypeError, KeyError, ValueError):
        return parse_json(metadata[b"huggingface"].decode())["info"]["features"][LABEL]["names"]
    return []


def _forty_columns(sheet: Sheet, values: list) -> dict[str, list[str]]:
    for row, value in enumerate(values):
        if not isinstance(value, list) or len(value) != len(ATTRIBUTES):
            raise sheet.refusal(row, "40 attributes in the order of CelebA", quoted(value))
    return dict(zip(PLAIN_ATTRIBUTES, map(_texts, zip(*values, strict=True)), strict=True))


def _texts(values) -> list[str]:
    return ["" if value is None else sys.intern(str(value)) for value in values]
