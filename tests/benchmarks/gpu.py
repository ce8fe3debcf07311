r"""One CUDA GPU in nine minutes: its tests, our steps beside diffusers', and a training of the specification's model.

python tests/benchmarks/gpu.py --data PATH --out FOLDER      PATH: CelebA; without it, drawn faces
python tests/benchmarks/gpu.py --small --device cpu          every part in its smallest form, to see that it runs

FOLDER/gpu.json is written again after every part, so that a machine that goes away leaves what was measured. The run
of the training is FOLDER/run, with its grids and metrics.csv. Needs the extras `test` and `compat`.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

if not __package__:  # as a command
    tests = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(tests), str(tests.parent)]

from benchmarks.measure import PACKAGES, ROOT, Row, alternate, as_json, commit, compared, installed, spread
from benchmarks.networks import (
    LIKE,
    PRODUCTS,
    SIDE,
    flops,
    nowhere_zero,
    products,
    spec_networks,
    their_unet,
    unet_step,
)
from benchmarks.sampling import PROMPTS, ours_and_theirs, pipeline
from ddpm.config import ModelConfig
from ddpm.model import TextToImage
from ddpm.tools import command as cli
from ddpm.tools.devices import choose_device, choose_precision
from ddpm.tools.files import check_new_folder, write_atomically


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    p.prog = "python tests/benchmarks/gpu.py"
    p.add_argument("--data", metavar="PATH", default="drawn", help="pictures to train on [drawn faces]")
    p.add_argument("--out", type=cli.path, metavar="FOLDER", default=Path("runs/gpu"), help="[runs/gpu]")
    p.add_argument("--minutes", type=float, default=9.0, help="of the whole command [9]")
    p.add_argument("--device", choices=cli.DEVICES, default="cuda", help="[cuda]")
    p.add_argument("--batch", type=int, default=64, help="pictures a step that is compared [64]")
    p.add_argument("--small", action="store_true", help="two pictures, one round, the preset tiny")
    return p


def gpu_tests(**_) -> dict:
    r"""The last line of the tests that need a GPU."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "", "tests/test_gpu.py"]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return {"returncode": None, "last_line": "not done after three minutes"}
    return {
        "returncode": done.returncode,
        "last_line": (done.stdout.strip() or done.stderr.strip() or "nothing was printed").splitlines()[-1],
    }


def most_memory(device: torch.device, action: Callable[[], object]) -> float | None:
    r"""GiB of tensors that `action` makes while it runs, beside those that are there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def steps(device: torch.device, batch: int, rounds: int, small: bool, **_) -> Iterator[Row | dict]:
    r"""A training step of the spec's UNet against diffusers' with everything alike, as it is and compiled."""
    precision = choose_precision("auto", device)
    ours = spec_networks()[1].to(device)
    other = their_unet(ours, as_ours=True).to(device)
    most = products(torch.bfloat16 if precision == "bf16" else torch.float32, device)
    for how in ("as it is",) if small else ("as it is", "torch.compile"):
        pair = (
            (ours, other)
            if how == "as it is"
            else [torch.compile(unet, dynamic=False) for unet in (ours, other)]
        )
        calls = [unet_step(unet, k == 0, precision, True, batch) for k, unet in enumerate(pair)]
        a, b, c = alternate([*calls, most], rounds, warm=1 if small else 3)
        what = f"UNet training step, batch {batch}, {LIKE}: {precision}, channels-last, {how} on both sides"
        yield compared("gpu-step", what, a, b, batch, "images/s", None)
        yield {f"memory_gib, {how}": [most_memory(device, call) for call in calls]}
        if how == "as it is":
            work = flops(calls[0])
            limit = [PRODUCTS * 2 * SIDE**3 / seconds for seconds in c]
            shares = [100 * work / seconds / most for seconds, most in zip(a, limit, strict=True)]
            sides = (f"{work / min(a) / 1e12:.2f} TFLOP/s", f"{max(limit) / 1e12:.2f} TFLOP/s")
            what = f"share of the {precision} matmul peak, UNet training step of {work / 1e9:.0f} GFLOP"
            yield spread("gpu-peak", what, sides, shares, unit="%", at_least=True)


def sample(device: torch.device, rounds: int, small: bool, **_) -> Iterator[Row]:
    r"""16 prompts to pixels against StableDiffusionPipeline, both in the device's precision, channels-last."""
    torch.manual_seed(0)
    model = TextToImage(ModelConfig(text_weights="random")).eval()
    for network in (model.vae, model.unet):
        nowhere_zero(network)
    pipe = pipeline(model).to(device)
    model.to(device)
    for network in (model.unet, model.vae, pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    precision, count = choose_precision("auto", device), 1 if small else 20
    a, b = alternate(ours_and_theirs(model, pipe, precision, precision, count), rounds)
    what = f"{len(PROMPTS)} prompts to pixels, {count} steps, guidance 3, {precision}, channels-last on both sides"
    yield compared("gpu-sample", what, a, b, len(PROMPTS), "pictures/s", None)


def train(device: torch.device, data: str, out: Path, minutes: float, small: bool, **_) -> dict:
    r"""The preset `celeba64` for the minutes that are left, and the last figures of its stages."""
    preset = ["--preset", "tiny"] if small else ["--preset", "celeba64", "--max-minutes", f"{minutes:.2f}"]
    flags = [*preset, "--data", data, "--text-weights", "random", "--device", device.type]
    words = ["train.py", *flags, "--out", str(out / "run"), "--cache", str(out / "cache")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if "held-out" in line or "validation loss" in line]
    return {"command": "python " + " ".join(words), "returncode": done.returncode, "told": told[-4:]}


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    begun = time.monotonic()
    device = choose_device(a.device)
    check_new_folder(a.out)
    a.out.mkdir(parents=True, exist_ok=True)
    found = {
        "command": " ".join(["python tests/benchmarks/gpu.py", *(argv or sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "packages": {name: installed(name) for name in PACKAGES},
        "commit": commit(),
        "rows": [],
    }
    given = {"device": device, "data": a.data, "out": a.out, "small": a.small}
    given |= {"batch": 2 if a.small else a.batch, "rounds": 1 if a.small else 10}
    for part in (gpu_tests, steps, sample, train):
        given["minutes"] = max(
            0.5, a.minutes - (time.monotonic() - begun) / 60 - 0.3
        )  # 0.3 to start and to end
        result = part(**given)
        for one in [result] if isinstance(result, dict) else result:
            if isinstance(one, dict):
                found.setdefault(part.__name__, {}).update(one)
                print(f"{part.__name__}: {json.dumps(one)}", flush=True)
            else:
                found["rows"] += as_json([one])
                print(" | ".join(one.cells()), flush=True)
            write_atomically(a.out / "gpu.json", (json.dumps(found, indent=2) + "\n").encode())
    print(f"{a.out / 'gpu.json'}, {(time.monotonic() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
