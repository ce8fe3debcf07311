r"""Pictures from prompts.

python sample.py "a smiling woman with blond hair and eyeglasses" "a bald man with a mustache"
python sample.py "a young man" --model runs/NAME
"""

import argparse
import json
import sys
from pathlib import Path

from ddpm.config import ModelConfig
from ddpm.tools import command
from ddpm.tools.errors import UserError, printable

SAMPLERS = ("ddpm", "ddim", "dpm++")
VARIANCES = ("posterior", "beta", "learned")
MOST_PIXELS = 60_000_000  # Pillow warns of more when it opens a file, and a GIF has at most 65,535 rows


def parser() -> argparse.ArgumentParser:
    p = command.Parser(__doc__)
    p.prog = command.SAMPLE
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to draw; "" is anything')
    p.add_argument("--model", type=command.path, metavar="RUN", help="a run folder [the weights that ship]")
    p.add_argument("--sampler", choices=SAMPLERS, default="dpm++", help="[dpm++]")
    p.add_argument("--steps", type=int, default=20, help="calls of the network, 1 to 1000 [20]")
    guidance = "how strongly to follow the prompt; 1 plain, 0 ignores it [3]"
    p.add_argument("--guidance", type=float, default=3.0, help=guidance)
    p.add_argument("--eta", type=float, default=0.0, help="noise of ddim and dpm++, 0 to 1 [0]")
    p.add_argument("--variance", choices=VARIANCES, help="ddpm's Sigma [as the model was trained]")
    p.add_argument("--negative", default=None, help="what to lead away from")
    p.add_argument(
        "--columns", type=int, help="pictures a row of the grid [--num, at most 8, or nearly square]"
    )
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument("--num", type=int, default=1, help="pictures a prompt [1]")
    out = "a PNG for one labelled grid, or a folder for single PNGs [samples.png]"
    p.add_argument("--out", type=command.path, default=Path("samples.png"), help=out)
    film = "the denoising steps: .gif for a film, .png for a strip"
    p.add_argument("--film", type=command.path, metavar="FILE", help=film)
    weights = "averaged weights or the last ones [ema]"
    p.add_argument("--weights", choices=("ema", "unet"), default="ema", help=weights)
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="[fp32]")
    p.add_argument("--device", choices=command.DEVICES, default="auto", help="[auto]")
    return p


def check(a: argparse.Namespace):
    r"""Refuse what cannot be before anything slow is loaded."""
    if not 1 <= a.num <= 10_000:
        raise UserError(f"expected --num from 1 to 10000, got {a.num}")
    if a.columns is not None and a.columns < 1:
        raise UserError(f"expected --columns of at least 1, got {a.columns}")
    command.check_drawing(a)
    if a.variance and a.sampler != "ddpm":
        raise UserError(f"expected --variance with --sampler ddpm, got it with {a.sampler}; leave it out")
    if is_grid(a.out) and a.out.is_dir():
        raise UserError(f"expected a file for --out, {a.out} is a folder")
    if not is_grid(a.out) and not a.out.is_dir() and (a.out.suffix or a.out.exists()):
        raise UserError(f"expected --out to end in .png, or a folder, got {a.out}")
    if a.film and a.film.suffix.lower() not in (".gif", ".png"):
        raise UserError(f"expected --film to end in .gif or .png, got {a.film}")
    if a.film and a.out.resolve() in (a.film.resolve(), a.film.resolve().parent):
        raise UserError(
            f"expected --film apart from --out, got {a.film} and {a.out}; name another file or folder"
        )
    for path in filter(None, (a.out if is_grid(a.out) else None, a.film)):
        if not path.resolve().parent.is_dir():
            raise UserError(f"expected the folder of {path} to exist; make it first")


def is_grid(out: Path) -> bool:
    r"""Whether --out names one labelled grid, and not a folder."""
    return out.suffix.lower() == ".png"


def check_model(a: argparse.Namespace, model: ModelConfig):
    r"""Refuse what this model cannot draw, and sheets that no program opens."""
    count = len(a.prompts) * a.num
    columns = min(a.columns or 8, count)
    side = model.image_size * max(1, 128 // model.image_size)  # in a grid
    frame = model.image_size * max(1, 64 // model.image_size)  # in a strip
    sheets = {
        "--out": is_grid(a.out) * -(-count // columns) * columns * (side + 8) * (side + 92),
        "--film": bool(a.film) * a.steps * count * frame**2,
    }
    for flag, pixels in sheets.items():
        if pixels > MOST_PIXELS:
            advice = "give --out a folder" if flag == "--out" else "take fewer --steps"
            raise UserError(
                f"expected a sheet of at most {MOST_PIXELS:,} pixels for {flag}, "
                f"{count} pictures need {pixels:,}; draw fewer, or {advice}"
            )
    if a.steps > model.timesteps:
        raise UserError(f"expected --steps from 1 to {model.timesteps}, the model's chain, got {a.steps}")
    if a.variance == "learned" and model.variance != "learned":
        raise UserError("expected --variance posterior or beta, got learned: this model learned none")


def texts(a: argparse.Namespace, variance: str) -> dict[str, str]:
    r"""The settings that each PNG holds as text."""
    return {
        "model": str(a.model or "shipped"),
        "sampler": a.sampler,
        "steps": str(a.steps),
        "guidance": str(a.guidance),
        "seed": str(a.seed),
        "negative": a.negative or "",
        "weights": a.weights,
        **({"variance": a.variance or variance} if a.sampler == "ddpm" else {"eta": str(a.eta)}),
    }


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    check(a)
    from ddpm.model import TextToImage  # late, because --help must not wait for torch
    from ddpm.tools import devices, grids

    model = TextToImage.load(a.model, a.weights)
    check_model(a, model.config)
    device = devices.choose_device(a.device)
    precision = devices.choose_precision(a.precision, device)
    model.to(device)
    prompts = [p for p in a.prompts for _ in range(a.num)]
    frames = []
    batch_size = len(prompts) if a.film else 32  # a film has all pictures in each of its frames
    batches = -(-len(prompts) // batch_size)
    with command.bar(total=a.steps * batches, desc="denoising", unit="step") as bar:

        def after_step(state):
            bar.update()
            if a.film:
                frames.append(model.decode(state.x_0).float().clamp(-1, 1).cpu())

        x = model.sample(
            prompts,
            a.sampler,
            a.steps,
            a.guidance,
            a.seed,
            a.negative,
            after_step,
            a.eta,
            precision,
            batch_size,
            variance=a.variance,
        )
    settings = texts(a, model.config.variance)
    whole = {"prompt": json.dumps(prompts), **settings}
    if is_grid(a.out):
        columns = a.columns or (min(a.num, 8) if a.num > 1 else None)
        grids.save_png(a.out, grids.labelled_grid(x, prompts, columns), whole)
    else:
        grids.save_each(a.out, x, [{"prompt": p, **settings, "index": str(i)} for i, p in enumerate(prompts)])
    print(printable(f"{len(prompts)} picture{'s' * (len(prompts) > 1)} in {a.out}"))
    if a.film:
        grids.save_film(a.film, frames, prompts, whole)
        print(printable(f"film of {len(frames)} steps in {a.film}"))


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
