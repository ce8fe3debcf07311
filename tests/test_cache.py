r"""What is computed once: pictures, latents and captions in memory-mapped files that follow what they depend on."""

import errno
import json
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import refusal_of
from PIL import Image

from ddpm.celeba.dataset import Pictures, drawn_pictures, fingerprint, photographs
from ddpm.celeba.faces import PER_ROW, drawn_rows, drawn_split, write_celeba
from ddpm.celeba.lists import TEST, TRAIN, VALID, open_table
from ddpm.tools import arrays
from ddpm.tools.arrays import Records, cached_array
from ddpm.tools.errors import UserError
from ddpm.training.caches import Encoded, Latents, Texts, encode_latents
from ddpm.vae import KLVAE


@pytest.fixture
def celeba(tmp_path):
    write_celeba(tmp_path / "celeba", 40, seed=3)
    return tmp_path / "celeba"


def test_an_array_is_filled_once_and_read_from_its_file_after(tmp_path):
    calls = []

    def fill(array):
        calls.append(1)
        array[:] = 7

    for _ in range(2):
        array = cached_array(tmp_path / "a.npy", (3, 2), np.uint8, fill)
        assert isinstance(array, np.memmap) and (array == 7).all()
    assert len(calls) == 1


def test_an_array_with_a_flipped_bit_is_damaged(tmp_path):
    path = tmp_path / "a.npy"
    cached_array(path, (1000,), np.uint8, lambda array: None)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert "its checksum does not fit" in refusal_of(cached_array, path, (1000,), np.uint8, None)


def test_pictures_of_the_same_names_sizes_and_times_are_told_apart_by_their_content(tmp_path):
    keys = set()
    for color in ("red", "blue"):
        folder = tmp_path / color
        folder.mkdir()
        for name in "abcdefgh":
            Image.new("RGB", (16, 16), color).save(folder / f"{name}.bmp")
            os.utime(folder / f"{name}.bmp", (0, 0))
        (folder / "captions.csv").write_text("file,caption\n" + "".join(f"{c}.bmp,{c}\n" for c in "abcdefgh"))
        keys.add(photographs(tmp_path, open_table(folder), size=16).key)
    assert len(keys) == 2


def test_an_array_whose_filling_fails_leaves_nothing_behind(tmp_path):
    def fill(array):
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError):
        cached_array(tmp_path / "a.npy", (3,), np.uint8, fill)
    assert list(tmp_path.iterdir()) == []


def test_drawn_splits_are_of_whole_groups_that_share_a_row_of_attributes():
    split = drawn_split(40 * PER_ROW).reshape(40, PER_ROW)
    assert (split == split[:, :1]).all()
    assert np.bincount(split[:, 0]).tolist() == [36, 2, 2]
    assert drawn_split(50).tolist() == [TRAIN] * 45 + [VALID] * 5  # of few pictures none is test


def test_equal_rows_of_attributes_fall_into_two_splits_by_chance():
    rows = drawn_rows(8000, seed=0)
    split = drawn_split(8000)
    train, valid, test = ({row.tobytes() for row in rows[split == part]} for part in (TRAIN, VALID, TEST))
    assert train & valid and train & test
    held_out = valid | test
    assert len(train & held_out) < 0.15 * len(held_out)  # or these splits would hold little back


def test_pictures_of_equal_attributes_share_their_caption(tmp_path):
    pictures = drawn_pictures(tmp_path, 4 * PER_ROW, seed=0, size=16)
    captions = [pictures.caption(i, seed=0) for i in range(4 * PER_ROW)]
    assert len(set(captions)) <= 4
    assert captions[0] == captions[PER_ROW - 1]
    assert {pictures.caption(0, seed=0, variant=v) for v in range(20)} != {captions[0]}


def test_a_subset_is_these_rows_under_a_key_of_its_own(tmp_path):
    pictures = drawn_pictures(tmp_path, 24, seed=0, size=16)
    part = pictures.subset(np.array([20, 3]))
    assert torch.equal(part.batch(np.arange(2)), pictures.batch(np.array([20, 3])))
    assert part.full_caption(0) == pictures.full_caption(20) and part.split.tolist() == [TRAIN, TRAIN]
    keys = {pictures.key, part.key, pictures.subset(np.array([3, 20])).key}
    assert len(keys) == 3 and pictures.subset(np.array([20, 3])).key == part.key


@pytest.mark.equation("preprocessing")
def test_levels_from_0_to_255_become_numbers_from_minus_one_to_one():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pictures = Pictures(levels, np.ones(1, bool), np.zeros(1, np.uint8), None, ("a ramp",), (), "ramp")
    x = pictures.batch(np.array([0, 0]), flip=torch.tensor([False, True]))
    assert x.shape == (2, 3, 16, 16) and x.dtype == torch.float32
    assert (x[0, 0].flatten() - torch.linspace(-1, 1, 256)).abs().max().item() < 1e-6
    assert torch.equal(x[1], x[0].flip(2))


def test_photographs_are_decoded_once_and_again_when_a_file_changes(celeba, tmp_path):
    def load():
        return photographs(tmp_path / "cache", open_table(celeba), size=32)

    first = load()
    assert first.pixels.shape == (40, 32, 32, 3) and first.good.all()
    assert load().key == first.key
    Image.new("RGB", (64, 64), (255, 0, 0)).save(celeba / "img_align_celeba" / "000001.jpg")
    changed = load()
    assert changed.key != first.key
    assert changed.pixels[0].mean(axis=(0, 1)) == pytest.approx([255, 0, 0], abs=2)


@pytest.mark.parametrize(
    "part, file", [("pictures", "img_align_celeba/000007.jpg"), ("captions", "list_attr_celeba.txt")]
)
def test_the_fingerprint_of_data_names_the_part_that_changed_and_follows_it_elsewhere(
    part, file, celeba, tmp_path
):
    def parts():
        table = open_table(celeba)
        return fingerprint(table, photographs(tmp_path / "cache", table, size=16))

    before = parts()
    celeba = celeba.rename(tmp_path / "elsewhere")
    os.utime(celeba / file, (0, 0))
    assert parts() == before and before.keys() == {"pictures", "captions", "split"}
    if part == "pictures":
        Image.new("RGB", (64, 64)).save(celeba / file)
    else:
        (celeba / file).write_text((celeba / file).read_text().replace(" -1", "  1", 1))
    after = parts()
    assert [name for name in before if after[name] != before[name]] == [part]


@pytest.mark.parametrize("why", ["an HTML page", "a link that leads nowhere"])
def test_a_few_bad_pictures_are_skipped_and_named(celeba, tmp_path, why):
    picture = celeba / "img_align_celeba" / "000002.jpg"
    if "link" in why:
        picture.unlink()
        picture.symlink_to("nowhere.jpg")
    else:
        picture.write_bytes(b"<html>quota exceeded</html>")
    for _ in range(2):
        pictures = photographs(tmp_path / "cache", open_table(celeba), size=16, max_bad=0.1)
        ((name, reason),) = pictures.bad
        assert name.endswith("000002.jpg") and reason.startswith(why)
        assert 1 not in pictures.rows(TRAIN) and not pictures.good[1]
    listing = next((tmp_path / "cache").glob("*.json"))
    assert json.loads(listing.read_text()) == [[name, reason]]
    listing.write_text(json.dumps([["1.jpg", reason]]))
    assert "'1.jpg', which is no picture of the list; delete the file" in refusal_of(
        lambda: photographs(tmp_path / "cache", open_table(celeba), size=16, max_bad=0.1)
    )


def test_too_many_bad_pictures_stop_the_run_and_leave_no_cache(celeba, tmp_path):
    for i in range(1, 11):
        (celeba / "img_align_celeba" / f"{i:06d}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="unreadable pictures of 40.*000001.jpg.*--max-bad-images"):
        photographs(tmp_path / "cache", open_table(celeba), size=16, max_bad=0.1)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_latents_hold_both_ways_round_and_follow_the_weights(tmp_path):
    torch.manual_seed(0)
    pictures = drawn_pictures(tmp_path, 8, seed=0, size=16)
    vae = KLVAE((32, 32), 1, 4)
    latents = encode_latents(tmp_path, vae, pictures)
    rows = np.arange(8)
    for flip in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)):
        with torch.no_grad():
            expected = vae.encode(pictures.batch(rows, flip))
        q = latents.gaussian(rows, flip)
        assert (q.mu - expected.mu).abs().max() < 5e-3  # kept as float16, numbers of size 1
        assert (q.logvar - expected.logvar).abs().max() < 5e-3
    torch.nn.init.normal_(vae.quant_conv.weight)
    assert not torch.equal(encode_latents(tmp_path, vae, pictures).gaussian(rows, flip).mu, q.mu)
    assert isinstance(latents, Latents) and len(list(tmp_path.glob("latents-*.bin"))) == 2


def test_latents_are_encoded_when_first_asked_for_and_do_not_depend_on_the_company(tmp_path):
    torch.manual_seed(0)
    pictures = drawn_pictures(tmp_path, 24, seed=0, size=16)
    vae = KLVAE((32, 32), 1, 4)
    some, other = np.array([3, 20]), np.arange(24)
    g = torch.Generator().manual_seed(0)
    mirrored = torch.rand(24, generator=g) < 0.5
    alone = Latents(Encoded(tmp_path / "a", vae, pictures)).gaussian(some, mirrored[some])
    with mock.patch.object(KLVAE, "encode", autospec=True, side_effect=KLVAE.encode) as encode:
        latents = Latents(Encoded(tmp_path / "b", vae, pictures))
        assert not encode.called
        among = latents.gaussian(other, mirrored)
        assert encode.call_count == 3  # eight at a time
        again = Latents(Encoded(tmp_path / "b", vae, pictures)).gaussian(other, mirrored)
        assert encode.call_count == 3
    assert torch.equal(again.mu, among.mu) and torch.equal(again.logvar, among.logvar)
    assert torch.equal(alone.mu, among.mu[some]) and torch.equal(alone.logvar, among.logvar[some])


def test_captions_are_embedded_once_and_come_back_as_the_tower_gives_them(tmp_path, tower):
    texts = Texts(tmp_path, tower, ["a man", "a woman", "a man"])
    with mock.patch.object(texts, "embed", side_effect=texts.embed) as embed:
        assert (
            texts(["a woman", "a man"]) - tower(["a woman", "a man"])
        ).abs().max() < 5e-3  # kept as float16
        assert not embed.called
        for _ in range(2):
            assert (texts(["never seen", ""]) - tower(["never seen", ""])).abs().max() < 5e-3
        assert embed.call_count == 1


@pytest.mark.slow
def test_captions_may_be_embedded_in_bf16_and_are_kept_apart(tmp_path, tower):
    sentences = ["a smiling young man with black hair", "an older woman wearing a hat", "a bald man"]
    exact = Texts(tmp_path, tower, sentences, "fp32")(sentences)
    rounded = Texts(tmp_path, tower, sentences, "bf16")(sentences)
    apart = (exact - exact.mean(0)).norm()
    assert 1e-4 * apart < (rounded - exact).norm() < 0.03 * apart
    assert len(list(tmp_path.glob("texts-*.bin"))) == 2
    through = Texts(tmp_path, tower, sentences, "bf16", limit_gb=0.0)(sentences)
    assert (through - rounded).norm() < 0.03 * apart and through.dtype == torch.float32


@pytest.mark.parametrize("limit_gb", [8.0, 0.0])
def test_captions_that_are_cut_are_one_warning_with_an_example(tmp_path, tower, limit_gb):
    long = [f"{'man ' * 75}{i}" for i in range(3)]
    with pytest.warns(UserWarning) as warned:
        texts = Texts(tmp_path, tower, limit_gb=limit_gb)
        texts(["a man", *long[:2]])
        texts(long)
    (warning,) = warned
    assert str(warning.message).startswith(
        "a prompt of 76 tokens is cut to 75; left out: '0'; other long ones"
    )


def test_captions_without_a_file_go_through_the_tower(tmp_path, tower):
    texts = Texts(tmp_path, tower, ["a man", "a woman"], limit_gb=0.0)
    assert texts.records is None and not list(tmp_path.iterdir())
    assert torch.equal(texts(["a man"]), tower(["a man"]))


# -------------------------------------------------------------------- files that fill themselves


def counted(path, shape=(5,), places=lambda key: [key]):
    r"""Records of ten times the key, and the keys that were computed."""
    made = []

    def make(keys):
        made.extend(dict.fromkeys(keys))
        return np.stack([np.full(shape, 10 * key) for key in keys])

    return Records(path, shape, np.float16, places, make), made


def test_records_are_made_when_asked_for_and_found_by_the_next_process(tmp_path):
    path = tmp_path / "new" / "a.bin"
    records, made = counted(path)
    assert records([7, 3, 7])[:, 0].tolist() == [70, 30, 70] and made == [7, 3]
    other, made_there = counted(path)
    assert other([3, 4])[:, 0].tolist() == [30, 40] and made_there == [4]
    assert records([4])[0, 0] == 40 and made == [7, 3]
    assert path.stat().st_size == 8 * records.length  # up to the last that was written, with holes


@pytest.mark.parametrize("harm", ["cut", "flip", "swap"])
def test_a_record_that_is_cut_damaged_or_of_another_key_is_made_again(tmp_path, harm):
    path = tmp_path / "a.bin"
    records, made = counted(path)
    records([0, 1])
    data = bytearray(path.read_bytes())
    length = records.length
    if harm == "cut":
        data = data[:-1]
    elif harm == "flip":
        data[length + 7] ^= 1
    else:
        data[length:] = data[:length]
    path.write_bytes(data)
    assert records([0, 1])[:, 0].tolist() == [0, 10] and made == [0, 1, 1]
    assert counted(path)[0]([1])[0, 0] == 10


def test_keys_that_share_their_places_take_turns_and_are_never_confused(tmp_path):
    records, made = counted(tmp_path / "a.bin", places=lambda key: [0, 1])
    for _ in range(2):
        assert records([1, 2, 3])[:, 0].tolist() == [10, 20, 30]
    assert made[:3] == [1, 2, 3] and 2 not in made[3:]  # the third took the place of the first


def test_a_file_that_cannot_be_written_is_one_warning_and_no_more(tmp_path, monkeypatch):
    records, made = counted(tmp_path / "a.bin")

    def full(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records, "file", mock.Mock(read=lambda n: b"", write=full))
    with pytest.warns(UserWarning, match="could not write .*a.bin: No space left.*computed again") as warned:
        assert records([1, 2])[:, 0].tolist() == records([1, 2])[:, 0].tolist() == [10, 20]
    assert len(warned) == 1 and made == [1, 2, 1, 2]
    records, made = counted(tmp_path / "c.bin")
    monkeypatch.setattr(arrays.shutil, "disk_usage", lambda folder: SimpleNamespace(free=records.length))
    assert len(records([1, 2])) == 2
    with pytest.warns(
        UserWarning, match="could not write .*c.bin: the rest of its disk is left to checkpoints"
    ):
        records([3])
    (tmp_path / "b.bin").mkdir()
    assert "could not open" in refusal_of(counted, tmp_path / "b.bin")
