import errno
import gc
import os
import resource
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import refusal_of

import ddpm.tools.files
from ddpm.tools.arrays import cached_array
from ddpm.tools.files import (
    CannotWrite,
    check_new_folder,
    digest_of,
    flock,
    new_folder,
    remove_leftovers,
    write_atomically,
)
from ddpm.training.run_folder import save_state

MEGABYTE = 2**20


@pytest.fixture
def small_disk(tmp_path):
    r"""A disk of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("only root can mount a small disk, and not in every container")
    yield disk
    gc.collect()
    subprocess.run(["umount", "-l", disk], check=True)  # a mapping may still wait for the collector


@pytest.fixture
def limited():
    r"""No file may grow beyond one megabyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEGABYTE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "bytes": lambda path: write_atomically(path, bytes(3 * MEGABYTE)),
    "state": lambda path: write_atomically(
        path, lambda to: save_state(to, {"x": torch.zeros(3 * MEGABYTE // 4)})
    ),
    "cache": lambda path: cached_array(path, (3, MEGABYTE), np.uint8, lambda array: array.fill(1)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_is_told_with_what_is_needed_and_what_is_free(kind, small_disk):
    path = small_disk / "state.pt"
    if kind != "cache":
        path.write_bytes(b"old")
    refusal = refusal_of(lambda: WRITERS[kind](path))
    assert "could not write" in refusal and os.strerror(errno.ENOSPC) in refusal and "are free" in refusal
    if kind != "state":  # where the size is not known before, what was written so far is given
        assert "needs 3.1 MB, 1.0 MB are free" in refusal
    assert [p.read_bytes() for p in small_disk.iterdir()] == ([] if kind == "cache" else [b"old"])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_limit_on_a_files_size_leaves_the_old_file(kind, limited, tmp_path):
    refusal = refusal_of(lambda: WRITERS[kind](tmp_path / "state.pt"))
    assert os.strerror(errno.EFBIG) in refusal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("at", ["open", "write", "fsync", "rename"])
def test_a_fault_at_any_point_of_writing_leaves_the_old_file_and_is_one_line(
    number, at, tmp_path, monkeypatch
):
    path = tmp_path / "state.pt"
    write_atomically(path, b"old")

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    content = fail if at == "write" else lambda to: to.write_bytes(b"new")
    if at == "open":
        monkeypatch.setattr(ddpm.tools.files, "_held", fail)
    elif at != "write":
        monkeypatch.setattr(ddpm.tools.files.os, {"fsync": "fsync", "rename": "replace"}[at], fail)
    refusal = refusal_of(lambda: write_atomically(path, content))
    assert os.strerror(number) in refusal and str(path) in refusal
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state.pt"]


def test_other_faults_are_not_taken_for_a_full_disk(tmp_path):
    def fail(to):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="ours"):
        write_atomically(tmp_path / "x", fail)


def test_a_folder_that_is_not_there_or_a_folder_in_the_files_place_is_one_line(tmp_path):
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "none" / "x", tmp_path / "taken"):
        assert f"could not write {path}" in refusal_of(write_atomically, path, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_safetensors_own_error_is_understood(tmp_path, limited):
    from safetensors.torch import save_file

    with pytest.raises(CannotWrite, match=os.strerror(errno.EFBIG)):
        write_atomically(tmp_path / "x", lambda to: save_file({"x": torch.zeros(MEGABYTE)}, to))


def test_the_file_before_is_kept_where_it_is_asked_for(tmp_path):
    path, keep = tmp_path / "state.pt", tmp_path / "before"
    write_atomically(path, b"1")
    write_atomically(path, b"2", keep=keep)
    assert (path.read_bytes(), keep.read_bytes()) == (b"2", b"1")


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    mine, other = tmp_path / ".a.npy.7.0123abcd.tmp", tmp_path / ".a.npy.8.0123abcd.tmp"
    foreign = tmp_path / ".editor.tmp"
    for path in (mine, other, foreign):
        path.write_bytes(b"half")
    with open(mine, "rb+") as file:
        if flock(file) is None:
            pytest.skip("no locks here")
        remove_leftovers(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([mine, foreign])
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_file_that_is_being_written_is_no_leftover(tmp_path):
    def content(to):
        to.write_bytes(b"half")
        remove_leftovers(tmp_path)
        assert to.exists()
        to.write_bytes(b"whole")

    write_atomically(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == b"whole"


def test_a_file_that_is_taken_away_before_it_is_locked_is_begun_again(tmp_path, monkeypatch):
    calls = []

    def late(file):
        calls.append(file.name)
        if len(calls) == 1:
            monkeypatch.setattr(ddpm.tools.files, "flock", flock)
            remove_leftovers(tmp_path)
            monkeypatch.setattr(ddpm.tools.files, "flock", late)
            assert flock(file) is None or os.listdir(tmp_path) == []
        return flock(file)

    monkeypatch.setattr(ddpm.tools.files, "flock", late)
    write_atomically(tmp_path / "x", lambda to: os.truncate(to, 5))
    assert len(calls) == 2 and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_folder_appears_whole(tmp_path, there):
    target = tmp_path / "a" / "b"
    if there:
        target.mkdir(parents=True)
    with new_folder(target) as folder:
        (folder / "file").write_text("whole")
        assert not (target / "file").exists()
        written = folder.stat().st_ino
    assert target.stat().st_ino == written  # renamed, not copied
    assert (target / "file").read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_or_is_a_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        assert str(taken) in refusal_of(check_new_folder, taken)
        refusal = refusal_of(new_folder(taken).__enter__)
        assert (
            refusal == f"expected a new or empty folder, got {taken}, which is there already; choose another"
        )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_a_digest_sees_every_value_name_kind_and_shape():
    base = {"a": torch.zeros(2, 3), "b": [1, 2.0, "x", None, True], "c": {}}
    others = [
        {**base, "a": torch.zeros(3, 2)},
        {**base, "a": torch.zeros(2, 3, dtype=torch.float64)},
        {**base, "a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
        {**base, "b": [1, 2, "x", None, True]},
        {**base, "b": [1, 2.0, "x", None, 1]},
        {**base, "b": [1, 2.0, "x"], "c": {}},
        {"a": base["a"], "b": base["b"], "d": {}},
        {"a": base["a"], "b": base["b"], "c": []},
    ]
    digests = [digest_of(value) for value in (base, *others)]
    assert len(set(digests)) == len(digests)
    assert (
        digest_of({**base, "a": torch.zeros(3, 2).t()}) == digests[0]
    )  # the layout in memory does not count
    assert digest_of(torch.zeros(2, dtype=torch.bfloat16)) != digest_of(torch.zeros(2, dtype=torch.float16))
