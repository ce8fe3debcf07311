r"""Every layout that people have CelebA in gives the same table; every broken one gives one clear line."""

import csv
import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.download import download_celeba
from ddpm.celeba.images import BadImage, crop_and_resize, read_image
from ddpm.celeba.lists import TEST, TRAIN, VALID, _split_by_name, open_table
from ddpm.celeba.refusals import DataError

N = 12
FILES = tuple(f"{i:06}.jpg" for i in range(1, N + 1))
LABELS = np.random.default_rng(0).integers(0, 2, (N, 40)).astype(np.uint8)
SPLIT = np.array([0] * 7 + [1] * 3 + [2] * 2, np.uint8)

# ----------------------------------------------------------------------- a mini CelebA, in every layout


def picture(width=178, height=218, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def put_pictures(folder, files=FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed=i).save(folder / name)


def put(file, text, encoding="utf-8"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return file


def official(count=True, end="\r\n", files=FILES, names=ATTRIBUTES):
    lines = [str(len(files))] * count + [" ".join(names) + " "]
    for name, row in zip(files, LABELS, strict=False):
        lines.append(name + "".join("  1" if value else " -1" for value in row))
    return end.join(lines) + end


def partition(end="\r\n"):
    return "".join(f"{name} {part}{end}" for name, part in zip(FILES, SPLIT, strict=True))


def rows_csv(header, rows, **dialect):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", **dialect).writerows([header, *rows])
    return text.getvalue()


def kaggle(header=("image_id",), index=False, write=lambda value: 2 * int(value) - 1, names=ATTRIBUTES):
    order = [ATTRIBUTES.index(name) for name in names]
    rows = [
        [*([i] if index else []), name, *map(write, row[order])]
        for i, (name, row) in enumerate(zip(FILES, LABELS, strict=True))
    ]
    return rows_csv([*header, *names], rows)


def kaggle_partition():
    return rows_csv(["image_id", "partition"], zip(FILES, SPLIT, strict=True))


def make_official(root, pictures="img_align_celeba", anno=".", eval_="."):
    put_pictures(root / pictures)
    put(root / anno / "list_attr_celeba.txt", official())
    put(root / eval_ / "list_eval_partition.txt", partition())


def make_kaggle(root, attributes, part=None, pictures="img_align_celeba/img_align_celeba"):
    put_pictures(root / pictures)
    put(root / "list_attr_celeba.csv", attributes)
    put(root / "list_eval_partition.csv", part or kaggle_partition())


def make_text(root, text, encoding="utf-8"):
    make_official(root)
    put(root / "list_attr_celeba.txt", text, encoding)


def make_png(root):
    make_official(root, "unused")
    put_pictures(root / "img_align_celeba_png", [name.replace("jpg", "png") for name in FILES])


def respelled(header):
    return header[0].upper().replace("_", " ")


PANDAS_PARTITION = rows_csv(["", "image_id", "partition"], zip(range(N), FILES, SPLIT, strict=True))

LAYOUTS = {
    "official": make_official,
    "nested": lambda root: make_official(root, "img_align_celeba/img_align_celeba"),
    "beside the list": lambda root: make_official(root, "."),
    "drive": lambda root: make_official(root, "Img/img_align_celeba", "Anno", "Eval"),
    "torchvision root": lambda root: make_official(root / "celeba"),
    "torchvision, drive": lambda root: make_official(root / "CelebA", "Img/img_align_celeba", "Anno", "Eval"),
    "png": make_png,
    "LF": lambda root: make_text(root, official(end="\n")),
    "no count line": lambda root: make_text(root, official(count=False)),
    "LF, no count line": lambda root: make_text(root, official(count=False, end="\n")),
    "no final line end": lambda root: make_text(root, official().rstrip()),
    "blank lines": lambda root: make_text(root, official(end="\r\n\r\n")),
    "names with an id column": lambda root: make_text(root, official(names=("image_id", *ATTRIBUTES))),
    "byte order mark": lambda root: make_text(root, official(), "utf-8-sig"),
    "UTF-16": lambda root: make_text(root, official(), "utf-16"),
    "latin-1 spaces": lambda root: make_text(root, official().replace("Young ", "Young\xa0"), "latin-1"),
    "kaggle": lambda root: make_kaggle(root, kaggle()),
    "kaggle, UTF-16": lambda root: make_kaggle(root, kaggle().encode("utf-16")),
    "kaggle, semicolons": lambda root: make_kaggle(root, kaggle().replace(",", ";")),
    "kaggle, flat": lambda root: make_kaggle(root, kaggle(), pictures="img_align_celeba"),
    "pandas, empty header": lambda root: make_kaggle(root, kaggle(("",))),
    "pandas, Unnamed: 0": lambda root: make_kaggle(root, kaggle(("Unnamed: 0",))),
    "pandas, index": lambda root: make_kaggle(root, kaggle(("", "image_id"), index=True), PANDAS_PARTITION),
    "0 and 1": lambda root: make_kaggle(root, kaggle(write=int)),
    "False and True": lambda root: make_kaggle(root, kaggle(write=bool)),
    "-1.0 and 1.0": lambda root: make_kaggle(root, kaggle(write=lambda value: 2.0 * value - 1)),
    "other column order": lambda root: make_kaggle(root, kaggle(names=ATTRIBUTES[::-1])),
    "other spelling": lambda root: make_kaggle(root, re.sub("^.*", respelled, kaggle(), count=1)),
    "txt partition of a csv": lambda root: (
        make_kaggle(root, kaggle()),
        os.remove(root / "list_eval_partition.csv"),
        put(root / "list_eval_partition.txt", partition()),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_celeba_gives_the_same_table(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    table = open_table(str(tmp_path))
    assert [name.split(".")[0] for name in table.files] == [name.split(".")[0] for name in FILES]
    np.testing.assert_array_equal(table.attributes, LABELS)
    np.testing.assert_array_equal(table.split, SPLIT)
    assert table.captions is None and table.attributes.dtype == table.split.dtype == np.uint8
    assert table.attributes.flags.writeable
    assert read_image(table.root / table.files[-1]).shape == (64, 64, 3)


def test_the_table_keeps_the_rows_whose_picture_is_there(tmp_path):
    make_official(tmp_path)
    for name in FILES[::2]:
        os.remove(tmp_path / "img_align_celeba" / name)
    table = open_table(tmp_path)
    assert table.files == FILES[1::2]
    np.testing.assert_array_equal(table.attributes, LABELS[1::2])
    np.testing.assert_array_equal(table.split, SPLIT[1::2])


def test_a_table_is_opened_without_a_look_at_each_picture(tmp_path, monkeypatch):
    make_official(tmp_path)
    seen, stat = [], os.stat
    monkeypatch.setattr(
        os, "stat", lambda path, *rest, **more: seen.append(str(path)) or stat(path, *rest, **more)
    )
    open_table(tmp_path)
    assert not [path for path in seen if path.endswith(".jpg")]


def test_a_subset_takes_masks_integers_and_slices(tmp_path):
    make_official(tmp_path)
    table = open_table(tmp_path)
    valid = table.subset(table.split == VALID)
    assert len(valid) == 3 and valid.files == FILES[7:10] and valid.root == table.root
    np.testing.assert_array_equal(table.subset([4, 2]).attributes, LABELS[[4, 2]])
    assert table.subset(slice(None, None, 5)).files == FILES[::5]
    assert len(table.subset([])) == 0


# ---------------------------------------------------------------------------------------- one's own data


@pytest.mark.parametrize("list_name", ["captions.csv", "metadata.csv", "faces.csv"])
@pytest.mark.parametrize("below", [".", "images"])
def test_a_folder_with_a_csv_of_captions_opens(tmp_path, list_name, below):
    put_pictures(tmp_path / below, ["b.png", "deep/ä.jpg"])
    text = 'file_name,text\nb.png,"a man,\n  smiling"\n./deep\\ä.jpg,die Frau\ngone.png,nobody\n'
    put(tmp_path / list_name, text)
    table = open_table(tmp_path)
    assert table.files == ("b.png", "deep/ä.jpg") and table.captions == ("a man, smiling", "die Frau")
    assert table.attributes is None and table.root == tmp_path / below
    assert sorted(table.split) == [TRAIN, VALID]
    assert table.subset([1]).captions == ("die Frau",)


@pytest.mark.parametrize("header", ["file", "FileName", "image", "image id", "Path", "whatever", ""])
def test_the_column_of_files_is_found(tmp_path, header):
    put_pictures(tmp_path, ["a.png", "b.png"])
    put(tmp_path / "captions.csv", f"number,{header},caption\n0,a.png,one\n1,b.png,two\n")
    assert open_table(tmp_path).files == ("a.png", "b.png")


def test_a_hugging_face_jsonl_opens(tmp_path):
    put_pictures(tmp_path, ["a.png", "b.png"])
    items = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two", "more": 3}]
    put(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, items)))
    assert open_table(tmp_path).captions == ("one", "two")


def test_own_attributes_may_be_a_part_of_the_forty_and_bring_their_split(tmp_path):
    put_pictures(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    rows = [["a.png", 1, 0, "train"], ["b.png", 0, 1, "Val"], ["c.png", 1, 1, "test"], ["d.png", -1, -1, 0]]
    put(tmp_path / "mine.csv", rows_csv(["image", "smiling", "5 o Clock Shadow", "split"], rows))
    table = open_table(tmp_path)
    assert list(table.attributes[:, ATTRIBUTES.index("Smiling")]) == [1, 0, 1, 0]
    assert list(table.attributes[:, 0]) == [0, 1, 1, 0]
    assert table.attributes.sum() == 4 and list(table.split) == [TRAIN, VALID, TEST, TRAIN]


# ------------------------------------------------------------------------------------------------ splits


def test_without_a_partition_the_split_depends_on_each_name_alone():
    files = [f"{i:06}.jpg" for i in range(5000)]
    split = _split_by_name(files)
    share = np.bincount(split) / len(files)
    np.testing.assert_allclose(share, [0.90, 0.05, 0.05], atol=0.01)
    np.testing.assert_array_equal(_split_by_name(files[::-1]), split[::-1])
    np.testing.assert_array_equal(_split_by_name(files[1000:]), split[1000:])


@pytest.mark.parametrize("count", range(1, 30))
def test_a_few_pictures_still_have_some_to_train_on_and_some_to_validate(count):
    for start in range(100):
        split = _split_by_name([f"{i}.png" for i in range(start, start + count)])
        assert (split == TRAIN).any()
        assert (split == VALID).any() == (count > 1)


@pytest.mark.parametrize("parts", [[0] * 12, [0] * 2 + [2] * 10, [0] + [2] * 11, [2] * 12])
def test_a_partition_without_valid_gives_up_some_of_its_train_and_none_of_its_test(tmp_path, parts):
    make_official(tmp_path)
    put(
        tmp_path / "list_eval_partition.txt", "".join(f"{f} {p}\n" for f, p in zip(FILES, parts, strict=True))
    )
    split = open_table(tmp_path).split
    np.testing.assert_array_equal(split == TEST, np.array(parts) == TEST)
    assert (split == VALID).any() == (parts.count(0) > 1)
    assert (split == TRAIN).any() == (0 in parts)


# ------------------------------------------------------------------------------------------- broken data

HTML = b"\n<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
ZIP = b"PK\x03\x04" + bytes(range(256))
GARBAGE = bytes(np.random.default_rng(1).integers(0, 256, 5000, np.uint8))


def broken_line(number, change):
    lines = official().split("\r\n")
    lines[number - 1] = change(lines[number - 1])
    return "\r\n".join(lines)


# the text of list_attr_celeba.txt -> what the message must say
BROKEN_LISTS = {
    "HTML": (HTML, ["expected a list", "got an HTML page", "fetch it again"]),
    "HTML with a mark": (b"\xef\xbb\xbf<html>", ["got an HTML page"]),
    "zip": (ZIP, ["expected a list", "got a zip archive"]),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid", ["got a Git LFS pointer"]),
    "empty": (b"", ["got an empty file"]),
    "blank": (b" \r\n ", ["got an empty file"]),
    "binary": (GARBAGE, ["expected text in UTF-8", "got other bytes"]),
    "NUL": (b"12\r\nMale \0 Young", ["expected text in UTF-8"]),
    "half of UTF-16": (official().encode("utf-16")[:1001], ["expected text in UTF-8"]),
    "cut short": (official()[:1500], ["expected 12 rows", "got 8", "fetch it again"]),
    "no rows": (
        " ".join(ATTRIBUTES).encode(),
        ["expected a line of column names and then rows", "got no rows"],
    ),
    "count alone": (b"0\r\n", ["got no rows"]),
    "count too large": (broken_line(1, lambda line: "202599"), ["expected 202,599 rows", "got 12"]),
    "count too small": (broken_line(1, lambda line: "11"), ["expected 11 rows", "got 12"]),
    "no names": (broken_line(2, lambda line: ""), ["expected all 40 attributes", "got 0"]),
    "names cut": (
        broken_line(2, lambda line: line.replace("Young", "")),
        ["expected all 40", "got 39, without Young"],
    ),
    "name twice": (
        broken_line(2, lambda line: line.replace("Young", "Male")),
        ["expected one column Male", "got two"],
    ),
    "few values": (
        broken_line(5, lambda line: line[:-3]),
        ["line 5", "expected 41 columns", "got 40", "000003.jpg"],
    ),
    "many values": (broken_line(5, lambda line: line + " 1"), ["line 5", "expected 41 columns", "got 42"]),
    "value x": (
        broken_line(6, lambda line: line[:-3] + " x"),
        ["line 6", "expected values -1 and 1", "got 'x'"],
    ),
    "value 7": (broken_line(6, lambda line: line[:-3] + " 7"), ["line 6", "got '7'"]),
    "value nan": (broken_line(6, lambda line: line[:-3] + " nan"), ["line 6", "got 'nan'"]),
    "name again": (
        broken_line(7, lambda line: line.replace("05", "02")),
        ["line 7", "'000002.jpg' again, after line 4"],
    ),
    "no name": (
        broken_line(7, lambda line: line.replace(".jpg", "")),
        ["line 7", "file name", "got '000005'"],
    ),
    "path outside": (
        broken_line(7, lambda line: "../" + line),
        ["line 7", "inside the folder", "'../000005.jpg'"],
    ),
    "very long value": (broken_line(6, lambda line: line[:-3] + " " + "y" * 10**5), ["line 6", "got 'yyyy"]),
}


def message_of(action):
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "expected" in message and "got" in message and "; " in message
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("case", BROKEN_LISTS)
def test_a_broken_list_of_attributes_is_named_in_one_line(tmp_path, case):
    text, parts = BROKEN_LISTS[case]
    make_text(tmp_path, text)
    message = message_of(lambda: open_table(tmp_path))
    for part in ["list_attr_celeba.txt", *parts]:
        assert part in message


BROKEN_PARTITIONS = {
    "HTML": (HTML, ["got an HTML page"]),
    "cut short": (partition()[:42], ["expected a split for each of 12", "got none for 9", "000004.jpg"]),
    "split 3": (
        partition().replace("06.jpg 0", "06.jpg 3"),
        ["line 6", "expected train, valid or test", "got '3'"],
    ),
    "no split": (partition().replace("06.jpg 0", "06.jpg"), ["line 6", "expected 2 columns", "got 1"]),
    "words": (
        b"nothing of the kind\r\nat all or so\r\n",
        ["expected a column of picture files", "'at all or so'"],
    ),
}


@pytest.mark.parametrize("case", BROKEN_PARTITIONS)
def test_a_broken_partition_is_named_in_one_line(tmp_path, case):
    text, parts = BROKEN_PARTITIONS[case]
    make_official(tmp_path)
    put(tmp_path / "list_eval_partition.txt", text)
    message = message_of(lambda: open_table(tmp_path))
    for part in ["list_eval_partition.txt", *parts]:
        assert part in message


BROKEN_CSVS = {  # captions.csv beside a.png and b.png
    "no header": ("a.png,a man\nb.png,a woman\n", ["expected a column caption", "name the columns"]),
    "other columns": ("file,colour\na.png,red\n", ["expected a column caption", "got file, colour"]),
    "no files": ("id,caption\n1,a man\n", ["expected a column of picture files", "got id, caption"]),
    "empty caption": (
        "file,caption\na.png,a man\nb.png, \n",
        ["line 3", "expected a caption", "none for 'b.png'"],
    ),
    "open quote": (
        'file,caption\na.png,"a man\nb.png,a woman\n',
        ["expected well-formed rows", "end of data"],
    ),
    "comma in a caption": ("file,caption\na.png,a man, old\n", ["line 2", "expected 2 columns", "got 3"]),
    "parent folder": ("file,caption\n../a.png,x\n", ["line 2", "inside the folder", "'../a.png'"]),
    "hidden parent folder": ("file,caption\nx\\..\\..\\a.png,x\n", ["line 2", "inside the folder"]),
    "absolute path": ("file,caption\n/etc/a.png,x\n", ["line 2", "inside the folder", "'/etc/a.png'"]),
    "other drive": ("file,caption\nC:\\a.png,x\n", ["line 2", "inside the folder"]),
    "twice": ("file,caption\na.png,x\n./a.png,y\n", ["line 3", "every picture once", "after line 2"]),
    "unknown split": ("file,caption,split\na.png,x,dev\n", ["line 2", "train, valid or test", "got 'dev'"]),
    "none there": (
        "file,caption\nA1.png,x\nA2.png,x\n",
        ["its 2 pictures, such as A1.png", "got none of them"],
    ),
    "latin-1": ("file,caption\na.png,käse\n".encode("latin-1"), ["expected text in UTF-8"]),
    "bad attribute": ("file,Male\na.png,maybe\n", ["line 2", "values -1 and 1", "got 'maybe'"]),
}


@pytest.mark.parametrize("case", BROKEN_CSVS)
def test_a_broken_csv_of_ones_own_is_named_in_one_line(tmp_path, case):
    text, parts = BROKEN_CSVS[case]
    put_pictures(tmp_path, ["a.png", "b.png"])
    put(tmp_path / "captions.csv", text)
    message = message_of(lambda: open_table(tmp_path))
    for part in ["captions.csv", *parts]:
        assert part in message


@pytest.mark.parametrize(
    "text", ['{"file_name": "a.png"', '["a.png"]', "3", '{"file_name": "a.png", "text": ""}']
)
def test_a_broken_jsonl_is_named_in_one_line(tmp_path, text):
    put_pictures(tmp_path, ["a.png"])
    put(tmp_path / "metadata.jsonl", text)
    assert "metadata.jsonl" in message_of(lambda: open_table(tmp_path))


def test_a_kaggle_csv_without_some_attributes_names_them(tmp_path):
    make_kaggle(tmp_path, kaggle(names=ATTRIBUTES[:-6]))
    message = message_of(lambda: open_table(tmp_path))
    assert "got 34, without Wearing_Earrings, Wearing_Hat," in message and "and 2 more" in message


def test_a_kaggle_csv_cut_short_names_its_last_line(tmp_path):
    make_kaggle(tmp_path, kaggle()[:-30])
    assert "line 13: expected 41 columns, got" in message_of(lambda: open_table(tmp_path))


def test_a_folder_that_is_missing_or_a_file_says_so(tmp_path):
    assert "nothing of that name" in message_of(lambda: open_table(tmp_path / "nowhere"))
    assert "got a zip archive; unpack it" in message_of(lambda: open_table(put(tmp_path / "celeba.zip", ZIP)))
    assert "got an HTML page" in message_of(lambda: open_table(put(tmp_path / "img.zip", HTML)))
    file = put(tmp_path / "list_attr_celeba.txt", official())
    assert f"got a file; give its folder, {tmp_path}" in message_of(lambda: open_table(file))


def test_a_folder_that_is_no_data_says_what_is_in_it(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "got an empty folder" in message_of(lambda: open_table(empty))
    put_pictures(tmp_path / "bare", ["a.png", "b.png"])
    message = message_of(lambda: open_table(tmp_path / "bare"))
    assert "got 2 pictures without annotations" in message and "captions.csv" in message
    put(tmp_path / "texts" / "notes.md", "x")
    message = message_of(lambda: open_table(tmp_path / "texts"))
    assert "got notes.md" in message and "list_attr_celeba.txt" in message
    put(tmp_path / "texts" / "img_align_celeba.zip", ZIP)
    assert "unpack the archive" in message_of(lambda: open_table(tmp_path / "texts"))
    put(tmp_path / "two" / "a.csv", "x")
    put(tmp_path / "two" / "b.csv", "x")
    assert "expected one csv, got 2: a.csv, b.csv" in message_of(lambda: open_table(tmp_path / "two"))


def test_the_picture_folder_of_celeba_points_to_its_parent(tmp_path):
    make_official(tmp_path)
    message = message_of(lambda: open_table(tmp_path / "img_align_celeba"))
    assert f"give the folder with list_attr_celeba.txt, {tmp_path}" in message


def test_celeba_without_its_pictures_says_where_it_looked(tmp_path):
    put(tmp_path / "list_attr_celeba.txt", official())
    (tmp_path / "img_align_celeba").mkdir()
    message = message_of(lambda: open_table(tmp_path))
    assert "expected its 12 pictures, such as 000001.jpg" in message
    assert f"got none of them in {tmp_path / 'img_align_celeba'}, {tmp_path}" in message
    put(tmp_path / "img_align_celeba.zip", ZIP)
    assert "unpack img_align_celeba.zip" in message_of(lambda: open_table(tmp_path))


# ---------------------------------------------------------------------------------------------- pictures


@pytest.mark.equation("preprocessing")
def test_celeba_photographs_are_cropped_to_the_148_in_the_middle():
    inner = picture(148, 148)
    whole = Image.new("RGB", (178, 218), "red")
    whole.paste(inner, (15, 35))
    assert crop_and_resize(whole, 148).tobytes() == inner.tobytes()
    assert crop_and_resize(whole).tobytes() == crop_and_resize(inner).tobytes()


@pytest.mark.equation("preprocessing")
@pytest.mark.parametrize(("size", "box"), [((100, 60), (20, 0, 80, 60)), ((61, 100), (0, 19, 61, 80))])
def test_other_pictures_are_cropped_to_the_largest_square_in_the_middle(size, box):
    image = picture(*size)
    assert crop_and_resize(image, box[2] - box[0]).tobytes() == image.crop(box).tobytes()


def test_a_crop_is_never_more_than_the_picture():
    image = picture(70, 90)
    assert crop_and_resize(image, 70, 1000).tobytes() == image.crop((0, 10, 70, 80)).tobytes()
    assert crop_and_resize(image, 50, 50).tobytes() == image.crop((10, 20, 60, 70)).tobytes()


def test_a_picture_of_the_right_size_stays_as_it_is(tmp_path):
    image = picture(64, 64)
    image.save(tmp_path / "a.png")
    for crop in (0, 64, 148):
        assert crop_and_resize(image, 64, crop).tobytes() == image.tobytes()
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.asarray(image))


@pytest.mark.equation("preprocessing")
def test_a_resize_is_antialiased():
    rows = (
        np.indices((512, 512)).sum(0) % 2 * 255
    )  # a chequerboard has no low frequencies: its average is grey
    small = np.asarray(crop_and_resize(Image.fromarray(rows.astype(np.uint8))), int)
    assert abs(small - 127).max() <= 2


def test_a_file_and_an_image_go_through_the_same_crop(tmp_path):
    picture(178, 218).save(tmp_path / "a.jpg")
    image = Image.open(tmp_path / "a.jpg")
    for size, crop in [(64, 0), (32, 100), (200, 178)]:
        pixels = read_image(str(tmp_path / "a.jpg"), size, crop)
        assert pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)
        np.testing.assert_array_equal(pixels, np.asarray(crop_and_resize(image, size, crop)))


def level(mode, fill):
    return lambda file: Image.new(mode, (64, 64), fill).save(file)


def palette(file):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(file)


def colour_key(file):
    Image.new("RGB", (64, 64), (9, 9, 9)).save(file, transparency=(9, 9, 9))


def clear_palette(file):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(file, transparency=1)


def sixteen_bits(file):
    Image.fromarray(np.full((64, 64), 0x8001, np.uint16)).save(file)


MODES = {  # name -> (how it is saved, the pixel that is read)
    "grey.jpg": (level("L", 100), (100, 100, 100)),
    "grey.png": (level("L", 100), (100, 100, 100)),
    "bit.png": (level("1", 1), (255, 255, 255)),
    "palette.png": (palette, (200, 100, 50)),
    "palette.gif": (palette, (200, 100, 50)),
    "clear_palette.png": (clear_palette, (255, 255, 255)),
    "colour_key.png": (colour_key, (255, 255, 255)),
    "clear.png": (level("RGBA", (10, 20, 30, 0)), (255, 255, 255)),
    "half.png": (level("RGBA", (0, 0, 0, 128)), (127, 127, 127)),
    "opaque.png": (level("RGBA", (10, 20, 30, 255)), (10, 20, 30)),
    "clear_grey.png": (level("LA", (10, 0)), (255, 255, 255)),
    "cmyk.jpg": (level("CMYK", (0, 0, 0, 155)), (100, 100, 100)),
    "cmyk.tiff": (level("CMYK", (0, 0, 0, 155)), (100, 100, 100)),
    "sixteen.png": (sixteen_bits, (128, 128, 128)),
    "sixteen.tiff": (sixteen_bits, (128, 128, 128)),
    "colour.webp": (level("RGB", (100, 100, 100)), (100, 100, 100)),
    "colour.bmp": (level("RGB", (10, 20, 30)), (10, 20, 30)),
}


@pytest.mark.parametrize("name", MODES)
def test_every_kind_of_picture_becomes_rgb(tmp_path, name):
    save, pixel = MODES[name]
    save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels.astype(int) - pixel).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_by_their_exif(tmp_path, orientation, suffix):
    file, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    picture(64, 64).save(file, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert (expected == np.asarray(Image.open(file))).all() == (orientation == 1 or suffix == "tiff")
    np.testing.assert_array_equal(read_image(file), expected)
    once = crop_and_resize(Image.open(file))
    np.testing.assert_array_equal(np.asarray(crop_and_resize(once)), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own: corrupt EXIF data
@pytest.mark.parametrize("block", [b"garbage!", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\xff"])
def test_a_broken_exif_block_does_not_make_a_picture_bad(tmp_path, block):
    picture(64, 64).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + block)
    assert read_image(tmp_path / "a.jpg").shape == (64, 64, 3)


def jpeg(width=100, height=100):
    buffer = io.BytesIO()
    picture(width, height).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def png(width=100, height=100):
    buffer = io.BytesIO()
    picture(width, height).save(buffer, "PNG")
    return buffer.getvalue()


def png_that_claims(width, height):
    r"""A PNG of a few bytes whose header promises any size."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def floats():
    buffer = io.BytesIO()
    Image.new("F", (64, 64), 0.5).save(buffer, "TIFF")
    return buffer.getvalue()


BAD_FILES = {
    "zero bytes": (b"", "zero bytes"),
    "HTML": (HTML, "an HTML page"),
    "zip": (ZIP, "a zip archive"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    "text": (b"no picture at all", "not a picture"),
    "garbage": (GARBAGE, "not a picture"),
    "half a JPEG": (jpeg()[: len(jpeg()) // 2], "truncated"),
    "JPEG without its end": (jpeg()[:-200], "truncated"),
    "half a PNG": (png()[: len(png()) // 2], "truncated"),
    "JPEG header alone": (jpeg()[:10], ""),
    "one pixel": (png(1, 1), "too small: 1 x 1"),
    "seven pixels high": (png(100, 7), "too small: 100 x 7"),
    "10,000 pixels wide": (png_that_claims(10_000, 10), "too large: 10000 x 10"),
    "10,000 pixels high": (png_that_claims(10, 10_000), "too large: 10 x 10000"),
    "64 megapixels": (png_that_claims(8000, 8000), "too large: 8000 x 8000"),
    "a bomb": (png_that_claims(60_000, 60_000), "too large"),
    "floats": (floats(), "floating-point"),
    "PNG of wrong bytes": (png()[:60] + GARBAGE[:500] + png()[560:], ""),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_picture_is_a_bad_image_with_a_short_reason(tmp_path, case):
    content, reason = BAD_FILES[case]
    file = put(tmp_path / "a.jpg", content)
    with pytest.raises(BadImage) as caught:
        read_image(file)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value) and 0 < len(str(caught.value)) < 150


def test_a_missing_file_a_folder_and_an_impossible_name_are_bad_images(tmp_path):
    for path, reason in [(tmp_path / "no.jpg", "missing"), (tmp_path, "not a file"), ("a\0.jpg", "null")]:
        with pytest.raises(BadImage, match=reason):
            read_image(path)


def test_damaged_files_raise_nothing_but_bad_image(tmp_path):
    generator = np.random.default_rng(0)
    file = tmp_path / "a.jpg"
    for start in (jpeg(), png(), floats()):
        for _ in range(150):
            damaged = bytearray(start)
            for place in generator.integers(0, min(len(damaged), 600), 8):
                damaged[place] = generator.integers(0, 256)
            file.write_bytes(damaged)
            try:
                assert read_image(file, 16).shape == (16, 16, 3)
            except BadImage as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(("size", "crop"), [(0, 0), (-1, 0), (64, -1)])
def test_an_impossible_size_is_the_callers_mistake_and_not_the_pictures(tmp_path, size, crop):
    picture().save(tmp_path / "a.jpg")
    assert f"size {size}, crop {crop}" in message_of(lambda: crop_and_resize(picture(), size, crop))
    message_of(lambda: read_image(tmp_path / "a.jpg", size, crop))


# ---------------------------------------------------------------------------------------------- download


def fake_torchvision(monkeypatch, error=None):
    def celeba(root, split="train", download=False):
        assert download
        make_official(Path(root) / "celeba")
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
        RuntimeError("File not found or corrupted."),
    ],
)
def test_a_failed_download_says_where_else_to_go_and_leaves_nothing(tmp_path, monkeypatch, error):
    fake_torchvision(monkeypatch, error)
    message = message_of(lambda: download_celeba(tmp_path / "celeba"))
    assert type(error).__name__ in message and str(error)[:20] in message
    for place in [
        "jessicali9530/celeba-dataset",
        "MMLAB CUHK",
        "Hugging Face",
        "img_align_celeba/",
        "list_attr_celeba.txt",
    ]:
        assert place in message
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
    fake_torchvision(monkeypatch, OSError("asked again"))
    assert download_celeba(folder) == folder


def test_a_download_never_replaces_something_else(tmp_path):
    put(tmp_path / "thesis" / "chapter.tex", "x")
    message_of(lambda: download_celeba(tmp_path / "thesis"))
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]
    assert "expected a place to write to" in message_of(
        lambda: download_celeba(tmp_path / "thesis" / "chapter.tex" / "celeba")
    )


# ------------------------------------------------------------------------------------------- the real thing

REAL = Path(os.environ.get("DDPM_CELEBA") or Path(__file__).resolve().parents[1] / "../shared/celeba")


@pytest.mark.skipif(not REAL.is_dir(), reason="no CelebA at ../shared/celeba, and DDPM_CELEBA is not set")
def test_the_real_sample_opens():
    table = open_table(REAL)
    assert len(table) == 13_063 and table.attributes.shape == (13_063, 40)
    assert list(np.bincount(table.split)) == [11_329, 1_343, 391]
    share = dict(zip(ATTRIBUTES, table.attributes.mean(0), strict=True))
    assert 0.35 < share["Male"] < 0.50 and 0.01 < share["Bald"] < 0.04 and 0.4 < share["Smiling"] < 0.55
    for name in table.files[::2000]:
        pixels = read_image(table.root / name)
        assert pixels.shape == (64, 64, 3) and 20 < pixels.mean() < 235 and pixels.std() > 10
