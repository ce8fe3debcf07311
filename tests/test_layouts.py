r"""Pictures as people have them besides CelebA's own lists: folders, text files, lists of each split, parquet."""

import json
import re
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from conftest import refusal_of
from test_data import FILES, LABELS, LFS, N, encoded, picture, put, put_pictures

from ddpm.celeba.captions import ATTRIBUTES
from ddpm.celeba.dataset import photographs
from ddpm.celeba.images import read_image
from ddpm.celeba.lists import TEST, TRAIN, VALID, open_table, split_by_name
from ddpm.config import Config
from ddpm.training import dry_run


def jsonl(*rows):
    return "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows)


NO_CAPTIONS = 'have no captions; draw with the prompt ""'
FOLDERS = "the captions are the names of the folders: "
LAYOUTS = {  # lists and texts, {here} in which is the folder -> wordings of each picture, and what a warning says
    "pictures alone": ({}, {"a.jpg": [""], "images/b.png": [""]}, NO_CAPTIONS),
    "pictures of splits": ({}, {"train/a.jpg": [""], "val/a.jpg": [""]}, NO_CAPTIONS),
    "classes": ({}, {"cat/1.jpg": ["cat"], "dog/1.jpg": ["dog"]}, f"{FOLDERS}cat, dog$"),
    "classes of splits": (
        {},
        {"train/cat/1.jpg": ["cat"], "validation/cat/1.jpg": ["cat"]},
        f"{FOLDERS}cat$",
    ),
    "a class called train": (
        {},
        {"bus/1.jpg": ["bus"], "train/1.jpg": ["train"]},
        f"split by name, because bus/1.jpg is in no|{FOLDERS}bus, train$",
    ),
    "classes of numbers": ({}, {"0/1.jpg": ["0"], "1/1.jpg": ["1"]}, f"{FOLDERS}0, 1$"),
    "some in classes": ({}, {"a.jpg": [""], "cat/1.jpg": ["cat"]}, f"{FOLDERS}cat; 1 pictures have none"),
    "some in splits": (
        {},
        {"cover.png": [""], "train/cat/1.jpg": ["cat"]},
        f"split by name, because cover.png is in no|{FOLDERS}cat; 1",
    ),
    "formats that are not read": (
        {"a.heic": "x"},
        {"b.jfif": [""]},
        f"left out 1 pictures, such as a.heic; convert|{NO_CAPTIONS}",
    ),
    "texts": (
        {"a.txt": " a man,\tsmiling \n\nhe smiles\n", "b/c.txt": "die Frau", "readme.txt": "x"},
        {"a.jpg": ["a man, smiling", "he smiles"], "b/c.png": ["die Frau"]},
        None,
    ),
    "lists of splits": (
        {
            "train/metadata.jsonl": jsonl(("1.jpg", ["x", "y"])),
            "validation/metadata.csv": "file_name,text\n1.jpg,z\n",
        },
        {"train/1.jpg": ["x", "y"], "validation/1.jpg": ["z"]},
        None,
    ),
    "paths of splits": (
        {"metadata.csv": "file_name,text\ntrain/1.jpg,x\ntest/1.jpg,y\nval/1.jpg,z\n"},
        {"train/1.jpg": ["x"], "test/1.jpg": ["y"], "val/1.jpg": ["z"]},
        None,
    ),
    "tsv": ({"any.tsv": 'file\tcaption\n1.jpg\t5" wide, red\n'}, {"1.jpg": ['5" wide, red']}, None),
    "csv called txt": ({"captions.txt": "image,caption\n1.jpg,a dog .\n"}, {"1.jpg": ["a dog ."]}, None),
    "prompt": ({"any.csv": "image,Prompt\n1.jpg,x\n"}, {"1.jpg": ["x"]}, None),
    "label": ({"any.csv": "image,label\n1.jpg,cat\n"}, {"1.jpg": ["cat"]}, None),
    "absolute paths": ({"any.csv": "path,text\n{here}/a/1.jpg,x\n"}, {"a/1.jpg": ["x"]}, None),
    "repeated rows": (
        {"any.csv": "file,text,split\n1.jpg,x,val\n2.jpg,z,train\n./1.jpg,y,val\n1.jpg,x,val\n"},
        {"1.jpg": ["x", "y"], "2.jpg": ["z"]},
        None,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_each_picture_its_wordings(tmp_path, layout, recwarn):
    texts, wordings, says = LAYOUTS[layout]
    put_pictures(tmp_path, wordings)
    for name, text in texts.items():
        put(tmp_path / name, text.replace("{here}", str(tmp_path)))
    table = open_table(tmp_path)
    paths = [(table.root / name).relative_to(tmp_path).as_posix() for name in table.files]
    assert dict(zip(paths, map(list, table.captions), strict=True)) == wordings
    assert table.attributes is None
    said = [str(warning.message) for warning in recwarn]
    expected = says.split("|") if says else []
    assert len(said) == len(expected) and all(re.search(says, text) for text in said), said


@pytest.mark.filterwarnings("ignore:.*captions")
@pytest.mark.parametrize("kind", ["val/cat/1.jpg", "val/1.jpg"])
def test_folders_called_after_a_split_are_that_split(tmp_path, kind):
    put_pictures(tmp_path, [kind, *(kind.replace("val", split) for split in ("train", "Test"))])
    table = open_table(tmp_path)
    assert dict(zip(table.files, table.split, strict=True)) == {
        kind: VALID,
        kind.replace("val", "train"): TRAIN,
        kind.replace("val", "Test"): TEST,
    }


def test_half_of_a_surrogate_pair_in_a_caption_becomes_a_question_mark(tmp_path):
    put_pictures(tmp_path, ["a.jpg"])
    put(tmp_path / "metadata.jsonl", r'{"file_name": "a.jpg", "text": "a dog \ud83d"}')
    assert open_table(tmp_path).captions == (("a dog ?",),)


def test_what_is_in_the_folder_of_a_run_is_no_picture_of_the_data(tmp_path):
    put_pictures(tmp_path, ["a.jpg", "run/samples/step_000001.png", "run/loss.png"])
    for name in (".lock", "config.json"):
        put(tmp_path / "run" / name, "")
    with pytest.warns(UserWarning, match="have no captions"):
        assert open_table(tmp_path).files == ("a.jpg",)


def test_an_empty_text_is_an_empty_caption_and_a_warning_says_so(tmp_path):
    put_pictures(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    for name, text in {"a": "x", "b": "", "c": " \n"}.items():
        put(tmp_path / f"{name}.txt", text)
    with pytest.warns(UserWarning, match="2 pictures, such as b.jpg, have an empty .txt"):
        assert open_table(tmp_path).captions == (("x",), ("",), ("",))


def test_a_picture_without_a_text_is_left_out_where_others_have_one(tmp_path):
    put_pictures(tmp_path, ["a.jpg", "b.jpg"])
    put(tmp_path / "a.txt", "x")
    with pytest.warns(UserWarning, match="left out 1 pictures, such as b.jpg, because no .txt is called so"):
        assert open_table(tmp_path).files == ("a.jpg",)


BROKEN = {  # what is beside a.jpg, train/1.jpg and test/1.jpg -> what the refusal holds
    "a text of other bytes": ({"a.txt": b"\xff\xfea"}, "a.txt: expected text in UTF-8"),
    "another folder": ({"any.csv": "path,text\n/elsewhere/a.jpg,x\n"}, "expected a path inside the folder"),
    "up and down": ({"any.csv": "path,text\n{here}/../a.jpg,x\n"}, "expected a path inside the folder"),
    "a list below": (
        {"sets/mine/metadata.jsonl": "{}"},
        "got sets/mine/metadata.jsonl; give the folder of the list",
    ),
    "a list with another name": (
        {"list_attr_celeba (1).csv": "x"},
        "got list_attr_celeba (1).csv; give the folder",
    ),
    "captions and attributes": (
        {"train/captions.csv": "file,text\n1.jpg,x\n", "test/captions.csv": "file,Male\n1.jpg,1\n"},
        "expected captions in all lists or attributes in all, got both",
    ),
}


@pytest.mark.filterwarnings("ignore:.*left out 2 pictures")
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_layout_is_named_in_one_line(tmp_path, case):
    texts, says = BROKEN[case]
    put_pictures(tmp_path, ["a.jpg", "train/1.jpg", "test/1.jpg"])
    for name, text in texts.items():
        put(tmp_path / name, text if isinstance(text, bytes) else text.replace("{here}", str(tmp_path)))
    assert says in refusal_of(open_table, tmp_path)


# ----------------------------------------------------------------------------------------- parquet

PARTS = {"data/train-00000-of-00002.parquet": range(7), "data/train-00001-of-00002.parquet": range(7, 8)}
PARTS |= {
    "data/valid-00000-of-00001.parquet": range(8, 10),
    "data/test-00000-of-00001.parquet": range(10, 12),
}
PARTS_SPLIT = np.array([TEST] * 2 + [TRAIN] * 8 + [VALID] * 2)  # the files come in the order of their names
PARTS_ROWS = [10, 11, *range(8), 8, 9]
JPEGS = [encoded(picture(seed=i), "JPEG") for i in range(N)]
STRUCTS = [{"bytes": data, "path": name} for data, name in zip(JPEGS, FILES, strict=True)]


def put_parquet(folder, metadata=None, parts=PARTS, **columns):
    r"""The columns, of twelve values each, spread over parquet files."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    from pyarrow import parquet

    for name, rows in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({column: [values[i] for i in rows] for column, values in columns.items()})
        parquet.write_table(table.replace_schema_metadata(metadata), folder / name, row_group_size=3)


def forty(write):
    return {name: list(map(write, LABELS[:, i].tolist())) for i, name in enumerate(ATTRIBUTES)}


CELEBA = {
    "truths": forty(bool),
    "0 and 1": forty(int),
    "-1 and 1": forty(lambda value: 2 * value - 1),
    "a list": {"attributes": (2 * LABELS.astype(int) - 1).tolist()},
    "without names": forty(bool) | {"image": [{"bytes": data, "path": None} for data in JPEGS]},
    "bytes alone": forty(bool) | {"image": JPEGS},
}


@pytest.mark.parametrize("kind", CELEBA)
def test_celeba_in_parquet_gives_its_attributes_pictures_and_split(tmp_path, kind):
    put_parquet(tmp_path, **{"image": STRUCTS, "celeb_id": list(range(N))} | CELEBA[kind])
    put_pictures(tmp_path / "files")
    table = open_table(tmp_path)
    assert table.files[2] == "data/train-00000-of-00002.parquet/0" and table.captions is None
    np.testing.assert_array_equal(table.attributes, LABELS[PARTS_ROWS])
    np.testing.assert_array_equal(table.split, PARTS_SPLIT)
    pixels = photographs(tmp_path / "cache", table, size=16).pixels
    for i, row in enumerate(PARTS_ROWS):
        np.testing.assert_array_equal(pixels[i], read_image(tmp_path / "files" / FILES[row], 16))
    part = table.take([7, 2])
    np.testing.assert_array_equal(photographs(tmp_path / "cache", part, size=16).pixels, pixels[[7, 2]])


def test_the_dry_run_reads_pictures_out_of_parquet(tmp_path, monkeypatch):
    put_parquet(tmp_path, image=STRUCTS, **forty(bool))
    sources = []
    monkeypatch.setattr(dry_run, "read_image", lambda source, *_: sources.append(source))
    assert dry_run.seconds_of_a_picture(Config.from_preset("tiny"), open_table(tmp_path), some=2) > 0
    assert sources == [JPEGS[10], JPEGS[11]]


CLASSES = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
OWN = {  # columns beside the pictures -> the wordings of the first row, and what a warning says
    "captions": ({"prompt": ["a  man"] * N}, ("a man",), None),
    "lists of captions": ({"text": [["x", "y"]] * N}, ("x", "y"), None),
    "captions and attributes": (
        {"text": ["x"] * N} | forty(bool),
        ("x",),
        "data: captions are used, and not 5_o_",
    ),
    "classes": ({"label": [1] * N}, ("dog",), None),
    "several labels": ({"label": [[0, 1]] * N, "text": ["x"] * N}, ("x",), None),
    "attributes of one's own": ({"attributes": [["red"]] * N, "text": ["x"] * N}, ("x",), None),
    "other bytes first": ({"text": ["x"] * N, "md5": [b"12"] * N}, ("x",), None),
    "pictures alone": ({}, ("",), NO_CAPTIONS),
}


@pytest.mark.parametrize("kind", OWN)
def test_ones_own_parquet_gives_its_captions(tmp_path, kind, recwarn):
    columns, wordings, says = OWN[kind]
    put_parquet(tmp_path, {"huggingface": json.dumps(CLASSES)}, **columns, image=STRUCTS)
    table = open_table(tmp_path)
    assert table.captions == (wordings,) * N and table.attributes is None
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (says is not None) and all(says in text for text in said), said


@pytest.mark.parametrize("named", [True, False])
def test_the_split_of_parquet_files_that_name_none_is_by_the_name_of_each_picture(tmp_path, named):
    images = STRUCTS if named else JPEGS
    put_parquet(tmp_path, parts={"all.parquet": range(N)}, image=images, text=["x"] * N)
    table = open_table(tmp_path)
    assert table.files[0] == "all.parquet/0"
    np.testing.assert_array_equal(table.split, split_by_name(FILES if named else table.files))


def test_a_column_of_the_split_goes_before_the_names_of_files(tmp_path):
    put_parquet(tmp_path, image=STRUCTS, text=["x"] * N, split=["test", "val", "train"] * 4)
    np.testing.assert_array_equal(open_table(tmp_path).split, np.array([TEST, VALID, TRAIN] * 4)[PARTS_ROWS])


def test_a_row_whose_picture_cannot_be_read_is_skipped_and_named(tmp_path):
    images = [None, {"bytes": None, "path": "a.jpg"}, {"bytes": LFS, "path": None}, *STRUCTS[3:]]
    put_parquet(tmp_path, parts={"all.parquet": range(N)}, image=images, text=["x"] * N)
    table = replace(open_table(tmp_path), split=np.zeros(N, np.uint8))
    bad = photographs(tmp_path / "cache", table, size=16, max_bad=0.5).bad
    reasons = ["zero bytes", "zero bytes", "a Git LFS pointer (git lfs pull fetches the file)"]
    assert bad == tuple((f"all.parquet/{row}", reason) for row, reason in enumerate(reasons))


BROKEN_COLUMNS = {
    "three attributes": (
        {"attributes": [[1, 1, -1]] * N},
        "parquet row 0: expected 40 attributes in the order",
    ),
    "a value": ({"Male": [7] * N}, "parquet row 0: expected values -1 and 1"),
    "no value": ({"Male": [None] * N}, "parquet row 0: expected values -1 and 1"),
    "no caption": (
        {"text": ["x"] * 10 + [None] * 2},
        "test-00000-of-00001.parquet row 0: expected a caption",
    ),
    "a split": ({"text": ["x"] * N, "split": ["dev"] * N}, "row 0: expected train, valid or test"),
    "two pictures": (
        {"image": list(FILES), "left": JPEGS, "right": JPEGS},
        "expected one column of pictures, got left, right; call the right one image",
    ),
    "no pictures": (
        {"image": list(FILES), "text": ["x"] * N},
        "expected a column with the bytes of pictures",
    ),
}


@pytest.mark.parametrize("case", BROKEN_COLUMNS)
def test_broken_columns_are_named_in_one_line(tmp_path, case):
    columns, says = BROKEN_COLUMNS[case]
    put_parquet(tmp_path, **{"image": STRUCTS} | columns)
    assert says in refusal_of(open_table, tmp_path)


@pytest.mark.parametrize(
    "content, says", [(LFS, "got a Git LFS pointer"), (b"PAR1", "that can be read"), (b"", "0 bytes")]
)
def test_a_broken_parquet_file_is_named_in_one_line(tmp_path, content, says):
    pytest.importorskip("pyarrow", reason="needs the extra parquet")
    put(tmp_path / "all.parquet", content)
    assert says in refusal_of(open_table, tmp_path)


def test_one_long_caption_in_every_row_of_a_small_file_is_refused_in_little_memory(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    from pyarrow import parquet

    rows = 10_000
    captions = pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), ["a" * 2**20])
    parquet.write_table(pyarrow.table({"image": [b""] * rows, "text": captions}), tmp_path / "all.parquet")
    assert (tmp_path / "all.parquet").stat().st_size < 2**20
    tracemalloc.start()
    assert "expected at most 128 MiB beside the pictures" in refusal_of(open_table, tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**29 and pyarrow.default_memory_pool().max_memory() < 2**30
    tracemalloc.stop()


def test_without_pyarrow_the_refusal_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    put(tmp_path / "all.parquet", b"PAR1")
    assert "pip install -e '.[parquet]'" in refusal_of(open_table, tmp_path)
