r"""Grids, films and PNG text: pixels at their place, labels that fit, words that come back."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from ddpm.tools.grids import INK, PAPER, _wrapped, labelled_grid, save_gif, save_png, strip, to_uint8

FONT = ImageFont.load_default(12)


def grey(*values, side=16):
    r"""One plain picture for each value in [-1, 1]."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, side, side).clone()


def pixels(image):
    return np.asarray(image.convert("RGB"))


def test_minus_one_is_black_one_is_white_and_every_level_between_comes_back():
    values = [-1.0, 1.0, -2.0, 3.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5]
    assert to_uint8(grey(*values))[:, 0, 0, 0].tolist() == [0, 255, 0, 255, 1, 2]
    levels = torch.arange(256.0)[None, None, :, None].expand(1, 3, 256, 1)
    assert np.array_equal(to_uint8(levels / 127.5 - 1)[0, :, 0, 0], np.arange(256))


def test_channels_go_last_and_keep_their_order():
    x = torch.zeros(2, 3, 4, 5)
    x[1, 0], x[1, 1], x[1, 2] = -1.0, 0.2, 1.0
    array = to_uint8(x.requires_grad_().bfloat16())
    assert array.shape == (2, 4, 5, 3) and array.dtype == np.uint8
    assert array[1, 2, 3].tolist() == [0, 153, 255]


@pytest.mark.parametrize(
    "count, columns, across, down",
    [(0, None, 1, 0), (1, None, 1, 1), (6, None, 3, 2), (99, None, 8, 13), (5, 2, 2, 3), (3, 9, 3, 1)],
)
def test_a_grid_is_as_large_as_its_pictures_its_labels_and_the_gaps(count, columns, across, down):
    sheet = labelled_grid(torch.zeros(count, 3, 16, 16), ["a bald man"] * count, columns, side=128)
    assert sheet.size == (across * (128 + 8) + 8, down * (128 + 14 + 8) + 8)  # the label is one line


def test_every_picture_stands_at_its_place_row_by_row():
    values = (-1.0, -0.5, 0.0, 0.5, 1.0)
    sheet = pixels(labelled_grid(grey(*values), [""] * 5, columns=3, side=32))
    for i, value in enumerate(to_uint8(grey(*values))[:, 0, 0, 0].tolist()):
        left, top = 8 + i % 3 * 40, 8 + i // 3 * 40
        assert (sheet[top : top + 32, left : left + 32] == value).all()
    assert (sheet[48:80, 88:120] == PAPER).all()  # the sixth place is empty
    assert (sheet[:8] == PAPER).all() and (sheet[:, :8] == PAPER).all()


def test_pictures_larger_than_the_side_keep_their_size():
    assert labelled_grid(torch.zeros(1, 3, 48, 64), [""], side=32).size == (64 + 16, 48 + 16)


def test_the_label_is_written_beneath_its_own_picture():
    sheet = pixels(labelled_grid(grey(-1.0, -1.0), ["", "a bald man"], columns=2, side=64))
    bright = (sheet.astype(int).sum(axis=2) > 3 * 128).nonzero()
    assert len(bright[0]) > 20
    assert bright[0].min() >= 8 + 64  # below the pictures
    assert bright[1].min() >= 8 + 64 + 8  # under the second
    assert bright[1].max() < 8 + 64 + 8 + 64
    assert (sheet[bright].max(axis=0) <= INK).all()


def test_a_number_of_labels_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a label for each of 3 pictures, got 2"):
        labelled_grid(torch.zeros(3, 3, 8, 8), ["a", "b"])


@pytest.mark.parametrize("label", ["a smiling woman with blond hair and eyeglasses", "w" * 80, "man " * 200])
def test_the_lines_of_a_label_are_no_wider_than_the_picture_and_six_at_most(label):
    lines = _wrapped(label, FONT, 128)
    assert 1 <= len(lines) <= 6
    assert all(FONT.getlength(line) <= 128 for line in lines)
    assert (" ".join(lines) == label) == label.startswith("a smiling")  # a long one ends in dots
    assert lines[-1].endswith("...") == label.startswith("man ")


@pytest.mark.parametrize(
    "label", ["a\tbald\r\nman\x00\x1b[31m", "\u202ea bald man\u200b", "éñ 漢字 🙂", "\n", ""]
)
def test_control_characters_in_a_label_become_spaces_and_nothing_breaks(label):
    lines = _wrapped(label, FONT, 128)
    assert all(character.isprintable() for line in lines for character in line)
    labelled_grid(torch.zeros(1, 3, 8, 8), [label])


def test_png_text_comes_back_as_it_was(tmp_path):
    text = {"prompt": '["a bald man", "漢字 🙂 é"]', "seed": "0", "negative": "", "note": "two\nlines"}
    image = labelled_grid(grey(0.0, 1.0), ["a", "b"])
    save_png(tmp_path / "a.png", image, text)
    with Image.open(tmp_path / "a.png") as read:
        assert read.format == "PNG"
        assert dict(read.text) == text
        assert np.array_equal(pixels(read), pixels(image))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_film_as_a_strip_has_a_row_a_prompt_and_a_column_a_step():
    frames = [grey(-1.0, 0.0), grey(-0.5, 0.5), grey(0.2, 1.0)]
    sheet = pixels(strip(frames, side=32))
    assert sheet.shape == (2 * 32, 3 * 32, 3)
    for k, frame in enumerate(frames):
        for b, value in enumerate(to_uint8(frame)[:, 0, 0, 0].tolist()):
            assert (sheet[32 * b : 32 * b + 32, 32 * k : 32 * k + 32] == value).all()


def test_a_film_as_a_gif_has_every_frame_and_stays_on_its_last(tmp_path):
    save_gif(tmp_path / "a.gif", [grey(-1.0), grey(0.0), grey(1.0)], ["a bald man"], milliseconds=120)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3
        durations, middles = [], []
        for k in range(3):
            film.seek(k)
            durations.append(film.info["duration"])
            middles.append(int(pixels(film)[40, 40, 0]))
        assert film.info["loop"] == 0
    assert durations == [120, 120, 2000]
    assert middles == pytest.approx([0, 128, 255], abs=4)  # a GIF has 256 colours
