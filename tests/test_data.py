r"""Every layout that people have CelebA in gives the same table; every broken one gives one clear line."""

import csv
import io
import json
import os
import re
import struct
import unicodedata
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.dataset import open_data, photographs
from ddpm.celeba.download import download_celeba
from ddpm.celeba.images import BadImage, crop_and_resize, read_image
from ddpm.celeba.lists import TEST, TRAIN, VALID, open_table, split_by_name
from ddpm.celeba.refusals import DataError
from ddpm.config import Config

N = 12
FILES = tuple(f"{i:06}.jpg" for i in range(1, N + 1))
LABELS = np.random.default_rng(0).integers(0, 2, (N, 40)).astype(np.uint8)
SPLIT = np.array([0] * 7 + [1] * 3 + [2] * 2, np.uint8)
ATTR, PART = "list_attr_celeba.txt", "list_eval_partition.txt"


def picture(width=178, height=218, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def put_pictures(folder, files=FILES):
    for i, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=i).save(folder / name)


def put(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def official(count=True, end="\r\n", names=ATTRIBUTES):
    lines = [str(N)] * count + [" ".join(names) + " "]
    lines += [
        name + "".join("  1" if v else " -1" for v in row) for name, row in zip(FILES, LABELS, strict=True)
    ]
    return end.join(lines) + end


def partition(parts=SPLIT):
    return "".join(f"{name} {part}\r\n" for name, part in zip(FILES, parts, strict=True))


def rows_csv(header, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def kaggle(header=("image_id",), index=False, write=lambda value: 2 * int(value) - 1, names=ATTRIBUTES):
    columns = [ATTRIBUTES.index(name) for name in names]
    rows = [[*([i] * index), FILES[i], *map(write, LABELS[i, columns])] for i in range(N)]
    return rows_csv([*header, *names], rows)


def make_celeba(root, pictures="img_align_celeba", files=FILES, **lists):
    put_pictures(root / pictures, files)
    for name, text in (lists or {ATTR: official(), PART: partition()}).items():
        put(root / name, text)


def message_of(action, *arguments):
    with pytest.raises(DataError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert re.fullmatch(r".*expected .+, got .+; .+", message) and len(message) < 700  # one line
    return message


def says(message, parts):
    r"""Whether the message holds these parts, which stand between dots, in their order."""
    return re.search(".*".join(map(re.escape, parts.split(" ... "))), message)


TXT = {ATTR: official(), PART: partition()}
CSV = {
    "list_attr_celeba.csv": kaggle(),
    "list_eval_partition.csv": rows_csv(["image_id", "partition"], zip(FILES, SPLIT, strict=True)),
}
PANDAS = rows_csv(["", "image_id", "partition"], zip(range(N), FILES, SPLIT, strict=True))
KAGGLE = "img_align_celeba/img_align_celeba"


def txt(text, encoding="utf-8"):
    return "img_align_celeba", TXT | {ATTR: text.encode(encoding)}


def kaggles(text, pictures=KAGGLE):
    return pictures, CSV | {"list_attr_celeba.csv": text}


def below(folder, names=TXT):
    return {f"{folder}/{name}": text for name, text in names.items()}


DRIVE = {f"Anno/{ATTR}": official(), f"Eval/{PART}": partition()}
LAYOUTS = {  # where the pictures are, and the lists
    "official": ("img_align_celeba", TXT),
    "nested": (KAGGLE, TXT),
    "beside the list": (".", TXT),
    "drive": ("Img/img_align_celeba", DRIVE),
    "torchvision root": ("celeba/img_align_celeba", below("celeba")),
    "torchvision, drive": ("CelebA/Img/img_align_celeba", below("CelebA", DRIVE)),
    "png": ("img_align_celeba_png", TXT),
    "JPG": ("img_align_celeba", TXT),
    "ids without suffix": txt(official().replace(".jpg", "")),
    "kaggle, ids without suffix": kaggles(kaggle().replace(".jpg", "")),
    "LF": txt(official(end="\n")),
    "no count line": txt(official(count=False)),
    "LF, no count line": txt(official(count=False, end="\n")),
    "no final line end": txt(official().rstrip()),
    "blank lines": txt(official(end="\r\n\r\n")),
    "names with an id column": txt(official(names=("image_id", *ATTRIBUTES))),
    "byte order mark": txt(official(), "utf-8-sig"),
    "UTF-16": txt(official(), "utf-16"),
    "latin-1 spaces": txt(official().replace("Young ", "Young\xa0"), "latin-1"),
    "kaggle": kaggles(kaggle()),
    "kaggle, UTF-16": kaggles(kaggle().encode("utf-16")),
    "kaggle, semicolons": kaggles(kaggle().replace(",", ";")),
    "kaggle, flat": kaggles(kaggle(), "img_align_celeba"),
    "pandas, empty header": kaggles(kaggle(("",))),
    "pandas, Unnamed: 0": kaggles(kaggle(("Unnamed: 0",))),
    "pandas, index": (
        KAGGLE,
        {"list_attr_celeba.csv": kaggle(("", "image_id"), index=True), "list_eval_partition.csv": PANDAS},
    ),
    "0 and 1": kaggles(kaggle(write=int)),
    "False and True": kaggles(kaggle(write=bool)),
    "-1.0 and 1.0": kaggles(kaggle(write=lambda value: 2.0 * value - 1)),
    "other column order": kaggles(kaggle(names=ATTRIBUTES[::-1])),
    "other spelling": kaggles(re.sub("^.*", lambda m: m[0].upper().replace("_", " "), kaggle(), count=1)),
    "txt partition of a csv": (KAGGLE, {"list_attr_celeba.csv": kaggle(), PART: partition()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_celeba_gives_the_same_table(tmp_path, layout):
    pictures, lists = LAYOUTS[layout]
    files = [name.replace("jpg", layout) for name in FILES] if layout in ("png", "JPG") else FILES
    make_celeba(tmp_path, pictures, files, **lists)
    table = open_table(str(tmp_path))
    assert table.files == tuple(files)
    np.testing.assert_array_equal(table.attributes, LABELS)
    np.testing.assert_array_equal(table.split, SPLIT)
    assert table.captions is None and table.attributes.dtype == table.split.dtype == np.uint8
    assert read_image(table.root / table.files[-1]).shape == (64, 64, 3)


def test_the_table_keeps_the_rows_whose_picture_is_there_and_looks_at_no_picture(tmp_path, monkeypatch):
    make_celeba(tmp_path)
    for name in FILES[::2]:
        os.remove(tmp_path / "img_align_celeba" / name)
    seen = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *a, **b: seen.append(str(path)) or stat(path, *a, **b))
    with pytest.warns(UserWarning, match=f"{ATTR}: left out 6 rows, such as 000001.jpg, because"):
        table = open_table(tmp_path)
    assert not [path for path in seen if path.endswith(".jpg")]
    assert table.files == FILES[1::2]
    np.testing.assert_array_equal(table.attributes, LABELS[1::2])
    np.testing.assert_array_equal(table.split, SPLIT[1::2])


def test_a_list_without_a_count_that_is_cut_short_opens_and_a_warning_counts_its_pictures(tmp_path):
    lines = kaggle().splitlines(keepends=True)
    make_celeba(tmp_path, **CSV | {"list_attr_celeba.csv": "".join(lines[:6])})
    with pytest.warns(
        UserWarning, match="left out 7 pictures, such as 000006.jpg, because list_attr_celeba.csv"
    ):
        assert open_table(tmp_path).files == FILES[:5]


TWO_FORMS = [unicodedata.normalize(form, "\u00e4.jpg") for form in ("NFC", "NFD")]


@pytest.mark.parametrize(
    "row, pictures, found",
    [
        ("a.jpg", ["a.JPG"], "a.JPG"),
        ("a", ["a.jpg"], "a.jpg"),
        ("a.jpg", ["a.png"], "a.png"),
        ("a.jpg", ["images/a.jpg"], "images/a.jpg"),
        ("a.jpg", ["train/0/A.jpeg"], "train/0/A.jpeg"),
        ("a.jpg", ["a.png", "x/A.JPG"], "x/A.JPG"),
        ("x/a.jpg", ["images/X/a.jpg", "y/a.jpg"], "images/X/a.jpg"),
        (*TWO_FORMS[:1], TWO_FORMS[1:], TWO_FORMS[1]),
        ("a.jpg", ["x/a.jpg", "y/a.jpg"], None),
        ("a.jpg", ["a.png", "a.webp"], None),
        ("a.jpg", [".trash/a.jpg"], None),
        ("a.jpg", ["ba.jpg"], None),
        ("B.jpg", [], None),  # b.jpg has its own row
        ("c.jpg\nC.JPG", ["c.png"], None),
    ],
)
def test_a_picture_that_is_called_otherwise_is_found_if_it_is_the_only_one(tmp_path, row, pictures, found):
    put_pictures(tmp_path, ["b.jpg", *pictures])
    rows = "".join(f"{name},a man\n" for name in ("b.jpg", *row.split("\n")))
    put(tmp_path / "captions.csv", f"file,caption\n{rows}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_table(tmp_path).files == ("b.jpg", found)[: 2 if found else 1]
    told = [str(warning.message) for warning in caught if " rows, such as " in str(warning.message)]
    name = row.partition("\n")[0]
    assert len(told) == (found is None) and all(f"such as {name}, because no" in text for text in told)


def test_rows_are_taken_by_masks_integers_and_slices(tmp_path):
    make_celeba(tmp_path)
    table = open_table(tmp_path)
    valid = table.take(table.split == VALID)
    assert len(valid) == 3 and valid.files == FILES[7:10] and valid.root == table.root
    np.testing.assert_array_equal(table.take([4, 2]).attributes, LABELS[[4, 2]])
    assert table.take(slice(None, None, 5)).files == FILES[::5]
    assert len(table.take([])) == 0


@pytest.mark.filterwarnings("ignore:.*gone.png")
@pytest.mark.parametrize("list_name", ["captions.csv", "metadata.csv", "faces.csv"])
@pytest.mark.parametrize("folder", [".", "images"])
def test_a_folder_with_a_csv_of_captions_opens(tmp_path, list_name, folder):
    put_pictures(tmp_path / folder, ["b.png", "deep/ä.jpg"])
    text = 'file_name,text\nb.png,"a man,\n  smiling"\n./deep\\ä.jpg,die Frau\ngone.png,nobody\n'
    put(tmp_path / list_name, text)
    table = open_table(tmp_path)
    assert table.files == ("b.png", "deep/ä.jpg") and table.captions == (("a man, smiling",), ("die Frau",))
    assert table.attributes is None and table.root == tmp_path / folder
    assert sorted(table.split) == [TRAIN, VALID]
    assert table.take([1]).captions == (("die Frau",),)


@pytest.mark.parametrize("column", ["file", "FileName", "image", "image id", "Path", "whatever", ""])
def test_the_column_of_files_is_found_by_its_name_and_else_by_its_look(tmp_path, column):
    put_pictures(tmp_path, ["a.png", "b.png"])
    first = (
        0 if column in ("whatever", "") else "thumb.png"
    )  # what looks like names beats nothing that is called so
    put(tmp_path / "captions.csv", f"first,{column},caption\n{first},a.png,one\n{first},b.png,two\n")
    table = open_table(tmp_path)
    assert table.files == ("a.png", "b.png") and table.captions == (("one",), ("two",))


def test_a_list_in_json_is_several_wordings_which_are_used_in_turns(tmp_path):
    put_pictures(tmp_path, ["a.png", "b.png"])
    rows = [{"file_name": "a.png", "text": ["one", " another\none"]}]  # as Hugging Face's folders have it
    rows += [{"file_name": "b.png", "text": "two", "more": None}]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    table = open_table(tmp_path)
    assert table.captions == (("one", "another one"), ("two",))
    pictures = photographs(tmp_path / "cache", replace(table, split=np.zeros(2, np.uint8)), size=16)
    assert [pictures.caption(0, 0, variant) for variant in range(3)] == ["one", "another one", "one"]
    assert pictures.full_caption(0) == "one" and pictures.caption(1, 0, 1) == "two"
    with pytest.warns(UserWarning, match="1 of up to 2 wordings .* --caption-variants 2"):
        open_data(Config.from_preset("celeba64", data=str(tmp_path)))


def test_a_part_of_the_training_pictures_is_drawn_by_the_seed_and_the_others_stay(tmp_path, capsys):
    put_pictures(tmp_path, [f"{i:03}.png" for i in range(60)])
    settings = {"data": str(tmp_path), "max_pictures": 12}
    whole = open_data(Config.from_preset("celeba64", data=str(tmp_path)))
    part, again, other = (open_data(Config.from_preset("celeba64", **settings, seed=s)) for s in (0, 0, 1))
    assert f"trains on 12 of {(whole.split == TRAIN).sum()} pictures" in capsys.readouterr().out
    names = [set(np.array(table.files)[table.split == TRAIN]) for table in (part, other)]
    assert len(names[0]) == len(names[1]) == 12 and names[0] != names[1]
    assert part.files == again.files == tuple(sorted(part.files))  # the order stays
    for split in (VALID, TEST):
        assert (part.split == split).sum() == (whole.split == split).sum()
    assert set(part.files) < set(whole.files)


def test_attributes_beside_captions_are_not_used_and_a_warning_says_so(tmp_path):
    put_pictures(tmp_path, ["a.png", "b.png"])
    put(tmp_path / "captions.csv", "file,Male,Smiling,caption\na.png,1,1,one\nb.png,1,1,two\n")
    with pytest.warns(UserWarning, match="captions.csv: captions are used, and not Male, Smiling"):
        assert open_table(tmp_path).attributes is None


def test_own_attributes_may_be_a_part_of_the_forty_and_bring_their_split(tmp_path):
    put_pictures(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    rows = [["a.png", 1, 0, "train"], ["b.png", 0, 1, "Val"], ["c.png", 1, 1, "test"], ["d.png", -1, -1, 0]]
    put(tmp_path / "mine.csv", rows_csv(["image", "smiling", "5 o Clock Shadow", "split"], rows))
    table = open_table(tmp_path)
    assert list(table.attributes[:, ATTRIBUTES.index("Smiling")]) == [1, 0, 1, 0]
    assert list(table.attributes[:, 0]) == [0, 1, 1, 0]
    assert table.attributes.sum() == 4 and list(table.split) == [TRAIN, VALID, TEST, TRAIN]


def test_without_a_partition_the_split_depends_on_each_name_alone():
    files = [f"{i:06}.jpg" for i in range(5000)]
    split = split_by_name(files)
    np.testing.assert_allclose(np.bincount(split) / len(files), [0.90, 0.05, 0.05], atol=0.01)
    np.testing.assert_array_equal(split_by_name(files[::-1]), split[::-1])
    np.testing.assert_array_equal(split_by_name(files[1000:]), split[1000:])


@pytest.mark.parametrize("count", range(1, 30))
def test_a_few_pictures_still_have_some_to_train_on_and_some_to_validate(count):
    for start in range(100):
        split = split_by_name([f"{i}.png" for i in range(start, start + count)])
        assert (split == TRAIN).any()
        assert (split == VALID).any() == (count > 1)


@pytest.mark.parametrize("parts", [[0] * 12, [0] * 2 + [2] * 10, [0] + [2] * 11, [2] * 12])
def test_a_partition_without_valid_gives_up_some_of_its_train_and_none_of_its_test(tmp_path, parts):
    make_celeba(tmp_path, **{ATTR: official(), PART: partition(parts)})
    split = open_table(tmp_path).split
    np.testing.assert_array_equal(split == TEST, np.array(parts) == TEST)
    assert (split == VALID).any() == (parts.count(0) > 1)
    assert (split == TRAIN).any() == (0 in parts)


HTML = b"\n<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
ZIP = b"PK\x03\x04" + bytes(range(256))
LFS = b"version https://git-lfs.github.com/spec/v1\noid"
GARBAGE = bytes(np.random.default_rng(1).integers(0, 256, 5000, np.uint8))


def line(number, change):
    r"""The official list with one line changed."""
    lines = official().split("\r\n")
    lines[number - 1] = change(lines[number - 1])
    return "\r\n".join(lines)


BROKEN = {  # file -> its content -> what the message holds; ... stands for anything
    ATTR: {
        HTML: "expected a list ... got an HTML page ... fetch it again",
        b"\xef\xbb\xbf<html>": "got an HTML page",
        ZIP: "expected a list ... got a zip archive",
        LFS: "got a Git LFS pointer",
        b"": "got an empty file",
        b" \r\n ": "got an empty file",
        GARBAGE: "expected text in UTF-8 ... got other bytes",
        b"12\r\nMale \0 Young": "expected text in UTF-8",
        official().encode("utf-16")[:1001]: "expected text in UTF-8",
        official()[:1500]: "expected 12 rows ... got 8 ... fetch it again",
        " ".join(ATTRIBUTES): "expected a line of column names and then rows, got no rows",
        "0\r\n": "got no rows",
        line(1, lambda row: "202599"): "expected 202,599 rows ... got 12",
        line(1, lambda row: "11"): "expected 11 rows ... got 12",
        line(2, lambda row: ""): "expected all 40 attributes ... got 0",
        line(2, lambda row: row.replace("_", "-of-")): "expected all 40 attributes ... captions.csv",
        line(2, lambda row: row.replace("Young", "")): "expected all 40 ... got 39, without Young",
        line(2, lambda row: row.replace("Young", "Male")): "expected one column Male, got two",
        line(5, lambda row: row[:-3]): "line 5: expected 41 columns, got 40, '000003.jpg",
        line(5, lambda row: row + " 1"): "line 5: expected 41 columns, got 42",
        line(6, lambda row: row[:-3] + " x"): "line 6: expected values -1 and 1 ... got 'x'",
        line(6, lambda row: row[:-3] + " 7"): "line 6 ... got '7'",
        line(6, lambda row: row[:-3] + " nan"): "line 6 ... got 'nan'",
        line(6, lambda row: row[:-3] + " " + "y" * 10**5): "line 6 ... got 'yyyy",
        line(7, lambda row: row.replace("05", "02")): "line 7 ... '000002.jpg' again, after line 4",
        line(7, lambda row: row.replace(".jpg", ".txt")): "line 7: expected the file name ... '000005.txt'",
        line(7, lambda row: "../" + row): "line 7: expected a path inside the folder, got '../000005.jpg'",
    },
    PART: {
        HTML: "got an HTML page",
        partition()[:42]: "expected a split for each of 12 ... got none for 9 ... 000004.jpg",
        partition().replace("06.jpg 0", "06.jpg 3"): "line 6: expected train, valid or test ... got '3'",
        partition().replace("06.jpg 0", "06.jpg"): "line 6: expected 2 columns, got 1",
        "nothing of the kind\r\nat all or so\r\n": "a column of picture files ... got none",
    },
    "list_attr_celeba.csv": {
        kaggle(names=ATTRIBUTES[:-6]): "got 34, without Wearing_Earrings, Wearing_Hat, ... and 2 more",
        kaggle()[:-30]: "line 13: expected 41 columns, got",
    },
    "captions.csv": {  # beside a.png and b.png
        "a.png,a man\nb.png,a woman\n": "expected a column caption ... name the columns",
        "file,colour\na.png,red\n": "expected a column caption ... got file, colour",
        "id,caption\n1,a man\n": "expected a column of picture files ... got none",
        "file,caption\na.png,a man\nb.png, \n": "line 3: expected a caption, ... got none",
        'file,caption\na.png,"a man\nb.png,a woman\n': "expected well-formed rows ... end of data",
        "file,caption\na.png,a man, old\n": "line 2: expected 2 columns, got 3",
        "file,caption\n../a.png,x\n": "line 2: expected a path inside the folder, got '../a.png'",
        "file,caption\nx\\..\\..\\a.png,x\n": "line 2: expected a path inside the folder",
        "file,caption\n/etc/a.png,x\n": "line 2: expected a path inside the folder, got '/etc/a.png'",
        "file,caption\nC:\\a.png,x\n": "line 2: expected a path inside the folder",
        "file,Male\na.png,1\n./a.png,0\n": "line 3: expected every picture once ... after line 2",
        "file,caption,split\na.png,x,dev\n": "line 2: expected train, valid or test ... got 'dev'",
        "file,caption\nA1.png,x\nA2.png,x\n": "its 2 pictures, such as A1.png, got none of them",
        "file,caption\na.png,käse\n".encode("latin-1"): "expected text in UTF-8",
        "file,Male\na.png,maybe\n": "line 2: expected values -1 and 1 ... got 'maybe'",
    },
    "metadata.jsonl": {
        '{"file_name": "a.png"': "expected well-formed rows",
        '["a.png"]': "expected well-formed rows ... no JSON object",
        "3": "no rows",
    },
}


NO_CAPTIONS = {
    "null": "none",
    '""': "none",
    "[]": "none",
    "[null]": "NoneType",
    '["y", 3]': "int",
    "{}": "none",
}
NO_CAPTIONS |= {"1.5": "float '1.5'", '{"en": "y"}': "dict", "true": "bool"}
for value, got in NO_CAPTIONS.items():
    rows = f'{{"file_name": "a.png", "text": "x"}}\n{{"file_name": "b.png", "text": {value}}}'
    BROKEN["metadata.jsonl"][rows] = f"line 2: expected a caption, or a list of its wordings, got {got}"


@pytest.mark.parametrize("name, case", [(name, i) for name in BROKEN for i in range(len(BROKEN[name]))])
def test_a_broken_list_is_named_in_one_line(tmp_path, name, case):
    content, parts = list(BROKEN[name].items())[case]
    if name.startswith("list"):
        make_celeba(tmp_path, **(CSV if name.endswith("csv") else TXT) | {name: content})
    else:
        put_pictures(tmp_path, ["a.png", "b.png"])
        put(tmp_path / name, content)
    message = message_of(open_table, tmp_path)
    assert says(message, f"{name} ... {parts}"), message


FOLDERS = {  # what is in the folder `data` -> the folder that is opened -> what the message holds
    (): {"nowhere": "got nothing of that name; check the path", "data": "got an empty folder"},
    ("data/celeba.zip", "data/img.zip"): {
        "data/celeba.zip": "got a zip archive; unpack it",
        "data/img.zip": "got an HTML page",
        "data": "unpack the archive",
    },
    ("data/a.png", f"data/{PART}"): {"data": f"list_attr_celeba.txt ... got a.png, {PART}"},
    ("data/notes.md",): {"data": "list_attr_celeba.txt ... got notes.md"},
    ("data/a.csv", "data/b.csv"): {"data": "expected one csv, got 2: a.csv, b.csv"},
    (f"data/{ATTR}", "data/img_align_celeba/one.jpg"): {
        f"data/{ATTR}": "got a file; give its folder, ... data",
        "data/img_align_celeba": f"give the folder with {ATTR}, ... data",
        "data": "expected its 12 pictures, such as 000001.jpg, got none of them in ... img_align_celeba, ",
    },
    (f"data/{ATTR}", "data/img_align_celeba.zip"): {"data": "unpack img_align_celeba.zip"},
}


@pytest.mark.parametrize(
    "files, path, parts",
    [(files, path, parts) for files, paths in FOLDERS.items() for path, parts in paths.items()],
)
def test_a_folder_that_is_no_data_says_what_is_in_it(tmp_path, files, path, parts):
    (tmp_path / "data").mkdir()
    for file in files:
        put(tmp_path / file, official() if file.endswith(ATTR) else HTML if file == "data/img.zip" else ZIP)
    message = message_of(open_table, tmp_path / path)
    assert says(message, parts), message


@pytest.mark.equation("preprocessing")
def test_celeba_photographs_are_cropped_to_the_148_in_the_middle():
    inner = picture(148, 148)
    whole = Image.new("RGB", (178, 218), "red")
    whole.paste(inner, (15, 35))
    assert crop_and_resize(whole, 148).tobytes() == inner.tobytes()
    assert crop_and_resize(whole).tobytes() == crop_and_resize(inner).tobytes()


@pytest.mark.equation("preprocessing")
@pytest.mark.parametrize(
    "size, crop, box",
    [
        ((100, 60), 0, (20, 0, 80, 60)),
        ((61, 100), 0, (0, 19, 61, 80)),
        ((70, 90), 1000, (0, 10, 70, 80)),
        ((70, 90), 50, (10, 20, 60, 70)),
        ((64, 64), 148, (0, 0, 64, 64)),
    ],
)
def test_other_pictures_are_cropped_to_a_square_in_the_middle_no_larger_than_they_are(
    tmp_path, size, crop, box
):
    image = picture(*size)
    image.save(tmp_path / "a.png")
    side = box[2] - box[0]
    assert crop_and_resize(image, side, crop).tobytes() == image.crop(box).tobytes()
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", side, crop), np.asarray(image.crop(box)))


@pytest.mark.equation("preprocessing")
def test_a_resize_is_antialiased():
    chequerboard = np.indices((512, 512)).sum(0) % 2 * 255  # it has no low frequencies: its average is grey
    small = np.asarray(crop_and_resize(Image.fromarray(chequerboard.astype(np.uint8))), int)
    assert abs(small - 127).max() <= 2


def flat(mode, colour):
    return Image.new(mode, (64, 64), colour)


def palette():
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


SIXTEEN_BITS = Image.fromarray(np.full((64, 64), 0x8001, np.uint16))
MODES = [  # file, picture, the pixel that is read, how it is saved
    ("grey.jpg", flat("L", 100), (100, 100, 100), {}),
    ("grey.png", flat("L", 100), (100, 100, 100), {}),
    ("bit.png", flat("1", 1), (255, 255, 255), {}),
    ("palette.png", palette(), (200, 100, 50), {}),
    ("palette.gif", palette(), (200, 100, 50), {}),
    ("clear_palette.png", palette(), (255, 255, 255), {"transparency": 1}),
    ("colour_key.png", flat("RGB", (9, 9, 9)), (255, 255, 255), {"transparency": (9, 9, 9)}),
    ("clear.png", flat("RGBA", (10, 20, 30, 0)), (255, 255, 255), {}),
    ("half.png", flat("RGBA", (0, 0, 0, 128)), (127, 127, 127), {}),
    ("opaque.png", flat("RGBA", (10, 20, 30, 255)), (10, 20, 30), {}),
    ("clear_grey.png", flat("LA", (10, 0)), (255, 255, 255), {}),
    ("cmyk.jpg", flat("CMYK", (0, 0, 0, 155)), (100, 100, 100), {}),
    ("cmyk.tiff", flat("CMYK", (0, 0, 0, 155)), (100, 100, 100), {}),
    ("sixteen.png", SIXTEEN_BITS, (128, 128, 128), {}),
    ("sixteen.tiff", SIXTEEN_BITS, (128, 128, 128), {}),
    ("colour.webp", flat("RGB", (100, 100, 100)), (100, 100, 100), {}),
    ("colour.bmp", flat("RGB", (10, 20, 30)), (10, 20, 30), {}),
]


@pytest.mark.parametrize("name, image, pixel, options", MODES, ids=[case[0] for case in MODES])
def test_every_kind_of_picture_becomes_rgb(tmp_path, name, image, pixel, options):
    image.save(tmp_path / name, **options)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels.astype(int) - pixel).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_by_their_exif(tmp_path, orientation, suffix):
    file = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(64, 64).save(file, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert (expected == np.asarray(Image.open(file))).all() == (orientation == 1 or suffix == "tiff")
    np.testing.assert_array_equal(read_image(file), expected)
    once = crop_and_resize(Image.open(file))
    np.testing.assert_array_equal(np.asarray(crop_and_resize(once)), expected)


TURNED = struct.pack("<4sIH", b"II*\0", 8, 2) + struct.pack("<HHII", 0x0112, 3, 1, 6)  # and one tag more
TEXT_FOR_A_NUMBER = TURNED + struct.pack(
    "<HHI4sI", 0x011A, 2, 4, b"abc", 0
)  # which Pillow cannot write again


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own: corrupt EXIF data
@pytest.mark.parametrize(
    "block, turned",
    [
        (b"garbage!", False),
        (b"MM\0*\0\0\0\x08\xff\xff", False),
        (b"II*\0\xff\xff\xff\xff", False),
        (TEXT_FOR_A_NUMBER, True),
    ],
)
def test_a_broken_exif_block_does_not_make_a_picture_bad(tmp_path, block, turned):
    picture(64, 64).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    stored = Image.open(tmp_path / "a.jpg").convert("RGB")
    expected = stored.transpose(Image.Transpose.ROTATE_270) if turned else stored
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.asarray(expected))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width, height):
    r"""A PNG of a few bytes whose header promises any size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (head, b"IDAT" + zlib.compress(b"\0" * 100), b"IEND")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


JPEG = encoded(picture(100, 100), "JPEG", quality=95)
PNG = encoded(picture(100, 100), "PNG")
FLOATS = encoded(flat("F", 0.5), "TIFF")
BAD_FILES = {
    "zero bytes": (b"", "zero bytes"),
    "HTML": (HTML, "an HTML page"),
    "zip": (ZIP, "a zip archive"),
    "LFS pointer": (LFS, "a Git LFS pointer"),
    "text": (b"no picture at all", "not a picture"),
    "garbage": (GARBAGE, "not a picture"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "JPEG without its end": (JPEG[:-200], "truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "JPEG header alone": (JPEG[:10], ""),
    "one pixel": (encoded(picture(1, 1), "PNG"), "too small: 1 x 1"),
    "seven pixels high": (encoded(picture(100, 7), "PNG"), "too small: 100 x 7"),
    "10,000 pixels wide": (png_that_claims(10_000, 10), "too large: 10000 x 10"),
    "10,000 pixels high": (png_that_claims(10, 10_000), "too large: 10 x 10000"),
    "64 megapixels": (png_that_claims(8000, 8000), "too large: 8000 x 8000"),
    "a bomb": (png_that_claims(60_000, 60_000), "too large"),
    "floats": (FLOATS, "floating-point"),
    "PNG of wrong bytes": (PNG[:60] + GARBAGE[:500] + PNG[560:], ""),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_picture_is_a_bad_image_with_a_short_reason(tmp_path, case):
    content, reason = BAD_FILES[case]
    with pytest.raises(BadImage) as caught:
        read_image(put(tmp_path / "a.jpg", content))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value) and 0 < len(str(caught.value)) < 150


def test_a_missing_file_a_folder_and_an_impossible_name_are_bad_images(tmp_path):
    for path, reason in [(tmp_path / "no.jpg", "missing"), (tmp_path, "not a file"), ("a\0.jpg", "null")]:
        with pytest.raises(BadImage, match=reason):
            read_image(path)


@pytest.mark.parametrize("size, crop", [(0, 0), (-1, 0), (64, -1)])
def test_an_impossible_size_is_the_callers_mistake_and_not_the_pictures(tmp_path, size, crop):
    picture().save(tmp_path / "a.jpg")
    assert f"size {size}, crop {crop}" in message_of(crop_and_resize, picture(), size, crop)
    message_of(read_image, tmp_path / "a.jpg", size, crop)


def fake_torchvision(monkeypatch, error=None):
    def celeba(root, split="train", download=False):
        assert download
        make_celeba(Path(root) / "celeba")
        put(Path(root) / "celeba" / "img_align_celeba.zip", ZIP)
        if error:
            raise error

    monkeypatch.setattr("torchvision.datasets.CelebA", celeba)


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'gdown'"),
        RuntimeError("The daily quota of the file\nimg_align_celeba.zip is exceeded.\n" * 9),
        OSError("HTTP Error 403: Forbidden"),
    ],
)
def test_a_failed_download_says_where_else_to_go_and_leaves_nothing(tmp_path, monkeypatch, error):
    fake_torchvision(monkeypatch, error)
    message = message_of(download_celeba, tmp_path / "celeba")
    assert type(error).__name__ in message and str(error)[:20] in message
    elsewhere = "jessicali9530/celeba-dataset ... MMLAB CUHK ... Hugging Face ... img_align_celeba/ ... "
    assert says(message, elsewhere + ATTR)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_download_arrives_as_a_folder_that_opens(tmp_path, monkeypatch, exists):
    fake_torchvision(monkeypatch)
    folder = tmp_path / "data" / "faces"
    if exists:
        folder.mkdir(parents=True)
    assert download_celeba(folder) == folder
    assert len(open_table(folder)) == N
    assert os.listdir(tmp_path / "data") == ["faces"] and not list(folder.rglob("*.zip"))
    fake_torchvision(monkeypatch, OSError("the second download"))
    assert download_celeba(folder) == folder


def test_a_download_never_replaces_something_else(tmp_path):
    put(tmp_path / "thesis" / "chapter.tex", "x")
    message_of(download_celeba, tmp_path / "thesis")
    with pytest.raises(OSError):
        download_celeba(tmp_path / "thesis" / "chapter.tex" / "celeba")
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


REAL = Path(os.environ.get("DDPM_CELEBA") or Path(__file__).resolve().parents[1] / "../shared/celeba")


@pytest.mark.skipif(not REAL.is_dir(), reason="no CelebA at ../shared/celeba, and DDPM_CELEBA is not set")
def test_the_real_sample_opens():
    table = open_table(REAL)
    assert len(table) == 13_063 and table.attributes.shape == (13_063, 40)
    assert list(np.bincount(table.split)) == [11_329, 1_343, 391]
    fraction = dict(zip(ATTRIBUTES, table.attributes.mean(0), strict=True))
    assert 0.35 < fraction["Male"] < 0.50 and 0.01 < fraction["Bald"] < 0.04
    for name in table.files[::2000]:
        pixels = read_image(table.root / name)
        assert pixels.shape == (64, 64, 3) and 20 < pixels.mean() < 235 and pixels.std() > 10
