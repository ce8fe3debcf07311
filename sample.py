r"""Pictures from prompts.

python sample.py "a smiling woman with blond hair and eyeglasses" "a bald man with a mustache"
python sample.py "a young man" --model runs/NAME
"""

import argparse
import json
import sys
from pathlib import Path

from ddpm.tools import command as cli
from ddpm.tools import devices
from ddpm.tools.errors import UserError, printable

SAMPLERS = ("ddpm", "ddim", "dpm++")
VARIANCES = ("posterior", "beta", "learned")


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(__doc__)
    p.add_argument("prompts", nargs="+", metavar="PROMPT", help='what to draw; "" is anything')
    p.add_argument("--model", metavar="RUN", help="a run folder [the weights that ship]")
    p.add_argument("--sampler", choices=SAMPLERS, default="dpm++", help="[dpm++]")
    p.add_argument("--steps", type=int, default=20, help="calls of the network, 1 to 1000 [20]")
    p.add_argument(
        "--guidance",
        type=float,
        default=3.0,
        help="how strongly to follow the prompt; 1 plain, 0 ignores it [3]",
    )
    p.add_argument("--eta", type=float, default=0.0, help="noise of ddim and dpm++, 0 to 1 [0]")
    p.add_argument("--variance", choices=VARIANCES, help="ddpm's Sigma [as the model was trained]")
    p.add_argument("--negative", default=None, help="what to lead away from")
    p.add_argument("--columns", type=int, help="pictures a row of the grid [--num, or nearly square]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument("--num", type=int, default=1, help="pictures a prompt [1]")
    p.add_argument(
        "--out",
        default="samples.png",
        help="a PNG for one labelled grid, or a folder for single PNGs [samples.png]",
    )
    p.add_argument("--film", metavar="FILE", help="the denoising steps: .gif for a film, .png for a strip")
    p.add_argument(
        "--weights", choices=("ema", "unet"), default="ema", help="averaged weights or the last ones [ema]"
    )
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="fp32", help="[fp32]")
    p.add_argument("--device", choices=cli.DEVICES, default="auto", help="[auto]")
    return p


def check(a: argparse.Namespace):
    r"""Refuse what cannot be before anything slow is loaded."""
    if not 1 <= a.num <= 10_000:
        raise UserError(f"expected --num from 1 to 10000, got {a.num}")
    if a.columns is not None and a.columns < 1:
        raise UserError(f"expected --columns of at least 1, got {a.columns}")
    cli.check_drawing(a)
    out = Path(a.out)
    if out.suffix.lower() != ".png" and out.is_file():
        raise UserError(f"expected a folder or a .png for --out, {out} is another file")
    if out.suffix.lower() == ".png" and out.is_dir():
        raise UserError(f"expected a file for --out, {out} is a folder")
    if out.suffix.lower() not in ("", ".png"):
        raise UserError(f"expected --out to end in .png, or a folder, got {out}")
    if a.film and Path(a.film).suffix.lower() not in (".gif", ".png"):
        raise UserError(f"expected --film to end in .gif or .png, got {a.film}")
    for path in filter(None, (a.out if out.suffix else None, a.film)):
        if not Path(path).resolve().parent.is_dir():
            raise UserError(f"expected the folder of {path} to exist; make it first")


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    check(a)
    from tqdm import tqdm

    from ddpm.model import TextToImage
    from ddpm.tools.grids import labelled_grid, save_gif, save_png, strip, to_uint8

    model = TextToImage.load(a.model, a.weights)
    if a.steps > model.schedule.timesteps:
        raise UserError(
            f"expected --steps from 1 to {model.schedule.timesteps}, the model's chain, got {a.steps}"
        )
    if a.variance == "learned" != model.config.variance:
        raise UserError("expected --variance posterior or beta, got learned: this model learned none")
    device = devices.choose_device(a.device)
    model.to(device)
    prompts = [p for p in a.prompts for _ in range(a.num)]
    frames = []
    batch_size = len(prompts) if a.film else 32  # a film has all pictures in each of its frames
    with tqdm(
        total=a.steps * -(-len(prompts) // batch_size), desc="denoising", unit="step", disable=None
    ) as bar:

        def watch(state):
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
            watch,
            a.eta,
            devices.choose_precision(a.precision, device),
            batch_size=batch_size,
            variance=a.variance,
        )
    settings = {
        "model": str(a.model or "shipped"),
        "sampler": a.sampler,
        "steps": str(a.steps),
        "guidance": str(a.guidance),
        "seed": str(a.seed),
        "negative": a.negative or "",
        "eta": str(a.eta),
        "weights": a.weights,
        "variance": a.variance or model.config.variance,
    }
    out, columns = Path(a.out), a.columns or (a.num if a.num > 1 else None)
    if out.suffix.lower() == ".png":
        save_png(out, labelled_grid(x, prompts, columns), {"prompt": json.dumps(prompts), **settings})
    else:
        from PIL import Image

        out.mkdir(parents=True, exist_ok=True)
        for i, (picture, prompt) in enumerate(zip(to_uint8(x), prompts, strict=True)):
            save_png(
                out / f"{i:04d}.png",
                Image.fromarray(picture),
                {"prompt": prompt, **settings, "index": str(i)},
            )
    print(printable(f"{len(prompts)} picture{'s' * (len(prompts) > 1)} in {out}"))
    if a.film:
        film = Path(a.film)
        if film.suffix.lower() == ".gif":
            save_gif(film, frames, prompts)
        else:
            save_png(film, strip(frames), {"prompt": json.dumps(prompts), **settings})
        print(printable(f"film of {len(frames)} steps in {film}"))


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
