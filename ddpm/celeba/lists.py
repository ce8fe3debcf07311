r"""Pictures on disk, in any layout people have them in, as one table.

`open_table` reads CelebA (the official text files, Kaggle's csv, torchvision's folder, parquet) and any other folder of
pictures into an `ImageTable`. What cannot be used is refused in one line, by a `DataError`."""

import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.parquet import picture_bytes, read_parquet
from ddpm.celeba.refusals import AGAIN, DataError, first_few, kind_of, quoted
from ddpm.celeba.sheets import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    LABEL,
    PLAIN_ATTRIBUTES,
    Sheet,
    is_image_name,
    plain_name,
    read_sheet,
    read_text,
)
from ddpm.tools.errors import printable

TRAIN, VALID, TEST = 0, 1, 2
UNKNOWN = 255  # the split, while it is not known
FOLDERS = ("img_align_celeba", "img_align_celeba/img_align_celeba", "img_align_celeba_png")
# Where CelebA's pictures are, seen from the folder with the annotations.
IMAGE_FOLDERS = (*FOLDERS, *(f"Img/{name}" for name in FOLDERS), "Img", "images", "")
OWN_LISTS = ("captions.csv", "metadata.csv", "metadata.jsonl", "captions.tsv", "captions.txt")
UNREAD = (".heic", ".heif", ".avif")
ARCHIVES = (".zip", ".7z", ".rar", ".tar", ".gz", ".tgz")
VALUES = {"-1": 0, "0": 0, "1": 1, "-1.0": 0, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
SPLITS = {"train": TRAIN, "valid": VALID, "val": VALID, "validation": VALID, "test": TEST}
NUMBERS = {"0": TRAIN, "1": VALID, "2": TEST, "0.0": TRAIN, "1.0": VALID, "2.0": TEST}
NAMELESS = ("", "images", "img", *FOLDERS)  # folders whose name is no caption
DEPTH = 4  # of the subfolders in which pictures are looked for


@dataclass(frozen=True, eq=False)
class ImageTable:
    r"""N pictures and what is known of each. Picture i is the file `root / files[i]`, or in a parquet file a row."""

    root: Path  # the folder that `files` are relative to
    files: tuple[str, ...]  # N paths, with / between folders; NAME.parquet/17 is row 17 (from 0) of that file
    attributes: np.ndarray | None  # (N, 40) uint8, columns in the order of ATTRIBUTES, 1 = has it
    captions: tuple[tuple[str, ...], ...] | None  # N times one or more wordings, where the data has captions
    split: np.ndarray  # (N,) uint8: 0 train, 1 valid, 2 test

    def __len__(self) -> int:
        return len(self.files)

    def file(self, i: int) -> Path:
        r"""The file that holds picture i."""
        return self.root / (_parquet(self.files[i]) or self.files[i])

    def batches(self, size: int) -> Iterator[list[tuple[int, Path | bytes]]]:
        r"""Every picture's number and the picture as `read_image` takes it, up to `size` at a time.

        A parquet file is read from its start to its end, because its rows cannot be read one by one.
        """
        number_of = {name: i for i, name in enumerate(self.files)}
        plain = [name for name in self.files if not _parquet(name)]
        for start in range(0, len(plain), size):
            yield [(number_of[name], self.root / name) for name in plain[start : start + size]]
        for file in dict.fromkeys(filter(None, map(_parquet, self.files))):
            rows = chain.from_iterable(picture_bytes(self.root / file, size))
            names = ((f"{file}/{row}", picture) for row, picture in enumerate(rows))
            wanted = ((number_of[name], picture) for name, picture in names if name in number_of)
            while batch := list(islice(wanted, size)):
                yield batch

    def take(self, index) -> "ImageTable":
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
    r"""Read a folder of pictures and their annotations.

    These are tried in this order:

    - CelebA: `list_attr_celeba.txt` or `.csv` in the folder, in its `Anno/`, or the same below `celeba/`;
      pictures in `img_align_celeba/` (nested in itself, in `Img/`, as PNG) or beside the list; the split from
      `list_eval_partition.txt` or `.csv`, beside the list or in `Eval/`, if it is there.
    - your own list: one of `OWN_LISTS`, or the only csv or tsv there, in the folder or one each in its `train/`,
      `validation/` and `test/`. One column of file names, and one of captions (`CAPTION_COLUMNS`; in JSON also lists of
      wordings), some of the 40 attributes, the others being 0, or a `label`. Paths are relative to the list's folder,
      or to `images/` in it. Rows of the same picture are its wordings.
    - parquet files with the pictures in them, CelebA's or your own, in the folder or below it; columns as in a list, or
      a list of 40 `attributes`. Each row is a picture.
    - pictures alone, in the folder or below it. Where text files are called as they are, each line of these is a
      wording. Else the caption is the name of the folder that a picture is in, and empty in those of `NAMELESS`.

    A picture that is not where its list says is taken from any subfolder, in another case, Unicode form or image
    format, if exactly one is called so. Rows without a picture are left out, so a part of CelebA opens too. A
    warning counts them, and another the pictures without a row.

    The split is the optional column `split`, or follows from folders, or parquet files, that are called train, valid,
    validation or test. Without either, about 90 / 5 / 5 % of the pictures are train / valid / test by a hash of each
    file's name. Where a given split has nothing in valid (for example, the first thousands of CelebA are all train),
    5 % of its train become valid.

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
    lists = _own_lists(folder)
    table = _open_own(folder, lists) if lists else _open_pictures(folder)
    if table.captions is not None and not any(map(any, table.captions)):
        says = f'the {len(table):,} pictures have no captions; draw with the prompt "", which guidance does not change'
        warnings.warn(f"{folder}: {says}", stacklevel=2)
    return table


def _open_celeba(home: Path, file: Path) -> ImageTable:
    r"""CelebA: all 40 attributes, and its own split if there is a file for it."""
    sheet = read_sheet(file)
    columns = _attribute_columns(sheet)
    if missing := [name for name in ATTRIBUTES if name not in columns]:
        got = f"{len(columns)}, without {first_few(missing)}"
        advice = f"{AGAIN}, or rename it captions.csv to use those that it has" if columns else AGAIN
        raise DataError(file, "all 40 attributes as columns", got, advice)
    table, names = _with_pictures(_every_row(sheet, columns), home, IMAGE_FOLDERS, file)
    partition = _find(home, "Eval", "list_eval_partition") or _find(home, "Anno", "list_eval_partition")
    return replace(table, split=_read_partition(partition, names) if partition else split_by_name(names))


def _open_own(folder: Path, lists: list[Path]) -> ImageTable:
    r"""Pictures with lists of captions, or of at least one of the 40 attributes."""
    tables, names = zip(*map(_own_table, lists), strict=True)
    table = tables[0] if len(lists) == 1 else _joined(folder, tables)
    return _with_split(table, [name for some in names for name in some])


def _own_table(file: Path) -> tuple[ImageTable, list[str]]:
    r"""The pictures of one list, and the names by which they may be split."""
    in_parquet = file.suffix == ".parquet"
    sheet = read_parquet(file) if in_parquet else read_sheet(file)
    columns = _attribute_columns(sheet)
    captions = CAPTION_COLUMNS if columns else (*CAPTION_COLUMNS, LABEL)
    caption = next((sheet.header.index(name) for name in captions if name in sheet.header), None)
    if caption is None and not columns and not in_parquet:
        expected = "a column caption, text, prompt or label, or attributes (Male, Smiling, ...)"
        got = first_few(sheet.header if sheet.is_list else []) or "none"
        raise DataError(file, expected, got, "name the columns in line 1")
    if caption is not None and columns:
        where = file.parent if in_parquet else file.name  # one warning for all files of a folder
        warnings.warn(f"{where}: captions are used, and not {first_few(list(columns))}", stacklevel=4)
    table = _every_row(sheet, columns, caption)
    if not in_parquet:
        return _with_pictures(table, file.parent, ("", "images"), file)
    paths = [cells[-1] for _, cells in sheet.rows]
    return table, paths if all(paths) and len(set(paths)) > 1 else list(table.files)


def _joined(folder: Path, tables: Sequence[ImageTable]) -> ImageTable:
    r"""Several tables as one, whose files are relative to the folder."""
    attributes, captions = None, None
    if all(table.captions is None for table in tables):
        attributes = np.concatenate([table.attributes for table in tables])
    elif all(table.captions is not None for table in tables):
        captions = tuple(chain.from_iterable(table.captions for table in tables))
    else:
        expected = "captions in all lists or attributes in all"
        raise DataError(folder, expected, "both", "give all lists the same columns")
    files = ((table.root.relative_to(folder) / name).as_posix() for table in tables for name in table.files)
    split = np.concatenate([table.split for table in tables])
    return ImageTable(folder, tuple(files), attributes, captions, split)


def _open_pictures(folder: Path) -> ImageTable:
    r"""Pictures without a list, whose captions are in text files beside them or the names of their folders."""
    paths = {path.removeprefix("/") for path in _walk(folder, follow=True)}
    files = tuple(sorted(filter(is_image_name, paths)))
    is_celeba = folder.name.lower() in NAMELESS and _find(folder.parent, "Anno", "list_attr_celeba")
    if others := sorted(path for path in paths if path.lower().endswith(UNREAD)):
        advice = "convert them to JPEG or PNG"
        if not files:
            raise DataError(folder, "pictures as JPEG, PNG, WebP, BMP, GIF or TIFF", others[0], advice)
        says = f"left out {len(others):,} pictures, such as {others[0]}; {advice}"
        warnings.warn(printable(f"{folder}: {says}"), stacklevel=3)
    if not files or is_celeba or _find(folder, "Eval", "list_eval_partition"):
        raise _no_list(folder)
    if missed := sorted(filter(_is_list_name, paths)):
        expected = "the list of the pictures in the folder itself, under its own name"
        advice = "give the folder of the list as --data, or call it list_attr_celeba.csv or captions.csv"
        raise DataError(folder, expected, missed[0], advice)
    if with_text := tuple(name for name in files if f"{_stem(name)}.txt" in paths):
        if without := sorted({*files} - {*with_text}):
            why = f"left out {len(without):,} pictures, such as {without[0]}, because no .txt is called so"
            warnings.warn(printable(f"{folder}: {why}"), stacklevel=3)
        files = with_text
        captions = tuple(_lines_of(folder / f"{_stem(name)}.txt") for name in files)
        if empty := [name for name, lines in zip(files, captions, strict=True) if lines == ("",)]:
            says = f"{len(empty):,} pictures, such as {empty[0]}, have an empty .txt and so an empty caption"
            warnings.warn(printable(f"{folder}: {says}"), stacklevel=3)
    else:
        captions = _folder_names(folder, files)
    table = ImageTable(folder, files, None, captions, np.full(len(files), UNKNOWN, np.uint8))
    return _with_split(table, files)


def _is_list_name(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in OWN_LISTS or name.startswith("list_attr_celeba")


def _lines_of(file: Path) -> tuple[str, ...]:
    lines = (" ".join(line.split()) for line in read_text(file, "a caption", may_be_empty=True).splitlines())
    return tuple(filter(None, lines)) or ("",)


def _folder_names(folder: Path, files: Sequence[str]) -> tuple[tuple[str], ...]:
    r"""The name of the folder that each picture is in, or "" where that is no class."""
    nameless = {*NAMELESS}
    if all(_split_of(name) != UNKNOWN for name in files):
        nameless |= SPLITS.keys()
    captions = [encodable(PurePosixPath(name).parent.name) for name in files]
    captions = ["" if caption.lower() in nameless else caption for caption in captions]
    if classes := sorted({*captions} - {""}):
        rest = f"; {captions.count(''):,} pictures have none" if "" in captions else ""
        says = f"the captions are the names of the folders: {first_few(classes)}{rest}"
        warnings.warn(printable(f"{folder}: {says}"), stacklevel=4)
    return tuple((caption,) for caption in captions)


def _existing_folder(path) -> Path:
    folder = Path(os.path.expanduser(path))  # Path.expanduser fails where no user is called so
    if folder.is_dir():
        return folder
    if not folder.is_file():
        raise DataError(folder, "a folder of pictures", "nothing of that name", "check the path")
    with open(folder, "rb") as file:
        kind = kind_of(file.read(512))
    advice = "unpack it and give the folder" if "archive" in kind else f"give its folder, {folder.parent}"
    raise DataError(folder, "a folder of pictures", kind or "a file", advice)


def _find(home: Path, subfolder: str, name: str) -> Path | None:
    places = (folder / (name + suffix) for folder in (home, home / subfolder) for suffix in (".txt", ".csv"))
    return next(filter(os.path.lexists, places), None)


def _own_lists(folder: Path) -> list[Path]:
    r"""The annotations of a folder of your own pictures: a list, or one for each split, or parquet files."""
    names = sorted(_listing(folder, {""}))
    for name in OWN_LISTS:
        if name in names:
            return [folder / name]
    tables = [name for name in names if name.lower().endswith((".csv", ".tsv"))]
    tables = [name for name in tables if not name.startswith("list_")]
    if len(tables) == 1:
        return [folder / tables[0]]
    if tables:
        got = f"{len(tables)}: {first_few(tables)}"
        raise DataError(folder, "one csv", got, "name the right one captions.csv")
    splits = [folder / sub for sub in names if sub.lower() in SPLITS]
    firsts = ([sub / name for name in OWN_LISTS if (sub / name).is_file()][:1] for sub in splits)
    if lists := list(chain.from_iterable(firsts)):
        return lists
    return [folder / path.removeprefix("/") for path in sorted(_walk(folder)) if path.endswith(".parquet")]


def _no_list(folder: Path) -> DataError:
    names = sorted(_listing(folder, {""}))
    if above := _find(folder.parent, "Anno", "list_attr_celeba"):
        advice = f"give the folder with {above.name}, {folder.parent}"
    elif any(name.lower().endswith(ARCHIVES) for name in names):
        advice = "unpack the archive first"
    else:
        advice = "give the folder that has them"
    expected = (
        "list_attr_celeba.txt or .csv (CelebA), captions.csv, metadata.csv or .jsonl (your own), pictures"
    )
    return DataError(folder, expected, first_few(names) or "an empty folder", advice)


def _with_pictures(
    table: ImageTable, home: Path, folders: Sequence[str], file: Path
) -> tuple[ImageTable, list[str]]:
    r"""The rows whose picture is there, and the names by which they are split; lists folders, touches no picture."""
    subfolders = {name.rpartition("/")[0] for name in table.files}
    paths: dict[str, str] = {}  # from home, with a / before the name; of those that are found
    for folder in folders:
        if missing := [name for name in table.files if name not in paths]:
            there = _listing(home / folder, subfolders)
            paths |= {name: f"{folder}/{name}" for name in missing if name in there}
    if missing := [name for name in table.files if name not in paths]:
        paths |= _paths_alike(missing, home, folders, set(paths.values()))
    if not paths:
        raise _no_pictures(table, [home / folder for folder in folders], file)
    used = {path.rsplit("/", name.count("/") + 1)[0] for name, path in paths.items()}
    root = used.pop() if len(used) == 1 else ""
    kept = table.take([i for i, name in enumerate(table.files) if name in paths])
    found = tuple(paths[name].removeprefix(root).removeprefix("/") for name in kept.files)
    _warn_of_the_rest(home / root, found, [name for name in table.files if name not in paths], file)
    split_by = [_stem(name) + os.path.splitext(path)[1] for name, path in zip(kept.files, found, strict=True)]
    return replace(kept, root=home / root, files=found), split_by


def _paths_alike(names: list[str], home: Path, folders: Sequence[str], taken: set[str]) -> dict[str, str]:
    r"""The one picture with this name, whatever its subfolder, case, Unicode form or format."""
    by_stem = defaultdict(set)
    for top in ("", *(folder for folder in folders if (home / folder).is_symlink())):
        for path in filter(is_image_name, _walk(home, top)):
            if path not in taken:
                by_stem[_stem(_plain(path)).rpartition("/")[2]].add(path)
    found = {}
    for name in names:
        plain = _plain(name)
        tail = f"/{_stem(plain)}"
        there = by_stem[tail.rpartition("/")[2]]
        alike = {path for path in there if _stem(f"/{_plain(path)}").endswith(tail)}
        alike = {path for path in alike if _plain(path).endswith(plain)} or alike
        if len(alike) == 1:
            found[name] = alike.pop()
    times = Counter(found.values())
    return {name: path for name, path in found.items() if times[path] == 1}


def _walk(home: Path, top: str = "", follow: bool = False) -> Iterator[str]:
    r"""Every file below `top` as a path from home with a / before the name, but for hidden ones and those of runs."""
    for folder, below, files in os.walk(home / top, followlinks=follow):
        if {".lock", "config.json"} <= {*files}:  # a run folder: its grids are no pictures to train on
            below.clear()
            continue
        inside = Path(folder).relative_to(home).parts
        below[:] = [name for name in below if len(inside) < DEPTH and not name.startswith(".")]
        yield from (f"{'/'.join(inside)}/{name}" for name in files if not name.startswith("."))


def _plain(path: str) -> str:
    r"""A path without case, in one Unicode form: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _stem(path: str) -> str:
    return os.path.splitext(path)[0] if is_image_name(path) else path


def _warn_of_the_rest(root: Path, files: Sequence[str], missing: list[str], file: Path):
    r"""Warn of rows without a picture, and of pictures without a row in the folders of the others."""
    there = _listing(root, {path.rpartition("/")[0] for path in files}) - set(files)
    unlisted = sorted(path for path in there if is_image_name(path) and "/." not in f"/{path}")
    for where, what, names, why in (
        (file, "rows", missing, "no picture is called so or several are"),
        (root, "pictures", unlisted, f"{file.name} does not name them"),
    ):
        if names:
            left_out = f"left out {len(names):,} {what}, such as {names[0]}, because {why}"
            warnings.warn(printable(f"{where}: {left_out}"), stacklevel=5)


def _no_pictures(table: ImageTable, folders: list[Path], file: Path) -> DataError:
    looked = list(filter(Path.is_dir, folders))
    packed = [name for folder in looked for name in _listing(folder, {""}) if name.lower().endswith(ARCHIVES)]
    expected = f"its {len(table):,} pictures, such as {table.files[0]}"
    advice = f"unpack {packed[0]}" if packed else "put the pictures into one of these"
    return DataError(file, expected, f"none of them in {first_few(looked)}", advice)


def _listing(folder: Path, subfolders: set[str]) -> set[str]:
    r"""What is in these subfolders ("" is the folder itself), as paths relative to the folder."""
    names = set()
    for sub in subfolders:
        try:
            names.update(f"{sub}/{name}" if sub else name for name in os.listdir(folder / sub))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            where = folder / quoted(sub)
            raise DataError(where, "a folder that can be read", quoted(error), "correct it") from error
    return names


def _every_row(sheet: Sheet, columns: dict[str, int], caption: int | None = None) -> ImageTable:
    r"""The table of all pictures: captions if there is a column of them, else attributes, else empty captions."""
    rows_of = defaultdict(list)
    for row, name in enumerate(_picture_names(sheet, once=caption is None)):
        rows_of[name].append(row)
    first = [rows[0] for rows in rows_of.values()]
    split = np.full(len(sheet.rows), UNKNOWN, np.uint8)
    if "split" in sheet.header:
        split = _split_column(sheet, sheet.header.index("split"))
    table = ImageTable(sheet.file.parent, tuple(rows_of), None, None, split[first])
    if caption is not None:
        wordings = [_wordings(sheet, line, cells[caption]) for line, cells in sheet.rows]
        several = ([text for row in rows for text in wordings[row]] for rows in rows_of.values())
        return replace(table, captions=tuple(tuple(dict.fromkeys(texts)) for texts in several))
    if not columns:
        return replace(table, captions=(("",),) * len(table))
    attributes = np.zeros((len(table), len(ATTRIBUTES)), np.uint8)
    expected = "values -1 and 1 (or 0 and 1, or False and True)"
    for name, column in columns.items():
        attributes[:, ATTRIBUTES.index(name)] = _numbers(sheet, column, VALUES, expected)
    return replace(table, attributes=attributes)


def _wordings(sheet: Sheet, line: int, value) -> tuple[str, ...]:
    r"""The caption of a cell, or each of several."""
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            got = "none" if text == "" else f"{type(text).__name__} {quoted(text)}"
            raise sheet.refusal(line, "a caption, or a list of its wordings", got)
    return tuple(" ".join(encodable(text).split()) for text in texts)


def encodable(text: str) -> str:
    r"""The text with a ? for each half of a surrogate pair: JSON may hold one, and so do names that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _attribute_columns(sheet: Sheet) -> dict[str, int]:
    r"""Attribute -> column, matched by name, whatever the order, the case and the underscores."""
    columns = {PLAIN_ATTRIBUTES[name]: i for i, name in enumerate(sheet.header) if name in PLAIN_ATTRIBUTES}
    for name in columns:
        if sheet.header.count(plain_name(name)) > 1:
            raise DataError(sheet.file, f"one column {name}", "two", "remove one")
    return columns


def _picture_names(sheet: Sheet, once: bool = True) -> list[str]:
    r"""The file name in each row, if every row has a cell for each column. `once` refuses a picture twice."""
    if sheet.file.suffix == ".parquet":
        return [f"{sheet.file.name}/{row}" for row, _ in sheet.rows]
    start = sheet.rows[0][1]
    named = [column for column, name in enumerate(sheet.header) if name in FILE_COLUMNS]
    by_look = [column for column, cell in enumerate(start) if is_image_name(cell)]  # after pandas' index
    columns = [column for column in named if column in by_look] + named + by_look
    if not columns:
        raise DataError(
            sheet.file, "a column of picture files, such as file_name", "none", "correct the file"
        )
    column = columns[0]
    width = len(sheet.header or start)
    home = sheet.file.parent
    homes = [f"{folder.as_posix()}/" for folder in (home.absolute(), home.resolve())]
    names = []
    line_of: dict[str, int] = {}
    for line, cells in sheet.rows:
        if len(cells) != width:
            raise sheet.refusal(line, f"{width} columns", f"{len(cells)}, {quoted(' '.join(cells))}")
        name = cells[column]
        if not is_image_name(name) and not (column in named and re.fullmatch(r"[\w-]+", name)):
            raise sheet.refusal(line, "the file name of a picture", quoted(name))
        if "/" in name or "\\" in name or ":" in name:
            inside = name.replace("\\", "/")
            for start_of_path in homes:
                inside = inside.removeprefix(start_of_path)
            path = PurePosixPath(inside)
            if path.is_absolute() or PureWindowsPath(inside).drive or ".." in path.parts:
                raise sheet.refusal(line, "a path inside the folder", quoted(name))
            name = str(path)
        if once and name in line_of:
            raise sheet.refusal(
                line, "every picture once", f"{quoted(name)} again, after line {line_of[name]}"
            )
        line_of[name] = line
        names.append(name)
    return names


def _numbers(sheet: Sheet, column: int, meanings: dict[str, int], expected: str) -> np.ndarray:
    r"""What the cells of a column mean, (N,) uint8."""
    texts = [cells[column] for _, cells in sheet.rows]
    number_of = {text: meanings.get(text.lower()) for text in set(texts)}
    numbers = [number_of[text] for text in texts]
    if None in numbers:
        line, cells = sheet.rows[numbers.index(None)]
        raise sheet.refusal(line, expected, quoted(cells[column]))
    return np.array(numbers, np.uint8)


def _split_column(sheet: Sheet, column: int) -> np.ndarray:
    return _numbers(sheet, column, SPLITS | NUMBERS, "train, valid or test (or 0, 1 or 2)")


def _read_partition(file: Path, names: list[str]) -> np.ndarray:
    r"""The split of these pictures, (N,) uint8, from the last column of `list_eval_partition`."""
    sheet = read_sheet(file)
    listed = map(_stem, _picture_names(sheet))
    split_of = dict(zip(listed, _split_column(sheet, -1), strict=True))
    if missing := [name for name in names if _stem(name) not in split_of]:
        expected = f"a split for each of {len(names):,} pictures"
        advice = f"{AGAIN}, or remove it to split by file name"
        raise DataError(file, expected, f"none for {len(missing):,}, such as {missing[0]}", advice)
    return _with_valid(np.array([split_of[_stem(name)] for name in names], np.uint8), names)


def _with_split(table: ImageTable, names: Sequence[str]) -> ImageTable:
    r"""The split of the list, else of folders and parquet files that are all named after one, else by name."""
    split = table.split
    if (split == UNKNOWN).any():
        split = np.array([_split_of(name) for name in table.files], np.uint8)
    is_known = not (split == UNKNOWN).any()
    if not is_known and (split != UNKNOWN).any():
        outside = table.files[np.flatnonzero(split == UNKNOWN)[0]]
        says = (
            f"the pictures are split by name, because {outside} is in no folder called train, valid or test"
        )
        warnings.warn(printable(f"{table.root}: {says}"), stacklevel=4)
    return replace(table, split=_with_valid(split, names) if is_known else split_by_name(names))


def _split_of(name: str) -> int:
    r"""The split that a folder of a picture, or its parquet file, is named after.

    >>> [_split_of(f"{name}/1") for name in ("validation/cat", "data/test-00000-of-00019.parquet", "train-station")]
    [1, 2, 255]
    """
    for folder in name.lower().split("/")[:-1]:
        word = re.match("[a-z]*", folder)[0] if folder.endswith(".parquet") else folder
        if word in SPLITS:
            return SPLITS[word]
    return UNKNOWN


def _parquet(name: str) -> str:
    r"""The parquet file in which a picture is; "" for a picture that is a file itself."""
    found = re.fullmatch(r"(.+\.parquet)/[0-9]+", name)
    return found[1] if found else ""


def split_by_name(files: Sequence[str]) -> np.ndarray:
    r"""About 90 % train, 5 % valid, 5 % test by a hash of each name: order and other files do not matter.

    Only among a few pictures, where train or valid would be empty, one is moved there.

    >>> np.bincount(split_by_name([f"{i:06}.jpg" for i in range(2000)]))
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
    r"""A given split; where nothing in it is valid, the 5 % of train that `split_by_name` would take."""
    train = np.flatnonzero(split == TRAIN)
    if (split == VALID).any() or len(train) < 2:
        return split
    u = _unit_hash([files[i] for i in train])
    moved = train[u < 0.05]
    split = split.copy()
    split[moved if 0 < len(moved) < len(train) else train[u.argmin()]] = VALID
    return split


def _unit_hash(files: Sequence[str]) -> np.ndarray:
    r"""A number in [0, 1) for each name, (N,), that depends on the name alone, on every machine."""
    digests = [hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in files]
    return np.frombuffer(b"".join(digests), ">u8") / 2**64
