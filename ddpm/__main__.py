r"""Pictures from prompts.

python sample.py "a smiling woman with blond hair and eyeglasses" "a bald man with a mustache"
python sample.py "a young man" --model runs/NAME
python sample.py "a woman with eyeglasses" --init-image face.png --mask eyes.png
"""

import argparse
import contextlib
import json
import math
import re
import sys
import warnings
from pathlib import Path

from ddpm.config import SHIPPED, WORDS_FILE, Config, ModelConfig, fill_in_drawing
from ddpm.tools import command
from ddpm.tools.errors import UserError, printable

SAMPLERS = ("ddpm", "ddim", "dpm++")
VARIANCES = ("posterior", "beta", "learned")
MOST_BYTES = 2**24  # of a file of prompts; an endless one is refused too
MOST_PIXELS = 60_000_000  # Pillow warns of more when it opens a file, and a GIF has at most 65,535 rows


def parser() -> argparse.ArgumentParser:
    p = command.Parser(__doc__)
    p.prog = command.SAMPLE
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help='what to draw; "" is anything')
    many = "a prompt a line instead, an empty line is anything; - is standard input"
    p.add_argument("--prompts", type=command.path, metavar="FILE", dest="file", help=many)
    p.add_argument("--model", type=command.path, metavar="RUN", help="a run folder [the weights that ship]")
    p.add_argument("--sampler", choices=SAMPLERS, help="[dpm++; ddim for a model of few steps]")
    p.add_argument("--steps", type=int, help="steps, 1 to 1000 [20, or the model's few]")
    guidance = "how strongly to follow the prompt; 1 plain, 0 ignores it [3; 1 with few steps]"
    p.add_argument("--guidance", type=float, help=guidance)
    p.add_argument("--eta", type=float, default=0.0, help="noise of ddim and dpm++, 0 to 1 [0]")
    p.add_argument("--noise-scale", type=float, metavar="G", help=command.NOISE_SCALE)
    p.add_argument("--variance", choices=VARIANCES, help="ddpm's Sigma [as the model was trained]")
    p.add_argument("--negative", default=None, help="what to lead away from")
    p.add_argument(
        "--columns", type=int, help="pictures a row of the grid [--num, at most 8, or nearly square]"
    )
    init = "a picture to draw over, cropped and resized as training pictures are"
    p.add_argument("--init-image", type=command.path, metavar="FILE", help=init)
    strength = "how much of it is drawn anew, 1 / --steps to 1 [0.8, or a whole step; 1 with --mask]"
    p.add_argument("--strength", type=float, metavar="S", help=strength)
    mask = "as large as --init-image: white is drawn anew, black is kept"
    p.add_argument("--mask", type=command.path, metavar="FILE", help=mask)
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
    r"""Fill in what the model decides, and refuse what cannot be, before anything slow is loaded."""
    fill_in_drawing(a, a.model or SHIPPED)
    if bool(a.prompts) == bool(a.file):
        got = "both" if a.file else "neither"
        raise UserError(f"expected prompts, or --prompts with a file of them, got {got}; see --help")
    if not 1 <= a.num <= 10_000:
        raise UserError(f"expected --num from 1 to 10000, got {a.num}")
    if a.columns is not None and a.columns < 1:
        raise UserError(f"expected --columns of at least 1, got {a.columns}")
    command.check_drawing(a)
    if not a.init_image and (a.mask or a.strength is not None):
        raise UserError("expected --init-image with --mask and --strength, got none; name a picture")
    if a.strength is None:
        a.strength = max(0.8, 1 / a.steps) if a.init_image and not a.mask else 1.0
    if not 1 / a.steps <= a.strength <= 1:
        least = math.ceil(1e4 / a.steps) / 1e4
        raise UserError(f"expected --strength from {least:g}, one of {a.steps} steps, to 1, got {a.strength}")
    if a.negative and a.guidance in (0, 1):
        raise UserError(
            f"expected --guidance above 1 with --negative, got {a.guidance:g}, which does not lead away; "
            "leave --negative out, or give --guidance"
        )
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
    for given in filter(None, (a.init_image, a.mask, a.file)):
        if given.resolve() in (a.out.resolve(), a.film and a.film.resolve()) or (
            given.resolve().parent == a.out.resolve() and re.fullmatch(r"\d{4,}\.png", given.name)
        ):
            raise UserError(f"expected --out and --film apart from {given}, which is read; name another")
    for path in filter(None, (a.out if is_grid(a.out) else None, a.film)):
        if not path.resolve().parent.is_dir():
            raise UserError(f"expected the folder of {path} to exist; make it first")
        command.check_writable(path.parent)
    if not is_grid(a.out):
        command.check_writable(a.out)


def read_prompts(file: Path) -> list[str]:
    r"""The lines of a file, or of standard input for `-`, each a prompt; an empty line is the empty prompt."""
    if str(file) == "-":
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    else:
        try:
            with open(file, "rb") as opened:
                data = opened.read(MOST_BYTES + 1)
        except OSError as error:
            raise UserError(f"expected a file of prompts, could not read {file}: {error.strerror}") from None
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    if not lines or len(data) > MOST_BYTES:
        got = "more" if lines else "none"
        raise UserError(
            f"expected a prompt a line in {file}, up to {MOST_BYTES:,} bytes, got {got}; change it"
        )
    try:
        return [line.decode() for line in lines]
    except UnicodeDecodeError as error:
        raise UserError(f"expected UTF-8 in {file}, got {error.object[:60]!r}; save it as UTF-8") from None


def check_words(prompts: list[str], folder: Path):
    r"""Warn of the words that no training caption had, where the text tower never learned any either.

    Raises: UserError for any word where there were no captions.
    """
    from ddpm.celeba.captions import plain_words

    file = folder / WORDS_FILE
    if not file.is_file():
        return
    with open(file, "rb") as opened:
        known = set(opened.read(MOST_BYTES).decode(errors="replace").split())
    unknown = sorted(set().union(*map(plain_words, prompts)) - known)
    if unknown and not known:
        got = f"one with {unknown[0]!r}"
        raise UserError(
            f'expected the prompt "" alone, because this model learned without captions, got {got}'
        )
    if unknown:
        listed = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        means = "its random text tower gives them no meaning"
        warnings.warn(f"no training caption of this model has: {listed}; {means}, see {file}", stacklevel=2)


def read_start(a: argparse.Namespace, size: int, crop: int):
    r"""--init-image and --mask as a `Start`, cropped and resized as the model's training pictures were."""
    import torch

    from ddpm.celeba.images import BadImage, read_image
    from ddpm.sampling import Start

    def read(flag: str, path: Path) -> torch.Tensor:
        try:
            return torch.from_numpy(read_image(path, size, crop)).permute(2, 0, 1)[None]
        except BadImage as error:
            raise UserError(f"expected a picture for {flag}, got {path}, {error}; name another") from None

    x_0 = read("--init-image", a.init_image) / 127.5 - 1
    if not a.mask:
        return Start(x_0, a.strength)
    mask = read("--mask", a.mask).float().mean(1, keepdim=True) > 127.5
    sides, expected = upright_size(a.mask), upright_size(a.init_image)
    if sides != expected:
        raise UserError(f"expected --mask of {expected}, as {a.init_image} is, got {sides}; resize the mask")
    if not mask.any():
        raise UserError(
            f"expected white in --mask {a.mask} where to draw anew, got none after the crop; make it 255 there"
        )
    if mask.all():
        says = "is white everywhere, so nothing is kept; transparent parts are white"
        warnings.warn(f"--mask {a.mask} {says}", stacklevel=2)
    return Start(x_0, a.strength, mask)


def upright_size(path: Path) -> str:
    r"""Width and height of a picture that `read_image` has opened, turned by its EXIF as there."""
    from PIL import Image, ImageOps

    with (
        Image.open(path) as image,
        contextlib.suppress(Exception),
    ):  # Pillow raises all sorts for a broken EXIF
        image = ImageOps.exif_transpose(image)
    return f"{image.width} x {image.height}"


def is_grid(out: Path) -> bool:
    r"""Whether --out names one labelled grid, and not a folder."""
    return out.suffix.lower() == ".png"


def check_model(a: argparse.Namespace, model: ModelConfig):
    r"""Refuse what this model cannot draw, and sheets that no program opens."""
    count = len(a.prompts) * a.num
    columns = min(a.columns or 8, count)
    side = model.image_size * max(1, 128 // model.image_size)  # in a grid
    labelled = (side + 8) * (side + 92)
    frame = model.image_size * max(1, 64 // model.image_size)  # in a strip
    is_gif = a.film is not None and a.film.suffix.lower() == ".gif"  # whose frames are grids
    sheets = {
        "--out": is_grid(a.out) * -(-count // columns) * columns * labelled,
        "--film": bool(a.film) * count * max(is_gif * labelled, a.steps * frame**2),
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


def texts(a: argparse.Namespace, variance: str, precision: str) -> dict[str, str]:
    r"""The settings that each picture file holds as text."""
    return {
        "model": str(a.model or "shipped"),
        "sampler": a.sampler,
        "steps": str(a.steps),
        "guidance": str(a.guidance),
        "seed": str(a.seed),
        "negative": a.negative or "",
        "weights": a.weights,
        "precision": precision,
        "noise_scale": str(a.noise_scale),
        **({"variance": a.variance or variance} if a.sampler == "ddpm" else {"eta": str(a.eta)}),
        **({"init_image": str(a.init_image), "strength": str(a.strength)} if a.init_image else {}),
        **({"mask": str(a.mask)} if a.mask else {}),
    }


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    check(a)
    if a.file:
        a.prompts = read_prompts(a.file)
    from ddpm.model import TextToImage  # late, because --help must not wait for torch
    from ddpm.sampling import timesteps
    from ddpm.tools import devices, grids

    model = TextToImage.load(a.model, a.weights)
    check_model(a, model.config)
    check_words([*a.prompts, a.negative or ""], a.model or SHIPPED)
    start = None
    if a.init_image:
        crop = Config.read((a.model or SHIPPED) / "config.json").training.crop
        start = read_start(a, model.config.image_size, crop)
    device = devices.choose_device(a.device)
    precision = devices.choose_precision(a.precision, device)
    model.to(device)
    settings = texts(a, model.config.variance, precision)
    frames = []
    count = len(a.prompts) * a.num
    batch_size = count if a.film else 32  # a film has all pictures in each of its frames
    at_once = count if is_grid(a.out) else batch_size  # single pictures are written batch by batch
    steps = len(timesteps(model.schedule, a.steps, a.strength))
    with command.bar(total=steps * -(-count // batch_size), desc="denoising", unit="step") as bar:

        def after_step(state):
            bar.update()
            if a.film:
                frames.append(model.decode(state.x_0).float().clamp(-1, 1).cpu())

        for first in range(0, count, at_once):
            prompts = [a.prompts[i // a.num] for i in range(first, min(first + at_once, count))]
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
                first,
                a.variance,
                start,
                a.noise_scale,
            )
            if not is_grid(a.out):
                each = [{"prompt": p, **settings, "index": str(first + i)} for i, p in enumerate(prompts)]
                grids.save_each(a.out, x, each, first)
    whole = {"prompt": json.dumps(prompts), **settings}
    if is_grid(a.out):
        columns = a.columns or (min(a.num, 8) if a.num > 1 else None)
        grids.save_png(a.out, grids.labelled_grid(x, prompts, columns), whole)
    print(printable(f"{count} picture{'s' * (count > 1)} in {a.out}"))
    if a.film:
        grids.save_film(a.film, frames, prompts, whole)
        print(printable(f"film of {len(frames)} steps in {a.film}"))


if __name__ == "__main__":
    sys.exit(command.exit_code(main))
