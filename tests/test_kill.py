r"""Runs that are killed and resumed: real signals to real processes, forked from one that has imported everything.

The trials run in a process of their own, since autograd does not work in the children of a process that has used it.
"""

import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

KILLS = 50
TESTS = Path(__file__).parent


def test_a_run_killed_at_any_moment_goes_on_to_the_same_end_bit_for_bit():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    }
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print("\nkilled", json.dumps(told, indent=1))
    assert sum(told["killed while"].values()) == KILLS
    writing = [name for name in told["killed while"] if name.startswith("writing ")]
    assert {"writing state.pt", "writing metrics.csv"} <= set(writing) and len(writing) > 5


# ------------------------------------------------------------- in the process that forks; the above never gets here


class Board:
    r"""What a child wrote before it was killed, in memory that it shares with its parent."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 256)

    def clear(self):
        self.memory[:] = bytes(256)

    doing = property(
        lambda self: self.memory[16:128].rstrip(b"\0").decode(),
        lambda self, text: self.memory.__setitem__(slice(16, 128), text.encode()[:112].ljust(112, b"\0")),
    )
    saved = property(  # how far the newest checkpoint is
        lambda self: struct.unpack("ii", self.memory[0:8]),
        lambda self, place: self.memory.__setitem__(slice(0, 8), struct.pack("ii", *place)),
    )
    began = property(  # from how far a run went on
        lambda self: struct.unpack("ii", self.memory[8:16]),
        lambda self, place: self.memory.__setitem__(slice(8, 16), struct.pack("ii", *place)),
    )


BOARD = Board()


def watch():
    r"""Have the program tell on the board what it does."""
    import ddpm.cache

    import ddpm.model
    import ddpm.tools.files
    import ddpm.tools.grids
    import ddpm.training.run
    from ddpm.training.optimization import Optimization

    def doing(what, function):
        def told(*arguments, **more):
            before, BOARD.doing = BOARD.doing, what(*arguments)
            result = function(*arguments, **more)
            BOARD.doing = before
            return result

        return told

    write = doing(
        lambda path, *_: f"writing {path.name.split('-')[0].split('_')[0]}", ddpm.tools.files.write_atomically
    )
    for module in (ddpm.cache, ddpm.model, ddpm.tools.grids, ddpm.training.run):
        module.write_atomically = write
    Optimization.update = doing(lambda self, stage, *_: f"{stage} step", Optimization.update)
    save, reopen = ddpm.training.run.Run.save, ddpm.training.run.Run._reopen

    def place(saved) -> tuple[int, int]:
        return (0, 0) if saved is None else (ddpm.training.run.STAGES.index(saved[0]), saved[1])

    def saved(self, *arguments, **more):
        save(self, *arguments, **more)
        BOARD.saved = place(self.saved)

    def reopened(self):
        reopen(self)
        BOARD.began = BOARD.saved = place(self.saved)

    ddpm.training.run.Run.save, ddpm.training.run.Run._reopen = saved, reopened


def aim(name: str, number: int, after: bool):
    r"""Kill this process before or after call `number` of os.`name`; before an fsync the file is cut to its half."""
    function, count = getattr(os, name), [0]

    def counted(*arguments):
        count[0] += 1
        if count[0] == number and not after:
            if name == "fsync":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        function(*arguments)
        if count[0] == number and after:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, counted)


def child(arguments, prepare=lambda: None) -> int:
    r"""A process that trains; its id."""
    from small_runs import run_train

    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        prepare()
        code = run_train(*arguments)
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    r"""The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trials:
    def __init__(self, root: Path):
        from small_runs import FP32, QUICK

        self.root, self.begin, self.rng = root, [*QUICK, *FP32, "--max-steps", 4], random.Random(0)
        self.killed, self.calls = Counter(), {"replace": 25, "fsync": 22, "posix_fallocate": 3}
        self.commands, self.whole = 0, root / "whole" / "run"
        began = time.monotonic()
        assert end_of(child([*self.begin, "--out", self.whole])) == 0
        self.seconds = time.monotonic() - began

    def arguments(self, folder: Path) -> list:
        if (folder / "config.json").exists():
            return ["--resume", folder, "--device", "cpu"]
        return [*self.begin, "--out", folder]

    def start(self, folder: Path, prepare=lambda: None) -> int:
        BOARD.clear()
        self.commands += 1
        return child(self.arguments(folder), prepare)

    def finish(self, folder: Path):
        from small_runs import assert_same_run, leftovers

        assert end_of(self.start(folder)) == 0, folder
        assert_same_run(folder, self.whole)
        assert leftovers(folder.parent) == []

    def kill(self, folder: Path, aimed: bool):
        r"""Start or resume the run and kill it."""
        before = self.arguments(folder)[0] == "--resume"
        if aimed:
            name = self.rng.choice(["replace", "replace", "fsync", "posix_fallocate"])
            number, after = self.rng.randint(1, self.calls[name]), self.rng.random() < 0.5
            pid = self.start(folder, lambda: aim(name, number, after))
        else:
            pid = self.start(folder)
            time.sleep(self.rng.random() * self.seconds)
            os.kill(pid, signal.SIGKILL)
        if end_of(pid) != -signal.SIGKILL:
            return  # it came to its end before
        self.killed[BOARD.doing or ("between" if before else "before the first write")] += 1
        reached, resumed = BOARD.saved, (folder / "config.json").exists()
        if resumed:  # at most the steps since the last checkpoint are repeated
            from ddpm.config import Config
            from ddpm.training.run import Run

            with Run(folder, Config.read(folder / "config.json"), True, 0.0):
                assert BOARD.began >= reached, (BOARD.began, reached)

    def kills(self, count: int):
        number = 0
        while sum(self.killed.values()) < count:
            folder = self.root / f"trial{number}" / "run"
            for _ in range(self.rng.choice([2, 3, 4])):
                if sum(self.killed.values()) < count:
                    self.kill(folder, aimed=number % 2 == 0)
            self.finish(folder)
            number += 1

    @staticmethod
    def lives(pid: int) -> bool:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def signals(self):
        r"""SIGTERM saves and leaves; a second Ctrl-C leaves at once; both go on to the same end."""
        from small_runs import wait_for

        from ddpm.training.optimization import Optimization

        update = Optimization.update

        def stuck(self, *arguments):
            report = update(self, *arguments)
            if self.step == 3:
                BOARD.doing = "stuck"
                time.sleep(1.0 if self.ema is None else 1000)
            return report

        folder = self.root / "signals" / "run"
        pid = self.start(folder, lambda: setattr(Optimization, "update", stuck))
        wait_for(lambda: BOARD.doing == "stuck")
        os.kill(pid, signal.SIGTERM)
        assert end_of(pid) == 143 and BOARD.saved == (0, 3)
        pid = self.start(folder, lambda: setattr(Optimization, "update", stuck))
        wait_for(lambda: BOARD.doing == "stuck")
        while self.lives(pid):  # two that come before the first is seen count as one
            os.kill(pid, signal.SIGINT)
            time.sleep(0.05)
        assert end_of(pid) == -signal.SIGINT and BOARD.saved == (1, 2)
        self.finish(folder)

    def shared(self):
        r"""Two trainings at a time share their cache, and a third process cleans in it."""
        from small_runs import assert_same_run

        from ddpm.tools.files import remove_leftovers

        folders = [self.root / "shared" / name for name in ("a", "b")]
        pids = [self.start(folder) for folder in folders]
        while any(self.lives(pid) for pid in pids):
            remove_leftovers(self.root / "shared" / "cache")
            time.sleep(0.002)
        assert [end_of(pid) for pid in pids] == [0, 0]
        for folder in folders:
            assert_same_run(folder, self.whole)


def main():
    import matplotlib.figure  # noqa: F401
    import torch
    import torch._dynamo
    from small_runs import make_runs_cheap

    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell's background job comes with these ignored
        signal.signal(signum, signal.SIG_DFL)
    torch.set_num_threads(1)
    make_runs_cheap(pytest.MonkeyPatch())
    watch()
    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(Path(folder))
        trials.signals()
        trials.shared()
        trials.kills(KILLS)
    print(json.dumps({"killed while": dict(trials.killed.most_common()), "commands": trials.commands}))


if __name__ == "__main__":
    main()
