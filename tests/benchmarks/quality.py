r"""Time to quality: what is drawn after so many minutes, by our preset and by a recipe that users of diffusers take.

python tests/benchmarks/quality.py                                  drawn faces, 2, 5 and 10 minutes of each side
python tests/benchmarks/quality.py --data PATH --preset celeba64-laptop --minutes 60 --extractor efficientnet-lite0

The peer has UNet2DConditionModel and AutoencoderKL of our sizes, our pictures, captions and frozen text tower, and our
precision. Its recipe is that of diffusers' example train_text_to_image.py: AdamW with a constant rate of 1e-4 after
500 steps, batches of 16, the error of eps under scaled_linear, an EMA of 0.9999. Its VAE and text tower encode each
batch anew. A tenth of its captions are dropped, because guidance needs it; the example drops none. Its VAE has the same
share of the minutes as ours. The minutes of `python -m ddpm.evaluation`, which measures both, are not counted. Needs
the extra `compat`, and a machine that does nothing else.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # as a command
    tests = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(tests), str(tests.parent)]

from benchmarks.measure import PACKAGES, ROOT, commit, cpu_name, installed
from ddpm.celeba.dataset import Pictures, load_pictures, open_data
from ddpm.celeba.lists import TRAIN
from ddpm.config import PRESETS, Config
from ddpm.evaluation import __main__ as evaluation
from ddpm.evaluation.choices import EXTRACTORS
from ddpm.export.diffusers_folder import RENAMES, diffusers_names, unet_config, vae_config
from ddpm.model import TextToImage
from ddpm.tools import command as cli
from ddpm.tools.devices import autocast, choose_device, choose_precision
from ddpm.tools.files import check_new_folder, write_atomically
from ddpm.tools.seeding import generator
from ddpm.training.batches import batch_rows

BATCH, RATE, WARMUP, DECAY = 16, 1e-4, 500, 0.9999  # of the example
KL_WEIGHT = 1e-6


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    p.prog = "python tests/benchmarks/quality.py"
    minutes = "of each training [2,5,10]"
    p.add_argument(
        "--minutes",
        type=lambda text: [float(m) for m in text.split(",")],
        default=[2.0, 5.0, 10.0],
        help=minutes,
    )
    p.add_argument(
        "--preset", choices=PRESETS, default="drawn64", help="of our side; the peer has its sizes [drawn64]"
    )
    p.add_argument("--data", metavar="PATH", default="drawn", help="pictures to train on [drawn faces]")
    p.add_argument(
        "--extractor", choices=EXTRACTORS, default="classifier", help="of the distance [classifier]"
    )
    p.add_argument("--drawn-images", type=int, default=8000, help="how many faces to draw [8000]")
    p.add_argument("--n", type=int, help="held-out prompts [391, or all]")
    p.add_argument(
        "--out", type=cli.path, metavar="FOLDER", default=Path("runs/quality"), help="[runs/quality]"
    )
    return p


def optimized(network: nn.Module, losses: Callable[[int], Tensor], until: float) -> Iterator[int]:
    r"""Steps of AdamW as in the example, until the time `until`; yields their number."""
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    step = 0
    while time.monotonic() < until:
        losses(step).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield step


def peer(
    config: Config, pictures: Pictures, begun: float, minutes: float
) -> tuple[TextToImage, dict[str, int]]:
    r"""The peer, trained from `begun` on, with its weights in our classes; and its steps by stage."""
    import diffusers
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    c, settings = config.model, config.training
    model = TextToImage(c)
    device = choose_device("auto")
    model.to(device)
    precision = choose_precision(settings.precision, device)
    vae = diffusers.AutoencoderKL.from_config(vae_config(c)).to(device)
    unet = diffusers.UNet2DConditionModel.from_config(unet_config(c)).to(device)
    noising = diffusers.DDPMScheduler(c.timesteps, 0.00085, 0.012, "scaled_linear")
    train_rows = pictures.rows(TRAIN)

    def batch(step: int, stage: str) -> tuple[Tensor, list[str]]:
        rows, epoch = batch_rows(train_rows, BATCH, step, settings.seed, stage)
        flip = torch.rand(BATCH, generator=generator(settings.seed, stage, step)) < 0.5 * settings.flip
        captions = [pictures.caption(i, settings.seed, epoch % settings.caption_variants) for i in rows]
        return pictures.batch(rows, flip).to(device), captions

    def vae_loss(step: int) -> Tensor:
        x, _ = batch(step, "vae")
        with autocast(device, precision):
            q = vae.encode(x).latent_dist
            x_hat = vae.decode(q.sample()).sample
        return F.mse_loss(x_hat.float(), x, reduction="sum") / len(x) + KL_WEIGHT * q.kl().float().mean()

    steps = {"vae": 0, "unet": 0}
    for steps["vae"] in optimized(vae, vae_loss, begun + 60 * minutes * settings.vae_share):
        pass
    with torch.no_grad():
        z = torch.cat([vae.encode(batch(step, "scale")[0]).latent_dist.sample() for step in range(16)])
    model.latent_scale = 1 / z.std().item()

    def unet_loss(step: int) -> Tensor:
        x, captions = batch(step, "unet")
        dropped = torch.rand(BATCH) < c.caption_drop
        with autocast(device, precision):
            with torch.no_grad():
                z_0 = vae.encode(x).latent_dist.sample() * model.latent_scale
                context = model.text(["" if drop else c for drop, c in zip(dropped, captions, strict=True)])
            eps = torch.randn_like(z_0)
            t = torch.randint(0, c.timesteps, (BATCH,), device=device)
            output = unet(noising.add_noise(z_0, eps, t), t, context).sample
        return F.mse_loss(output.float(), eps.float())

    ema = EMAModel(unet.parameters(), decay=DECAY)
    for steps["unet"] in optimized(unet, unet_loss, begun + 60 * minutes):
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    for ours, theirs in ((model.vae, vae), (model.unet, unet)):
        state = theirs.state_dict()
        ours.load_state_dict({name: state[diffusers_names(name, RENAMES)[0]] for name in ours.state_dict()})
    return model, steps


def train_peer(config: Config, folder: Path, cache: Path, minutes: float) -> dict[str, int]:
    r"""Train the peer and write its run folder; returns its steps by stage."""
    begun = time.monotonic()
    model = dataclasses.replace(config.model, prediction="eps", schedule="scaled_linear")
    config = dataclasses.replace(config, model=model)
    pictures = load_pictures(config, open_data(config), cache)
    trained, steps = peer(config, pictures, begun, minutes)
    trained.save(folder)
    write_atomically(folder / "config.json", config.to_json().encode())  # with its data
    return steps


def train_ours(folder: Path, flags: list[str], cache: Path, minutes: float) -> dict[str, int]:
    r"""Train by the command; returns the steps by stage."""
    words = ["train.py", *flags, "--max-minutes", f"{minutes:g}", "--out", str(folder), "--cache", str(cache)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stages = [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    return {stage: stages.count(stage) for stage in ("vae", "unet")}


def main(argv: list[str] | None = None):
    a = parser().parse_args(argv)
    check_new_folder(a.out)
    a.out.mkdir(parents=True)
    settings = {"data": a.data, "drawn_images": a.drawn_images, "text_weights": "random"}
    flags = ["--preset", a.preset]
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    found = {
        "commit": commit(),
        "cpu": cpu_name(),
        "packages": {name: installed(name) for name in PACKAGES},
        "rows": [],
    }
    for minutes in a.minutes:
        for side in ("ours", "diffusers"):
            folder, cache = a.out / f"{side}-{minutes:g}", a.out / f"cache-{side}-{minutes:g}"  # a cold start
            if side == "ours":
                steps = train_ours(folder, flags, cache, minutes)
            else:
                config = Config.from_preset(a.preset, max_minutes=minutes, **settings)
                steps = train_peer(config, folder, cache, minutes)
            shutil.rmtree(cache)
            words = [folder, "--only", "adherence,frechet", *(["--n", a.n] if a.n else [])]
            words += ["--extractor", a.extractor, "--cache", a.out / "cache"]
            evaluation.main([str(word) for word in words])
            result = json.loads((folder / "evaluation" / "result.json").read_text())
            row = {"minutes": minutes, "side": side, "steps": steps}
            row["adherence"] = result["adherence"]["held_out"]["generated"]["mean"]
            row["frechet"] = result["frechet"]["generated"]["distance"]
            found["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_atomically(a.out / "quality.json", (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    cli.keep_freed_memory()
    sys.exit(cli.exit_code(main))
