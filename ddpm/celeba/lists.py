r"""Pictures on disk, in any layout people have them in, as one table.

`open_table` reads CelebA (the official text files, Kaggle's csv, torchvision's folder) and any folder of
pictures with a csv into an `ImageTable`. `read_image` turns one of its files into a square of pixels, by
`crop_and_resize`: the one crop of this project, for training data and for statistics alike.

What cannot be used is told in one line: a `DataError` where the data as a whole is wrong, a `BadImage` where
a single picture is."""

import csv
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.refusals import DataError, _few, _head_of, _kind, _short, _wrong
from ddpm.tools.strict_json import parse_json

TRAIN, VALID, TEST = 0, 1, 2


# ---------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True, eq=False)
class ImageTable:
    r"""N pictures and what is known of each. Picture i is the file `root / files[i]`."""

    root: Path  # the folder that `files` are relative to
    files: tuple[str, ...]  # N paths, with / between folders
    attributes: np.ndarray | None  # (N, 40) uint8, columns in the order of ATTRIBUTES, 1 = has it
    captions: tuple[str, ...] | None  # N sentences, where the data has captions instead
    split: np.ndarray  # (N,) uint8: 0 train, 1 valid, 2 test

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, index) -> "ImageTable":
        r"""The rows that `index` picks, in its order: integers, a mask like `split == VALID`, a slice."""
        rows = np.arange(len(self))[index]
        return replace(
            self,
            files=tuple(self.files[i] for i in rows),
            attributes=None if self.attributes is None else self.attributes[rows],
            captions=None if self.captions is None else tuple(self.captions[i] for i in rows),
            split=self.split[rows],
        )


def open_table(path) -> ImageTable:
    r"""Reads a folder of pictures and their annotations.

    Looked for in this order:

    - CelebA: `list_attr_celeba.txt` or `.csv` in the folder, in its `Anno/`, or the same below `celeba/`;
      pictures in `img_align_celeba/` (nested in itself, in `Img/`, as PNG) or beside the list; the split from
      `list_eval_partition.txt` or `.csv`, beside the list or in `Eval/`, if it is there.
    - your own: `captions.csv`, `metadata.csv`, `metadata.jsonl`, or the only csv there. One column of file
      names, and either `caption` (or `text`) or some of the 40 attributes, the others being 0. `split`
      is an optional column. Paths are relative to the folder, or to its `images/`.

    Rows whose picture is not there are left out, so a part of CelebA opens too. Without a split, about
    90 / 5 / 5 % of the pictures are train / valid / test by a hash of each file's name. Where a given split
    has nothing in valid (the first thousands of CelebA are all train), 5 % of its train become valid.

    Args:
        path: the folder.
    Returns:
        The table, in the order of the list, with at least one picture.
    Raises:
        DataError: no such folder, nothing known in it, no pictures, or a list that is damaged.
    """
    folder = _existing_folder(path)
    for home in (folder, folder / "celeba", folder / "CelebA"):
        if file := _find(home, "Anno", "list_attr_celeba"):
            return _open_celeba(home, file)
    return _open_own(folder, _own_list(folder))


IMAGE_FOLDERS = (  # where CelebA's pictures are, seen from the folder with the annotations
    *("img_align_celeba", "img_align_celeba/img_align_celeba", "img_align_celeba_png"),
    *("Img/img_align_celeba", "Img/img_align_celeba/img_align_celeba", "Img/img_align_celeba_png"),
    *("Img", "images", "."),
)


def _open_celeba(home: Path, file: Path) -> ImageTable:
    r"""CelebA: all 40 attributes, and its own split if there is a file for it."""
    sheet = _read_sheet(file)
    columns = _attribute_columns(sheet)
    if missing := [name for name in ATTRIBUTES if name not in columns]:
        raise _wrong(file, "all 40 attributes as columns", f"{len(columns)}, without {_few(missing)}", AGAIN)
    table = _present(sheet, _all_rows(sheet, columns), [home / name for name in IMAGE_FOLDERS])
    partition = _find(home, "Eval", "list_eval_partition") or _find(home, "Anno", "list_eval_partition")
    split = _read_partition(partition, table) if partition else _split_by_name(table.files)
    return replace(table, split=split)


def _open_own(folder: Path, file: Path) -> ImageTable:
    r"""Any pictures with a list: captions, or at least one of the 40 attributes."""
    sheet = _read_sheet(file)
    columns = _attribute_columns(sheet)
    caption = next((sheet.header.index(name) for name in ("caption", "text") if name in sheet.header), None)
    if caption is None and not columns:
        expected = "a column caption or text, or attributes (Male, Smiling, ...)"
        raise _wrong(file, expected, _few(sheet.header) or "none", "name the columns in line 1")
    table = _all_rows(sheet, columns, caption)
    if "split" not in sheet.header:
        table = _present(sheet, table, [folder, folder / "images"])
        return replace(table, split=_split_by_name(table.files))
    table = replace(table, split=_split_column(sheet, sheet.header.index("split")))
    table = _present(sheet, table, [folder, folder / "images"])
    return replace(table, split=_with_valid(table.split, table.files))


# ---------------------------------------------------------------------------------- what is in the folder

AGAIN = "fetch it again"


def _existing_folder(path) -> Path:
    folder = Path(path).expanduser()
    if not folder.exists():
        raise _wrong(folder, "a folder of pictures", "nothing of that name", "check the path")
    if not folder.is_dir():
        kind = _kind(_head_of(folder)) if folder.is_file() else ""
        step = "unpack it and give the folder" if "archive" in kind else f"give its folder, {folder.parent}"
        raise _wrong(folder, "a folder of pictures", kind or "a file", step)
    return folder


def _find(home: Path, subfolder: str, name: str) -> Path | None:
    places = (folder / (name + suffix) for folder in (home, home / subfolder) for suffix in (".txt", ".csv"))
    return next((file for file in places if file.is_file()), None)


def _own_list(folder: Path) -> Path:
    r"""The csv or jsonl that annotates a folder of one's own pictures."""
    names = sorted(_listing(folder, {""}))
    for name in ("captions.csv", "metadata.csv", "metadata.jsonl"):
        if name in names:
            return folder / name
    tables = [name for name in names if name.lower().endswith(".csv") and not name.startswith("list_")]
    if len(tables) == 1:
        return folder / tables[0]
    if tables:
        raise _wrong(folder, "one csv", f"{len(tables)}: {_few(tables)}", "name the right one captions.csv")
    others = [name for name in names if not _is_image_name(name)]
    pictures = len(names) - len(others)
    found = [f"{pictures:,} pictures without annotations"] * (pictures > 0) + [_few(others)] * (others != [])
    step = "put one of these beside the pictures"
    if above := _find(folder.parent, "Anno", "list_attr_celeba"):
        step = f"give the folder with {above.name}, {folder.parent}"
    elif any(name.lower().endswith(ARCHIVES) for name in names):
        step = "unpack the archive first"
    expected = "list_attr_celeba.txt or .csv (CelebA), captions.csv, metadata.csv or .jsonl (your own)"
    raise _wrong(folder, expected, " and ".join(found) or "an empty folder", step)


def _present(sheet: "_Sheet", table: ImageTable, folders: list[Path]) -> ImageTable:
    r"""The rows whose picture is in the first folder that holds any. Lists folders, touches no file."""
    as_png = tuple(os.path.splitext(name)[0] + ".png" for name in table.files)  # CelebA is also given as PNG
    for files in (table.files, as_png):
        for folder in folders:
            there = _listing(folder, {name.rpartition("/")[0] for name in files})
            keep = np.array([name in there for name in files])
            if keep.any():
                return replace(table, root=folder, files=files).subset(keep)
    looked = [folder for folder in folders if folder.is_dir()]
    packed = [name for folder in looked for name in _listing(folder, {""}) if name.lower().endswith(ARCHIVES)]
    expected = f"its {len(table):,} pictures, such as {table.files[0]}"
    step = f"unpack {packed[0]}" if packed else "put the pictures into one of these"
    raise _wrong(sheet.file, expected, f"none of them in {_few(looked)}", step)


def _listing(folder: Path, subfolders: set[str]) -> set[str]:
    names = set()
    for sub in subfolders:
        try:
            names.update(f"{sub}/{name}" if sub else name for name in os.listdir(folder / sub))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            got = _short(str(error))
            raise _wrong(folder / _short(sub), "a folder that can be read", got, "correct it") from error
    return names


# ----------------------------------------------------------------------------- readers: text, rows, columns

MOST_LIST, MOST_ROW = 2**27, 2**20  # bytes of a list (CelebA's has 26 million), characters of a row
VALUES = {"-1": 0, "0": 0, "1": 1, "-1.0": 0, "0.0": 0, "1.0": 1}
VALUES |= {"False": 0, "True": 1, "false": 0, "true": 1, "FALSE": 0, "TRUE": 1}
SPLITS = {"0": TRAIN, "1": VALID, "2": TEST, "0.0": TRAIN, "1.0": VALID, "2.0": TEST}
SPLITS |= {"train": TRAIN, "valid": VALID, "val": VALID, "validation": VALID, "test": TEST}
FILE_COLUMNS = ("file", "file_name", "filename", "image", "image_id", "path")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz")


@dataclass
class _Sheet:
    r"""A list as it stands in its file: plain column names, or [] if it has none, and rows of cells."""

    file: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]  # line number, cells

    def wrong(self, line: int, expected: str, got: str) -> DataError:
        return _wrong(f"{self.file} line {line}", expected, got, "correct the file or fetch it again")


def _read_sheet(file: Path) -> _Sheet:
    r"""Reads a csv, a table split on white space, or a jsonl; checks the count in line 1, if there is one."""
    text = _read_text(file).replace("\r\n", "\n").replace("\r", "\n")
    first, _, rest = text.partition("\n")
    counted = re.fullmatch(r"\s*[0-9]{1,18}\s*", first) is not None
    body = rest if counted else text
    head = body.lstrip().partition("\n")[0]
    plain = not any(mark in head for mark in ",;\t")
    cells_of = _json_cells if file.suffix == ".jsonl" else _plain_cells if plain else _csv_cells
    line, rows = 0, []
    try:
        for line, cells in cells_of(body):
            if any(cells):
                rows.append((line + counted, list(map(sys.intern, cells))))  # 8 million times "-1": keep one
    except (csv.Error, ValueError, TypeError, AttributeError) as error:
        got = f"{_short(str(error))} after line {line + counted}"
        raise _wrong(file, "well-formed rows", got, "correct the file or fetch it again") from error
    header = []
    if rows and not any(map(_is_image_name, rows[0][1])):
        header = [_plain_name(cell) for cell in rows.pop(0)[1]]
    if header and plain and header[0] in PLAIN_ATTRIBUTES:
        header.insert(0, "image_id")  # the official list does not name its first column
    if counted and int(first.strip()) != len(rows):
        expected = f"{int(first.strip()):,} rows by its first line"
        raise _wrong(file, expected, f"{len(rows):,}", f"if the download was cut short, {AGAIN}")
    if not rows:
        raise _wrong(file, "a line of column names and then rows", "no rows", AGAIN)
    return _Sheet(file, header, rows)


def _lines(body: str) -> Iterator[str]:
    for found in re.finditer(r".*\n|.+", body):  # one at a time: a list of them would double the memory
        if found.end() - found.start() > MOST_ROW:
            raise ValueError(f"a line of more than {MOST_ROW:,} characters")
        yield found[0]


def _plain_cells(body: str) -> Iterator[tuple[int, list[str]]]:
    return enumerate(map(str.split, _lines(body)), 1)


def _csv_cells(body: str) -> Iterator[tuple[int, list[str]]]:
    head = body.lstrip().partition("\n")[0]
    mark = max(",;\t", key=head.count)
    length = 0  # of the row so far, which quotes may spread over many lines

    def lines() -> Iterator[str]:
        nonlocal length
        for line in _lines(body):
            length += len(line)
            if length > MOST_ROW:
                raise ValueError(f"a row of more than {MOST_ROW:,} characters")
            yield line

    reader = csv.reader(lines(), delimiter=mark, strict=True, skipinitialspace=True)
    for cells in reader:
        length = 0
        yield reader.line_num, cells


def _json_cells(body: str) -> Iterator[tuple[int, list[str]]]:
    keys = []
    for line, text in enumerate(_lines(body), 1):
        if text.strip():
            item = parse_json(text)
            if not keys:
                keys = list(item)
                yield line, keys
            yield line, [str(item.get(key, "")) for key in keys]


def _read_text(file: Path) -> str:
    r"""The text of a list: UTF-8, UTF-16 with a byte order mark, or latin-1 where the names are ASCII."""
    try:
        size = file.stat().st_size
        if size > MOST_LIST:
            got = f"{size / 2**20:,.0f}"
            raise _wrong(file, f"a list of at most {MOST_LIST // 2**20} MiB", got, "use a part of the data")
        data = file.read_bytes()
    except OSError as error:
        raise _wrong(file, "a list that can be read", _short(str(error)), "correct that") from error
    kind = _kind(data[:512])
    if kind or not data.strip():
        raise _wrong(file, "a list of pictures as text", kind or "an empty file", AGAIN)
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        ascii_names = all(line.split(None, 1)[0].isascii() for line in data.splitlines() if line.strip())
        text = data.decode("latin-1") if file.suffix == ".txt" and ascii_names else "\0"
    if "\0" in text:
        raise _wrong(file, "text in UTF-8", "other bytes", f"save it as UTF-8, or {AGAIN}")
    return text


def _plain_name(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


PLAIN_ATTRIBUTES = {_plain_name(name): name for name in ATTRIBUTES}


def _is_image_name(cell: str) -> bool:
    return cell.rstrip().lower().endswith(IMAGE_SUFFIXES)


def _attribute_columns(sheet: _Sheet) -> dict[str, int]:
    r"""Attribute -> column, matched by name, whatever the order, the case and the underscores."""
    columns = {}
    for column, name in enumerate(sheet.header):
        attribute = PLAIN_ATTRIBUTES.get(name)
        if attribute in columns:
            raise _wrong(sheet.file, f"one column {attribute}", "two", "remove one")
        if attribute:
            columns[attribute] = column
    return columns


def _named_rows(sheet: _Sheet) -> Iterator[tuple[int, str, list[str]]]:
    r"""Line, file name and cells of each row, checked: a cell for each column, each picture once."""
    start = sheet.rows[0][1]
    by_look = [column for column, cell in enumerate(start) if _is_image_name(cell)]  # after pandas' index
    by_name = [column for column, name in enumerate(sheet.header) if name in FILE_COLUMNS]
    if not by_look + by_name:
        got = f"{_few(sheet.header) or 'none'} with {_short(' '.join(start))}"
        raise _wrong(sheet.file, "a column of picture files, such as file_name", got, "correct the file")
    column, width, lines = (by_look + by_name)[0], len(sheet.header or start), {}
    for line, cells in sheet.rows:
        if len(cells) != width:
            raise sheet.wrong(line, f"{width} columns", f"{len(cells)}, {_short(' '.join(cells))}")
        name = cells[column].strip()
        if not _is_image_name(name):
            raise sheet.wrong(line, "the file name of a picture", _short(name))
        if "/" in name or "\\" in name or ":" in name:
            name = _inner_path(sheet, line, name)
        if lines.setdefault(name, line) != line:
            raise sheet.wrong(line, "every picture once", f"{_short(name)} again, after line {lines[name]}")
        yield line, name, cells


def _inner_path(sheet: _Sheet, line: int, name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts:
        raise sheet.wrong(line, "a path inside the folder", _short(name))
    return str(path)


def _all_rows(sheet: _Sheet, columns: dict[str, int], caption: int | None = None) -> ImageTable:
    r"""The table of all rows: captions if there is a column of them, else attributes; all of it in train."""
    files, captions, bits = [], [], bytearray()
    for line, name, cells in _named_rows(sheet):
        files.append(name)
        if caption is not None:
            captions.append(" ".join(cells[caption].split()))
            if not captions[-1]:
                raise sheet.wrong(line, "a caption", f"none for {_short(name)}")
            continue
        values = [VALUES.get(cells[column].strip()) for column in columns.values()]
        if None in values:
            value = cells[list(columns.values())[values.index(None)]]
            raise sheet.wrong(line, "values -1 and 1 (or 0 and 1, or False and True)", _short(value))
        bits += bytes(values)
    split = np.zeros(len(files), np.uint8)
    if caption is not None:
        return ImageTable(sheet.file.parent, tuple(files), None, tuple(captions), split)
    attributes = np.zeros((len(files), len(ATTRIBUTES)), np.uint8)
    places = [ATTRIBUTES.index(name) for name in columns]
    attributes[:, places] = np.frombuffer(bits, np.uint8).reshape(len(files), -1)
    return ImageTable(sheet.file.parent, tuple(files), attributes, None, split)


# ------------------------------------------------------------------------------------------------- splits


def _split_column(sheet: _Sheet, column: int) -> np.ndarray:
    r"""The split of every row, (N,) uint8, from names or numbers."""
    split = [SPLITS.get(cells[column].strip().lower()) for _, cells in sheet.rows]
    if None in split:
        line, cells = sheet.rows[split.index(None)]
        raise sheet.wrong(line, "train, valid or test (or 0, 1 or 2)", _short(cells[column]))
    return np.array(split, np.uint8)


def _read_partition(file: Path, table: ImageTable) -> np.ndarray:
    r"""The split of the table's pictures, (N,) uint8, from the last column of `list_eval_partition`."""
    sheet = _read_sheet(file)
    names = [os.path.splitext(name)[0] for _, name, _ in _named_rows(sheet)]
    split_of = dict(zip(names, _split_column(sheet, -1), strict=True))
    split = [split_of.get(os.path.splitext(name)[0]) for name in table.files]
    if None in split:
        got = f"none for {split.count(None):,}, such as {table.files[split.index(None)]}"
        step = f"{AGAIN}, or remove it to split by file name"
        raise _wrong(file, f"a split for each of {len(table):,} pictures", got, step)
    return _with_valid(np.array(split, np.uint8), table.files)


def _unit_hash(files: Sequence[str]) -> np.ndarray:
    r"""A number in [0, 1) for each name, (N,), that depends on the name alone, on every machine."""
    digests = [hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in files]
    return np.frombuffer(b"".join(digests), ">u8") / 2**64


def _split_by_name(files: Sequence[str]) -> np.ndarray:
    r"""About 90 % train, 5 % valid, 5 % test by a hash of each name: order and other files do not matter.

    Only among a few pictures, where train or valid would be empty, one is moved there.

    >>> np.bincount(_split_by_name([f"{i:06}.jpg" for i in range(2000)]))
    array([1824,   88,   88])
    """
    u = _unit_hash(files)
    split = np.select([u < 0.05, u < 0.10], [VALID, TEST], TRAIN).astype(np.uint8)
    if not (split == TRAIN).any():
        split[u.argmax()] = TRAIN
    if len(files) > 1 and not (split == VALID).any():
        split[u.argmin()] = VALID
    return split


def _with_valid(split: np.ndarray, files: Sequence[str]) -> np.ndarray:
    r"""A given split; where nothing in it is valid, the 5 % of train that `_split_by_name` would take."""
    train = np.flatnonzero(split == TRAIN)
    if (split == VALID).any() or len(train) < 2:
        return split
    u = _unit_hash([files[i] for i in train])
    moved = train[u < 0.05]
    split = split.copy()
    split[moved if 0 < len(moved) < len(train) else train[u.argmin()]] = VALID
    return split
