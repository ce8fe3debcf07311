r"""The benchmark's own arithmetic and its table; what it measures is run by hand (`python tests/benchmarks`)."""

import ctypes
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import measure
from benchmarks.measure import Row, alternate, as_json, compared, digits, table

from ddpm.evaluation import classifier
from ddpm.tools.command import keep_freed_memory


def row(value: float, goal: float | None, at_least: bool = True) -> Row:
    return Row(
        "train", "a step", "14 images/s", "5 images/s", value, value - 0.5, value + 0.5, goal, at_least
    )


@pytest.mark.parametrize(
    ("value", "goal", "at_least", "met"),
    [
        (3.0, 3.0, True, True),
        (2.99, 3.0, True, False),
        (1.35, 1.35, False, True),
        (1.36, 1.35, False, False),
        (2.0, None, True, None),
    ],
)
def test_a_goal_is_a_floor_or_a_ceiling_and_includes_itself(value, goal, at_least, met):
    assert row(value, goal, at_least).met is met


def test_the_table_says_what_is_missed_and_its_columns_are_in_line():
    lines = table([row(2.5, 3.0), row(1.2, 1.35, at_least=False), row(1.0, None)]).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert "2.5 x (2 x to 3 x)" in lines[2] and "at least 3 x" in lines[2] and "**no**" in lines[2]
    assert "at most 1.35 x" in lines[3] and "yes" in lines[3]
    assert "at " not in lines[4] and "yes" not in lines[4] and "no" not in lines[4]


def test_figures_have_three_digits_and_no_exponent():
    assert [digits(value) for value in (2456.1, 22.06, 0.0537)] == ["2,456", "22.1", "0.0537"]


def test_rounds_are_compared_in_pairs():
    r"""The median of the ratios, not the ratio of the medians, which here is 2."""
    found = compared(
        "train", "a step", [1.0, 2.0, 4.0], [3.0, 8.0, 4.0], amount=16, unit="images/s", goal=3.0
    )
    assert (found.value, found.low, found.high) == (3.0, 1.0, 4.0)
    assert (found.ours, found.other) == ("8 images/s", "4 images/s")


def test_every_other_round_goes_backwards_after_the_warm_up():
    calls = []
    times = alternate([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, warm=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert [len(side) for side in times] == [3, 3] and min(map(min, times)) > 0


def test_what_comes_before_an_action_comes_every_time_and_is_not_timed(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    actions = [lambda name=name: calls.append(name) for name in "ab"]
    before = [lambda: (calls.append("A"), now.append(now.pop() + 1)), lambda: calls.append("B")]
    times = alternate(actions, rounds=2, warm=0, before=before)
    assert "".join(calls) == "AaBb" + "BbAa" and max(map(max, times)) == 0


def test_memory_is_given_back_and_kept_again():
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("needs glibc")
    held = {}
    for name, how in (("back", measure.give_memory_back), ("kept", keep_freed_memory)):
        how()
        torch.ones(2**26).sum()  # 256 MiB
        held[name] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    measure.give_memory_back()
    assert held["kept"] > held["back"] + 200 * 2**20


def test_every_part_is_there_and_needs_no_diffusers_to_be_looked_at():
    for module, function in command.PARTS.values():
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function))


def test_one_part_is_written_as_json_and_one_that_cannot_run_is_told(tmp_path, monkeypatch, capsys):
    from benchmarks import networks

    def missing(**_):
        raise ImportError("No module named 'diffusers'")

    monkeypatch.setattr(measure, "machine", lambda quick: {"cpu": "some", "matmul_gflops": {}})
    monkeypatch.setattr(networks, "train", lambda **_: iter([row(2.5, 3.0)]))
    monkeypatch.setattr(networks, "vae", missing)
    command.main(["--only", "train,vae", "--out", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["rows"] == as_json([row(2.5, 3.0)]) and content["rows"][0]["met"] is False
    assert content["skipped"] == {"vae": "No module named 'diffusers'"}
    assert "skipped vae: No module named 'diffusers'" in capsys.readouterr().out


def test_an_operations_least_time_is_that_of_its_arithmetic_or_of_its_bytes():
    from benchmarks.operations import Clock

    a, b = torch.ones(2, 100, 100)
    with Clock({torch.float32: 2e6}, bandwidth=1e3) as clock:
        torch.mm(a, b).t().add_(1)
    product, added = clock.spent["mm"], clock.spent["add_"]
    assert (product.arithmetic, product.memory, product.least) == (1.0, 120.0, 120.0)
    assert (added.arithmetic, added.least) == (0.0, 80.0)  # read, and written back
    assert set(clock.spent) == {"mm", "add_"}  # a view moves nothing


def test_an_unknown_part_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--only", "speed"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: expected parts out of train, train-like, ")


@pytest.mark.slow
def test_the_command_for_a_gpu_runs_in_its_small_form_on_a_cpu(tmp_path):
    pytest.importorskip("diffusers")
    words = [
        sys.executable,
        "tests/benchmarks/gpu.py",
        "--small",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "gpu"),
    ]
    done = subprocess.run(words, cwd=measure.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert [row["part"] for row in found["rows"]] == ["gpu-step", "gpu-peak", "gpu-sample"]
    assert found["train"]["returncode"] == 0 and "validation loss" in found["train"]["told"][-1]
    assert (tmp_path / "gpu" / "run" / "ema.safetensors").is_file()


@pytest.mark.slow
def test_the_time_to_quality_is_measured_of_both_sides(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from benchmarks import quality

    monkeypatch.setattr(classifier, "STEPS", 3)
    few = ["--preset", "tiny", "--drawn-images", "400", "--n", "16"]
    quality.main([*few, "--minutes", "0.3", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "quality.json").read_text())["rows"]
    assert [row["side"] for row in found] == ["ours", "diffusers"]
    for row in found:
        assert min(row["steps"].values()) > 0 and row["frechet"] > 0
