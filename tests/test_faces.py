r"""Drawn faces: every visible attribute is seen, rows tell the truth, files have CelebA's layout."""

import numpy as np
import pytest
from PIL import Image

from ddpm.celeba.captions import ATTRIBUTES, consistent
from ddpm.celeba.dataset import drawn_pictures, photographs
from ddpm.celeba.faces import (
    HAIRS,
    PER_ROW,
    VISIBLE,
    draw_face,
    draw_many,
    drawn_rows,
    main,
    random_attributes,
    write_celeba,
)
from ddpm.celeba.lists import open_table
from ddpm.tools.command import exit_code

WOMAN = {"Young": True, "No_Beard": True, "Brown_Hair": True}
MAN = WOMAN | {"Male": True}
OF_MEN = ("Goatee", "Mustache", "No_Beard")


def pixels_changed(off, on, seed):
    difference = np.abs(draw_face(off, seed).astype(int) - draw_face(on, seed).astype(int))
    return int((difference.max(axis=2) > 30).sum())


def named(row):
    return {name for name, value in zip(ATTRIBUTES, row, strict=True) if value}


def test_the_same_arguments_give_the_same_bytes_and_the_global_generator_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].tobytes()
    first = draw_face(MAN, 7)
    assert first.dtype == np.uint8 and first.shape == (64, 64, 3)
    assert first.tobytes() == draw_face(MAN, 7).tobytes() != draw_face(MAN, 8).tobytes()
    assert np.random.get_state()[1].tobytes() == before
    row = np.array([int(name in MAN) for name in ATTRIBUTES])
    assert np.array_equal(draw_face(row, [7]), first) and np.array_equal(draw_face(list(row), 7), first)


@pytest.mark.parametrize("name", VISIBLE)
def test_a_visible_attribute_changes_the_picture(name):
    for base in (MAN,) if name in OF_MEN else (WOMAN, MAN):
        plain = base | dict.fromkeys(HAIRS, False) if name in HAIRS else base
        for seed in range(8):
            assert pixels_changed(plain | {name: False}, plain | {name: True}, seed) >= 15, (base, seed)


@pytest.mark.parametrize("colour", HAIRS)
def test_a_beard_of_any_colour_is_seen_on_every_skin(colour):
    man = MAN | {"Brown_Hair": False, colour: True}
    for beard in ({"Mustache": True}, {"Goatee": True}, {"No_Beard": False}):
        for seed in range(24):
            assert pixels_changed(man, man | beard, seed) >= 12, (beard, seed)


@pytest.mark.parametrize("hat", [False, True])
@pytest.mark.parametrize("base", [WOMAN, MAN], ids=["woman", "man"])
def test_the_four_hair_colours_differ_with_and_without_a_hat(base, hat):
    faces = [base | dict.fromkeys(HAIRS, False) | {colour: True, "Wearing_Hat": hat} for colour in HAIRS]
    for i, face in enumerate(faces):
        assert all(pixels_changed(face, other, seed) >= 15 for other in faces[:i] for seed in range(4))


def test_an_attribute_changes_nothing_but_its_own_part():
    with_hat = MAN | {"Wearing_Hat": True, "Eyeglasses": True}
    assert np.array_equal(draw_face(MAN, 5)[50:], draw_face(with_hat, 5)[50:])
    corners = [draw_face(face, 5)[:4, :4] for face in (WOMAN, MAN, with_hat, {"Bald": True}, {})]
    assert all(np.array_equal(corners[0], corner) for corner in corners)


@pytest.mark.parametrize("size", [16, 32, 50, 128])
def test_other_sizes_draw_the_same_face(size):
    small = Image.fromarray(draw_face(WOMAN, 1, size)).resize((16, 16), Image.Resampling.BOX)
    usual = Image.fromarray(draw_face(WOMAN, 1)).resize((16, 16), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(usual, float)).mean() < 6


def test_random_rows_are_consistent_hide_nothing_and_have_enough_of_each_attribute_to_learn():
    rows = drawn_rows(2000, seed=1, per_row=1)
    for row in rows:
        has = named(row)
        assert np.array_equal(row, consistent(row)) and has <= set(VISIBLE)
        assert len(has & set(HAIRS)) == ("Bald" not in has)
        assert not has >= {"Bald", "Wearing_Hat"} and not has >= {"Bangs", "Wearing_Hat"}
        assert not has >= {"Straight_Hair", "Wavy_Hair"}
        assert "Male" in has or "No_Beard" in has
    men = rows[rows[:, ATTRIBUTES.index("Male")] == 1]
    for name in VISIBLE:
        fraction = (men if name in OF_MEN else rows)[:, ATTRIBUTES.index(name)].mean()
        assert 0.08 < fraction < 0.92, (name, fraction)


def test_a_row_depends_on_its_number_alone():
    many = drawn_rows(100, seed=4)
    assert many.shape == (100, 40) and many.dtype == np.uint8
    assert np.array_equal(many[:19], drawn_rows(19, seed=4))
    assert np.array_equal(many[2 * PER_ROW], random_attributes(np.random.default_rng([4, 2])))
    assert (many.reshape(-1, PER_ROW, 40) == many[::PER_ROW, None]).all()
    assert not np.array_equal(many, drawn_rows(100, seed=5))
    assert drawn_rows(0, seed=0).shape == (0, 40)


def test_a_picture_depends_on_seed_number_and_row_alone():
    rows = drawn_rows(12, seed=6)
    pictures = list(draw_many(rows, seed=6))
    assert np.array_equal(pictures[9], next(draw_many(rows[9:], seed=6, start=9)))
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    "row",
    [
        {},
        dict.fromkeys(ATTRIBUTES, True),
        {"Bald": True, "Bangs": True, "Black_Hair": True, "Wearing_Hat": True},
        {"Black_Hair": True, "Blond_Hair": True, "Straight_Hair": True, "Wavy_Hair": True},
        {"Male": True, "No_Beard": True, "Goatee": True, "Mustache": True},
    ],
)
def test_contradictory_rows_draw_what_their_sentence_says(row):
    assert np.array_equal(draw_face(row, 2), draw_face(consistent(row), 2))
    assert draw_face(row, 2).std() > 20


def test_written_faces_are_those_of_data_drawn_in_the_official_layout(tmp_path, capsys):
    folder = tmp_path / "faces"
    main([str(folder), "--count", "80", "--seed", "3", "--size", "32"])
    assert "80 faces" in capsys.readouterr().out
    drawn = drawn_pictures(tmp_path, 80, seed=3, size=32)
    written = photographs(tmp_path, open_table(folder), size=32)
    np.testing.assert_array_equal(written.attributes, drawn.attributes)
    np.testing.assert_array_equal(written.split, drawn.split)
    assert np.bincount(written.split).tolist() == [72, 4, 4]
    assert [written.caption(i, 0) for i in range(80)] == [drawn.caption(i, 0) for i in range(80)]
    assert np.abs(written.pixels.astype(float) - drawn.pixels).mean() < 4  # by JPEG
    lines = (folder / "list_attr_celeba.txt").read_bytes().split(b"\r\n")
    assert lines[0] == b"80" and lines[-1] == b"" and len(lines) == 83
    assert lines[1] == " ".join(ATTRIBUTES).encode() + b" "
    values = drawn.attributes[0]
    assert lines[2] == b"000001.jpg" + b"".join(b"  1" if value else b" -1" for value in values)
    assert (folder / "list_eval_partition.txt").read_bytes().startswith(b"000001.jpg 0\r\n000002.jpg 0\r\n")


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("a thesis")
    assert exit_code(main, [str(tmp_path), "--count", "2"]) == 2
    error = capsys.readouterr().err
    assert "expected a new or empty folder, got" in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_errors_name_what_was_expected_and_what_was_given(tmp_path):
    with pytest.raises(ValueError, match=r"expected 40 .*\(39,\)"):
        draw_face([0] * 39, 0)
    with pytest.raises(ValueError, match="at least 16 pixels, got 8"):
        draw_face({}, 0, size=8)
    with pytest.raises(ValueError, match="got count -1"):
        drawn_rows(-1, seed=0)
    for bad in ({"count": 0}, {"count": 1, "size": 8}, {"count": 1, "seed": -1}):
        with pytest.raises(ValueError, match="expected .* got"):
            write_celeba(tmp_path / "new", **bad)
    assert not (tmp_path / "new").exists()
