r"""A list of pictures as it stands in its file: csv, jsonl or words split at white space, to rows of cells."""

import csv
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.refusals import AGAIN, DataError, kind_of, quoted
from ddpm.tools.strict_json import parse_json

MAX_BYTES = 2**27  # of a list; CelebA's has 26 million
MAX_ROW = 2**20  # characters
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_id", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt")
LABEL = "label"  # a caption, where there is nothing else
CORRECT = f"correct the file or {AGAIN}"


@dataclass
class Sheet:
    r"""A list in memory. No cell begins or ends with white space."""

    file: Path
    header: list[str]  # column names by `plain_name`, or [] if the list has none
    rows: list[tuple[int, list]]  # line number, cells: texts, or what JSON or parquet has for a caption
    is_list: bool  # whether messages may quote from it: a link may lead to something private that is no list

    def refusal(self, line: int, expected: str, got: str) -> DataError:
        got = got if self.is_list else "something else"
        unit = "row" if self.file.suffix == ".parquet" else "line"
        return DataError(f"{self.file} {unit} {line}", expected, got, CORRECT)


def plain_name(name: str) -> str:
    r"""A column name in lower case, with _ between its words."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


PLAIN_ATTRIBUTES = {plain_name(name): name for name in ATTRIBUTES}


def is_image_name(cell) -> bool:
    return isinstance(cell, str) and cell.rstrip().lower().endswith(IMAGE_SUFFIXES)


def read_sheet(file: Path) -> Sheet:
    r"""Read a list; where its first line is a number, there must be as many rows."""
    text = read_text(file).replace("\r\n", "\n").replace("\r", "\n")
    first, _, rest = text.partition("\n")
    counted = re.fullmatch(r"\s*[0-9]{1,18}\s*", first) is not None
    body = rest if counted else text
    head = body.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    is_json = file.suffix == ".jsonl"
    in_words = delimiter not in head and not is_json
    if in_words:
        numbered_cells = enumerate(map(str.split, _lines(body)), 1)
    elif is_json:
        numbered_cells = _json_cells(body)
    else:
        numbered_cells = _csv_cells(body, delimiter)
    rows = []
    line = 0
    try:
        for line, cells in numbered_cells:
            if any(cells):  # 8 million cells are "-1" or "1": intern keeps one of each
                rows.append((line + counted, cells if is_json else list(map(sys.intern, cells))))
    except (csv.Error, ValueError) as error:
        got = f"{quoted(error)} after line {line + counted}"
        raise DataError(file, "well-formed rows", got, CORRECT) from error
    header = []
    if rows and not any(map(is_image_name, rows[0][1])):
        header = [plain_name(cell) for cell in rows.pop(0)[1]]
    if not rows:
        raise DataError(file, "a line of column names and then rows", "no rows", AGAIN)
    if in_words and header and header[0] in PLAIN_ATTRIBUTES:
        header.insert(0, "image_id")  # the official list does not name its first column
    names = set(header)
    is_table = not in_words and names & set(FILE_COLUMNS) and names & {*CAPTION_COLUMNS, *PLAIN_ATTRIBUTES}
    is_list = any(map(is_image_name, rows[0][1])) or PLAIN_ATTRIBUTES.keys() <= names or bool(is_table)
    if counted and int(first.strip()) != len(rows):  # strip takes more kinds of space than int does
        expected = (
            f"{int(first.strip()):,} rows by its first line" if is_list else "as many rows as line 1 says"
        )
        advice = f"if the download was cut short, {AGAIN}, else correct the first line"
        raise DataError(file, expected, f"{len(rows):,}", advice)
    return Sheet(file, header, rows, is_list)


def _lines(body: str) -> Iterator[str]:
    for found in re.finditer(r".*\n|.+", body):  # one at a time: a list of them would double the memory
        if found.end() - found.start() > MAX_ROW:
            raise ValueError(f"a line of more than {MAX_ROW:,} characters")
        yield found[0]


def _csv_cells(body: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    length = 0  # of the row so far, which quotes may spread over many lines

    def lines() -> Iterator[str]:
        nonlocal length
        for line in _lines(body):
            length += len(line)
            if length > MAX_ROW:
                raise ValueError(f"a row of more than {MAX_ROW:,} characters")
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True, skipinitialspace=True)
    for cells in reader:
        length = 0
        yield reader.line_num, [cell.strip() for cell in cells]


def _json_cells(body: str) -> Iterator[tuple[int, list]]:
    keys = []
    for line, text in enumerate(_lines(body), 1):
        if text.strip():
            try:
                item = parse_json(text)
            except ValueError:  # whose message may quote
                item = None
            if not isinstance(item, dict):
                raise ValueError("no JSON object with every name once and finite numbers")
            if not keys:
                keys = list(item)
                yield line, keys
            yield line, [_json_cell(key, item.get(key)) for key in keys]


def _json_cell(key: str, value):
    r"""A caption as it is, everything else as text."""
    if value is None or plain_name(key) in CAPTION_COLUMNS:
        return value or ""
    return str(value).strip()


def read_text(file: Path, what: str = "a list", may_be_empty: bool = False) -> str:
    r"""The text of a file: UTF-8, UTF-16 with a byte order mark, or latin-1 where a list's names are ASCII."""
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            expected = f"{what} of at most {MAX_BYTES // 2**20} MiB"
            raise DataError(file, expected, f"{size / 2**20:,.0f}", "use a part of the data")
        if not file.is_file():  # a pipe would be waited for, and a device has no end
            raise OSError("no file")
        data = file.read_bytes()
    except OSError as error:
        raise DataError(file, f"{what} that can be read", quoted(error), "correct that") from error
    kind = kind_of(data[:512])
    if kind or not (data.strip() or may_be_empty):
        raise DataError(file, f"{what} as text", kind or "an empty file", AGAIN if kind else CORRECT)
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        ascii_names = all(line.split(None, 1)[0].isascii() for line in data.splitlines() if line.strip())
        text = data.decode("latin-1") if file.suffix == ".txt" and ascii_names else None
    if text is None or "\0" in text:
        raise DataError(file, "text in UTF-8", "other bytes", f"save it as UTF-8, or {AGAIN}")
    return text
