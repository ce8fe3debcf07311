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


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end_bit_for_bit():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=os.environ | paths, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print("\nkilled", json.dumps(result, indent=1))
    assert sum(result["killed while"].values()) == KILLS
    writing = [name for name in result["killed while"] if name.startswith("writing ")]
    assert {"writing state.pt", "writing metrics.csv"} <= set(writing) and len(writing) > 5


# ------------------------------------------------------------- in the process that forks; the above never gets here


class Board:
    r"""What a child wrote before it was killed, in memory that it shares with its parent."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 256)

    def clear(self):
        self.memory[:] = bytes(256)

    @property
    def doing(self) -> str:
        return self.memory[16:128].rstrip(b"\0").decode()

    @doing.setter
    def doing(self, text: str):
        self.memory[16:128] = text.encode()[:112].ljust(112, b"\0")

    @property
    def saved(self) -> tuple[int, int]:
        r"""Stage and step of the newest checkpoint."""
        return struct.unpack("ii", self.memory[0:8])

    @saved.setter
    def saved(self, place: tuple[int, int]):
        self.memory[0:8] = struct.pack("ii", *place)


BOARD = Board()


def watch():
    r"""Have the program write on the board what it does."""
    import ddpm.model
    import ddpm.tools.arrays
    import ddpm.tools.grids
    import ddpm.tools.weights
    from ddpm.training import run_folder
    from ddpm.training.optimization import Optimization

    def doing(what, function):
        def watched(*arguments, **more):
            before, BOARD.doing = BOARD.doing, what(*arguments)
            result = function(*arguments, **more)
            BOARD.doing = before
            return result

        return watched

    def kind(path, *_):
        return f"writing {path.name.split('-')[0].split('_')[0]}"

    write = doing(kind, run_folder.write_atomically)
    for module in (ddpm.model, ddpm.tools.arrays, ddpm.tools.grids, ddpm.tools.weights, run_folder):
        module.write_atomically = write
    Optimization.end_step = doing(lambda *_: "a step", Optimization.end_step)
    save = run_folder.Run.save

    def saved(run, *arguments, **more):
        save(run, *arguments, **more)
        BOARD.saved = run_folder.STAGES.index(run.saved[0]), run.saved[1]

    run_folder.Run.save = saved


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


def lives(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def newest(folder: Path) -> tuple[int, int]:
    r"""Stage and step from which a run would go on."""
    from ddpm.config import Config
    from ddpm.training.run_folder import STAGES, Run

    with Run(folder, Config.read(folder / "config.json"), True, 0.0) as run:
        return (0, 0) if run.saved is None else (STAGES.index(run.saved[0]), run.saved[1])


class Trials:
    def __init__(self, root: Path):
        from small_runs import FP32, QUICK

        self.root, self.begin, self.rng = root, [*QUICK, *FP32, "--max-steps", 4], random.Random(0)
        self.killed, self.calls = Counter(), {"replace": 25, "fsync": 22, "posix_fallocate": 3}
        self.commands, self.whole = 0, root / "whole" / "run"
        began = time.monotonic()
        assert end_of(child([*self.begin, "--out", self.whole])) == 0
        self.seconds = time.monotonic() - began

    def start(self, folder: Path, prepare=lambda: None) -> int:
        r"""Start the run, or resume it where there is one."""
        BOARD.clear()
        self.commands += 1
        if (folder / "config.json").exists():
            BOARD.saved = newest(folder)
            return child(["--resume", folder, "--device", "cpu"], prepare)
        return child([*self.begin, "--out", folder], prepare)

    def finish(self, folder: Path):
        from small_runs import assert_same_run, leftovers

        assert end_of(self.start(folder)) == 0, folder
        assert_same_run(folder, self.whole)
        assert leftovers(folder.parent) == []

    def kill(self, folder: Path, aimed: bool):
        r"""Start or resume the run and kill it."""
        resumed = (folder / "config.json").exists()
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
        self.killed[BOARD.doing or ("between" if resumed else "before the first write")] += 1
        if (folder / "config.json").exists():  # at most the steps since the last checkpoint are repeated
            assert newest(folder) >= BOARD.saved, (newest(folder), BOARD.saved)

    def kills(self, count: int):
        number = 0
        while sum(self.killed.values()) < count:
            folder = self.root / f"trial{number}" / "run"
            for _ in range(self.rng.choice([2, 3, 4])):
                if sum(self.killed.values()) < count:
                    self.kill(folder, aimed=number % 2 == 0)
            self.finish(folder)
            number += 1

    def signals(self):
        r"""SIGTERM saves and leaves; a second Ctrl-C leaves at once; both go on to the same end."""
        from small_runs import wait_for

        from ddpm.training.optimization import Optimization

        end_step = Optimization.end_step

        def stuck(opt, *arguments):
            report = end_step(opt, *arguments)
            if opt.step == 3:
                BOARD.doing = "stuck"
                while opt.ema or not signal.getsignal(signal.SIGTERM).signum:  # until the first is seen
                    time.sleep(0.005)
            return report

        def stick():
            Optimization.end_step = stuck

        folder = self.root / "signals" / "run"
        pid = self.start(folder, stick)
        wait_for(lambda: BOARD.doing == "stuck")
        os.kill(pid, signal.SIGTERM)
        assert end_of(pid) == 143 and BOARD.saved == (0, 3)
        pid = self.start(folder, stick)
        wait_for(lambda: BOARD.doing == "stuck")
        while lives(pid):  # those of the first seconds count as one
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
        while any(lives(pid) for pid in pids):
            remove_leftovers(self.root / "shared" / "cache")
            time.sleep(0.002)
        assert [end_of(pid) for pid in pids] == [0, 0]
        for folder in folders:
            assert_same_run(folder, self.whole)


def main():
    import torch
    from small_runs import make_runs_cheap

    from ddpm.training import session  # noqa: F401 (all that a child would import)

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
