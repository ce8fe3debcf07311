r"""How good a run is, in numbers: one JSON, its plots and grids, in RUN/evaluation.

python -m ddpm.evaluation runs/NAME              391 held-out prompts; says first how long it will take
python -m ddpm.evaluation runs/NAME --quick      128 prompts, short curves
python -m ddpm.evaluation runs/NAME --full       every curve with all prompts, and DDPM at all steps; hours on a CPU

An evaluation that is in the folder already is replaced; its figures stay as result.previous.json."""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddpm import __version__
from ddpm.celeba.dataset import Pictures, load_pictures, open_data
from ddpm.celeba.lists import TEST, TRAIN, VALID
from ddpm.celeba.refusals import DataError
from ddpm.config import Config
from ddpm.evaluation import metrics
from ddpm.evaluation.classifier import (
    AttributeClassifier,
    NothingToLearn,
    attribute_classifier,
    classifier_path,
    gaussian_blur,
    learnable_names,
    training_seconds,
    truths,
)
from ddpm.evaluation.features import feature_extractor
from ddpm.evaluation.metrics import (
    bits_per_dimension,
    frechet_distance,
    gaussian_of,
    nearest,
    precision_recall,
)
from ddpm.model import SHIPPED, TextToImage
from ddpm.tools import command as cli
from ddpm.tools import devices
from ddpm.tools.arrays import key_of
from ddpm.tools.command import progress_bar, say
from ddpm.tools.devices import autocast, wait_for
from ddpm.tools.errors import UserError
from ddpm.tools.files import digest_of, write_atomically
from ddpm.tools.grids import labelled_grid, save_png
from ddpm.tools.seeding import generator
from ddpm.training.caches import Texts, encode_latents
from ddpm.training.validation import loss_by_timestep, psnr, ssim

PARTS = ("adherence", "frechet", "neighbours", "vae", "latents", "loss", "bits", "guidance", "steps")
SAMPLERS = ("ddpm", "ddim", "dpm++")
EXTRACTORS = ("classifier", "efficientnet-lite0", "inception")
PROMPTS = 391  # what --n is without being said


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(__doc__)
    p.prog = "python -m ddpm.evaluation"
    p.add_argument("run", metavar="RUN", help="a run folder")
    p.add_argument(
        "--n", type=int, help=f"held-out pictures, whose captions are the prompts [{PROMPTS}, or all]"
    )
    p.add_argument("--split", choices=("valid", "test"), default="test", help="where they come from [test]")
    p.add_argument("--sampler", choices=SAMPLERS, default="dpm++", help="[dpm++]")
    p.add_argument("--steps", type=int, default=20, help="calls of the network, 1 to 1000 [20]")
    p.add_argument("--guidance", type=float, default=3.0, help="how strongly to follow the prompt [3]")
    p.add_argument("--eta", type=float, default=0.0, help="noise of ddim and dpm++, 0 to 1 [0]")
    p.add_argument(
        "--weights", choices=("ema", "unet"), default="ema", help="averaged weights or the last ones [ema]"
    )
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument(
        "--extractor",
        choices=EXTRACTORS,
        default="classifier",
        help="whose features the Frechet distance compares [classifier]",
    )
    scope = p.add_mutually_exclusive_group()
    for name, told in (("quick", "fewer prompts, short curves"), ("full", "whole curves, DDPM at all steps")):
        scope.add_argument(f"--{name}", action="store_const", dest="scope", const=name, help=told)
    p.add_argument("--only", metavar="PART,...", help=f"only some of {','.join(PARTS)}")
    p.add_argument("--data", metavar="PATH", help="where the run's data is now [where it was]")
    p.add_argument(
        "--cache", metavar="DIR", help="folder of decoded pictures and classifiers [beside the run: cache]"
    )
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="[auto]")
    p.add_argument("--device", choices=cli.DEVICES, default="auto", help="[auto]")
    p.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write to [RUN/evaluation; of what ships, runs/shipped-evaluation]",
    )
    p.set_defaults(scope="normal")
    return p


if __name__ == "__main__":
    parser().parse_args()  # --help and a mistyped flag are answered without what follows

CHANNELS_LAST = torch.channels_last
SPLITS = {"valid": VALID, "test": TEST}
FILES = (
    "result.json",
    "pictures.png",
    "neighbours.png",
    "adherence.png",
    "latents.png",
    "loss.png",
    "guidance.png",
    "steps.png",
)
MIN_EACH, MIN_READ = 8, 0.8
RULE = (
    f"counted are attributes that the captions of at least {MIN_EACH} held-out pictures want and of {MIN_EACH} do not, "
    f"and that the classifier reads from the real ones with a balanced accuracy of at least {MIN_READ}; of a part of "
    "the pictures, those among them that some of it want and some do not"
)
UNSEEN = "held-out pictures whose row of 40 attributes, as the full caption says it, no training picture has"
FAR = "those of them whose row differs from that of every training picture in two attributes or more"
NO_CLASSIFIER = "the data has no attribute with enough pictures of both values to train a classifier on"
BATCH = 32


class Scope(NamedTuple):
    r"""How far the curves go: prompts (0: all), guidance scales, numbers of steps, and DDPM over the whole chain."""

    prompts: int
    curve_prompts: int
    guidances: tuple[float, ...]
    steps: tuple[int, ...]
    whole_chain: bool = False


SCOPES = {
    "quick": Scope(128, 64, (1.0, 3.0, 7.5), (5, 20)),
    "normal": Scope(PROMPTS, 128, (1.0, 2.0, 3.0, 5.0, 7.5), (5, 10, 20, 50)),
    "full": Scope(PROMPTS, 0, (1.0, 2.0, 3.0, 5.0, 7.5), (5, 10, 20, 50), True),
}


class LeftOut(Exception):
    r"""A part that this run or its data cannot have; the message says why."""


class Setting(NamedTuple):
    r"""A way to draw: the same noise and prompts every time."""

    sampler: str
    steps: int
    guidance: float
    eta: float = 0.0

    @property
    def name(self) -> str:
        r"""The sampler, with its noise where that can be chosen."""
        return f"{self.sampler}, eta {self.eta:g}" if self.eta else self.sampler

    @property
    def calls(self) -> int:
        r"""Pictures that go through the network for each one drawn."""
        return self.steps * (1 if self.guidance in (0, 1) else 2)


def name_of(point: dict) -> str:
    return Setting(point["sampler"], point["steps"], point["guidance"], point["eta"]).name


class Remembered(nn.Module):
    r"""The text tower with every prompt embedded once."""

    def __init__(self, texts: Texts, device: torch.device):
        super().__init__()
        self.texts, self.device = texts, device

    def forward(self, prompts: list[str]) -> Tensor:
        return self.texts(prompts).to(self.device)


# ------------------------------------------------------------------------------------------- the measures


def enough(wanted: Tensor, each: int = MIN_EACH) -> Tensor:
    r"""(A,) bool: the attributes that at least `each` of the pictures want, and as many do not; wanted (N, A) bool."""
    return (wanted.sum(dim=0) >= each) & ((~wanted).sum(dim=0) >= each)


def adherence(
    wanted: Tensor, seen: Tensor, names: tuple[str, ...], groups: Tensor, countable: Tensor
) -> dict:
    r"""Balanced accuracy of what the classifier sees against what the prompts want, by attribute, and its mean.

    Args:
        wanted, seen: (N, A) bool. groups: (N,) long, the number of each picture's prompt.
        countable: (A,) bool, the attributes that count where the pictures have both values of them; see RULE.
    Returns:
        `n`, of how many `prompts`, `mean` over the counted attributes, its `interval`, and `attributes`: how many want
        each, balanced accuracy, its interval, and whether it counts.
    """
    positive, counted = wanted.sum(dim=0), countable & enough(wanted, 1)
    _, groups, sizes = groups.unique(return_inverse=True, return_counts=True)
    accuracy = metrics.balanced_accuracy(wanted, seen)
    low, high = metrics.balanced_interval(wanted, seen, 1 / sizes[groups])
    interval = None
    if counted.any():
        interval = metrics.bootstrap_interval(wanted[:, counted], seen[:, counted], groups)
    by_name = zip(
        names,
        positive.tolist(),
        accuracy.tolist(),
        low.tolist(),
        high.tolist(),
        counted.tolist(),
        strict=True,
    )
    return {
        "n": len(wanted),
        "prompts": len(sizes),
        "mean": accuracy[counted].mean().item() if counted.any() else None,
        "interval": interval,
        "counted": int(counted.sum()),
        "attributes": {
            name: {"wanted": k, "balanced_accuracy": p, "interval": [a, b], "counted": c}
            for name, k, p, a, b, c in by_name
        },
    }


def subset(pictures: Pictures, rows: np.ndarray) -> Pictures:
    r"""Some rows of a data set as a data set of their own."""
    captions = None if pictures.captions is None else tuple(pictures.captions[i] for i in rows)
    attributes = None if pictures.attributes is None else pictures.attributes[rows]
    return Pictures(
        pictures.pixels[rows],
        pictures.good[rows],
        pictures.split[rows],
        attributes,
        captions,
        (),
        key_of(pictures.key, "rows", rows.tolist()),
    )


class Evaluation:
    r"""One run measured: the method called like a part returns what goes into the result under that name.

    Attributes:
        held: the n held-out pictures, as a data set of their own; x: the same, (n, 3, S, S).
        prompts: their full captions.
        files: name -> function of the path to write to, for all files but the JSON.
    """

    def __init__(
        self, model: TextToImage, pictures: Pictures, rows: np.ndarray, cache: Path, a, precision: str
    ):
        self.model, self.pictures, self.cache, self.a, self.precision = (model, pictures, cache, a, precision)
        self.judging = (
            "fp32" if precision == "fp16" else precision
        )  # the classifier's training scales no loss
        self.scope, self.main = SCOPES[a.scope], Setting(a.sampler, a.steps, a.guidance, a.eta)
        self.held, self.n = subset(pictures, rows), len(rows)
        self.x = self.held.batch(np.arange(self.n))
        self.prompts = [self.held.full_caption(i) for i in range(self.n)]
        self.groups = torch.tensor([self.prompts.index(p) for p in self.prompts])
        self.drawn: dict[Setting, Tensor] = {}
        self.files: dict[str, Callable[[Path], None]] = {}
        self.classifier = None
        self.extract = None if a.extractor == "classifier" else feature_extractor(a.extractor, model.device)

    def prepare(self):
        r"""What the parts need from the cache, or made now: classifier, the prompts' embeddings, latents."""
        parts = set(self.a.only)
        if self.needs_classifier(parts):
            with suppress(NothingToLearn):
                self.classifier = attribute_classifier(
                    self.cache, self.pictures, self.model.device, self.judging, progress=progress_bar
                )
                self.extract = self.extract or self.classifier.features
        if parts - {"vae", "latents"}:
            self.texts = Texts(self.cache, self.model.text, self.prompts, progress=progress_bar)
            self.model.text = Remembered(self.texts, self.model.device)
        if parts & {"latents", "loss", "bits"}:
            self.latents = encode_latents(self.cache, self.model.vae, self.held, self.precision, progress_bar)

    def needs_classifier(self, parts: set[str]) -> bool:
        return bool(parts & READING or ("frechet" in parts and self.a.extractor == "classifier"))

    # ---- what several parts need

    @property
    def curve_n(self) -> int:
        return min(self.n, self.scope.curve_prompts or self.n)

    def draw(self, setting: Setting, n: int) -> Tensor:
        r"""The pictures of the first n prompts; those of a setting are drawn once."""
        have = self.drawn.get(setting, self.x[:0])
        if len(have) < n:  # picture i follows from (seed, i, prompt i) alone, so some may be drawn already
            batches = -(-(n - len(have)) // BATCH)
            label = f"{setting.name}, {setting.steps} steps, guidance {setting.guidance:g}"
            with tqdm(total=setting.steps * batches, desc=label, leave=False, disable=None) as bar:
                new = self.model.sample(
                    self.prompts[len(have) : n],
                    setting.sampler,
                    setting.steps,
                    setting.guidance,
                    self.a.seed,
                    callback=lambda state: bar.update(),
                    eta=setting.eta,
                    precision=self.precision,
                    batch_size=BATCH,
                    first=len(have),
                )
            self.drawn[setting] = torch.cat([have, new.cpu()])
        return self.drawn[setting][:n]

    @torch.no_grad()
    def through(self, network: Callable[[Tensor], Tensor], x: Tensor, label: str) -> Tensor:
        r"""A network over many pictures in fp32, batch by batch."""
        parts = progress_bar(x.split(BATCH), -(-len(x) // BATCH), label)
        return torch.cat([network(part.to(self.model.device)).float().cpu() for part in parts])

    def features(self, x: Tensor) -> Tensor:
        if self.extract is None:
            raise LeftOut(f"{NO_CLASSIFIER}; --extractor efficientnet-lite0 needs none")
        return self.through(self.extract, x, f"features, {self.a.extractor}")

    def decoded(self, x: Tensor) -> Tensor:
        r"""decode(encode(x).mode()): what the VAE lets through."""

        def network(x: Tensor) -> Tensor:
            with autocast(self.model.device, self.precision):
                x_hat = self.model.vae.decode(
                    self.model.vae.encode(x.contiguous(memory_format=CHANNELS_LAST)).mode()
                )
            return x_hat.clamp(-1, 1)

        return self.through(network, x, "encoding and decoding")

    @cached_property
    def reconstructed(self) -> Tensor:
        return self.decoded(self.x)

    @cached_property
    def others(self) -> Tensor:
        r"""As many pictures of the train split as are held out."""
        train = self.pictures.rows(TRAIN)
        order = torch.randperm(len(train), generator=generator(self.a.seed, "evaluation", "others"))
        return self.pictures.batch(np.sort(train[order[: self.n].numpy()]))

    @cached_property
    def real_gaussian(self) -> tuple[Tensor, Tensor]:
        return gaussian_of(self.real_features)

    @cached_property
    def real_features(self) -> Tensor:
        return self.features(self.x)

    def seen(self, x: Tensor) -> Tensor:
        r"""What the classifier sees in pictures, (N, A) bool."""
        if self.classifier is None:
            raise LeftOut(NO_CLASSIFIER)
        return self.through(self.classifier, x, "reading attributes") > 0

    @cached_property
    def wanted(self) -> Tensor:
        return truths(self.held, np.arange(self.n))[:, self.classifier.columns]

    @cached_property
    def countable(self) -> Tensor:
        r"""(A,) bool: what enough of the held-out pictures have or lack, and the classifier can be trusted with."""
        return enough(self.wanted) & (metrics.balanced_accuracy(self.wanted, self.seen(self.x)) >= MIN_READ)

    def scores(self, seen: Tensor, rows: Tensor | slice = slice(None)) -> dict:
        r"""`adherence` of what was seen in pictures of the prompts `rows`."""
        return adherence(self.wanted[rows], seen, self.classifier.names, self.groups[rows], self.countable)

    # ---- the parts

    def adherence(self) -> dict:
        r"""Do the pictures show what their prompts say? Beside it, what the classifier reads from real pictures.

        `reconstructed` says what the VAE alone costs: pictures that are the prompt's own, but for the VAE.
        """
        seen = {
            "real": self.seen(self.x),
            "reconstructed": self.seen(self.reconstructed),
            "generated": self.seen(self.draw(self.main, self.n)),
        }
        apart = attributes_apart(self.pictures, self.held)
        result = {"rule": RULE, "unseen_means": UNSEEN, "far_means": FAR}
        for name, rows in (("held_out", apart >= 0), ("unseen", apart >= 1), ("far", apart >= 2)):
            if rows.any():
                result[name] = {source: self.scores(what[rows], rows) for source, what in seen.items()}
        self.files["adherence.png"] = lambda to: plot_adherence(to, result["held_out"])
        return result

    def frechet(self) -> dict:
        r"""Distance, precision and recall against the held-out pictures, beside baselines of as many pictures."""
        S = self.x.shape[-1]
        sets = {
            "generated": self.draw(self.main, self.n),
            "train pictures": self.others,
            "train pictures through the VAE": self.decoded(self.others),
            "train pictures, blurred by 2 pixels of 64": gaussian_blur(
                self.others, S / 32, reach=max(6, 6 * S // 64)
            ),
            "their mean": self.others.mean(dim=0, keepdim=True),
        }
        result = {}
        for name, x in sets.items():
            features = self.features(x).expand(len(x) if len(x) > 1 else self.n, -1)
            precision, recall = precision_recall(self.real_features, features)
            distance = frechet_distance(*self.real_gaussian, *gaussian_of(features))
            result[name] = {
                "n": len(features),
                "distance": distance,
                "precision": precision,
                "recall": recall,
            }
        return result

    def neighbours(self) -> dict:
        r"""How near the generated pictures come to training pictures and to their mirror images, trained on as well.

        Beside it how near held-out pictures come, as they are and through the VAE: what is smooth is near to much. A
        ratio of medians near 1 is as new as new photographs are; near 0, copies.
        """
        train, result, found = self.pictures.rows(TRAIN), {}, {}
        generated, many = self.draw(self.main, self.n), 2 * -(-len(train) // 512)

        def pool() -> Iterator[Tensor]:
            for mirrored in (False, True):
                for begin in range(0, len(train), 512):
                    rows = train[begin : begin + 512]
                    yield self.pictures.batch(rows, torch.full((len(rows),), mirrored))

        spaces = {"pixels": lambda x: x.flatten(1)}
        if self.classifier is not None:
            spaces["features"] = lambda x: torch.cat(
                [self.classifier.features(b.to(self.model.device)).cpu() for b in x.split(BATCH)]
            )
        for name, network in spaces.items():
            with torch.no_grad():
                queries = network(torch.cat([generated, self.x, self.reconstructed]))
                pictures = progress_bar(pool(), many, f"nearest training pictures, {name}")
                distances, places = nearest(queries, map(network, pictures))
            found[name] = distances[: self.n], places[: self.n]
            mine, held_out, smooth = distances[:, 0].split(self.n)
            result[name] = {"n_train": len(train), "generated_median": mine.median().item()}
            for of, theirs in (("held_out", held_out), ("reconstructed", smooth)):
                nearer = (mine < theirs.quantile(0.01)).double().mean().item()
                result[name] |= {
                    f"{of}_median": theirs.median().item(),
                    f"ratio_to_{of}": (mine.median() / theirs.median()).item(),
                    f"nearer_than_1_percent_of_{of}": nearer,
                }
        self.files["neighbours.png"] = self.neighbour_grid(generated, train, found)
        return result

    def neighbour_grid(self, generated: Tensor, train: np.ndarray, found: dict) -> Callable[[Path], None]:
        r"""The eight generated pictures that come nearest to a training picture, each before its neighbours."""
        closest = found[next(reversed(found))][0][:, 0].argsort(stable=True)[:8].tolist()
        pictures, labels = [], []
        for i in closest:
            pictures.append(generated[i : i + 1])
            labels.append(self.prompts[i])
            for name, (distances, places) in found.items():
                mirrored, rows = places[i] >= len(train), train[(places[i] % len(train)).numpy()]
                pictures.append(self.pictures.batch(rows, mirrored))
                labels += [f"{name} {distance:.2f}" for distance in distances[i].tolist()]
        grid = labelled_grid(torch.cat(pictures), labels, columns=len(labels) // len(closest), side=96)
        return lambda to: save_png(to, grid)

    def vae(self) -> dict:
        r"""PSNR in dB and SSIM of the held-out pictures through the VAE."""
        values = {"psnr": psnr(self.x, self.reconstructed), "ssim": ssim(self.x, self.reconstructed)}
        return {"n": self.n, **{name: value.mean().item() for name, value in values.items()}}

    def latent_health(self) -> dict:
        r"""Mean, variance, KL and correlation of the channels of the scaled latents."""
        q = self.latents.gaussian(np.arange(self.n), torch.zeros(self.n, dtype=torch.bool))
        result = {
            "n": self.n,
            "scale": self.model.latent_scale,
            **metrics.latent_health(q, self.model.latent_scale),
        }
        self.files["latents.png"] = lambda to: plot_latents(to, result)
        return result

    def loss(self) -> dict:
        r"""The loss in each tenth of the time axis, on fixed noise."""
        n = min(self.n, 256)
        tenths = loss_by_timestep(
            self.model, self.latents, self.texts, self.held, np.arange(n), self.precision, seed=self.a.seed
        )
        self.files["loss.png"] = lambda to: plot_loss(to, tenths, self.model.config.prediction)
        return {
            "n": n,
            "prediction": self.model.config.prediction,
            "tenths": tenths,
            "mean": sum(tenths) / len(tenths),
        }

    def bits(self) -> dict:
        r"""Bits a dimension, by the variational bound; the decoder's width is its mean error on train pictures."""
        n = min(self.n, 64)
        width = (self.others[:n] - self.decoded(self.others[:n])).abs().mean().item()
        rows = np.arange(n)
        found = bits_per_dimension(
            self.model,
            self.latents,
            self.texts,
            self.held,
            rows,
            width,
            precision=self.precision,
            seed=self.a.seed,
        )
        return {"n": n, "variance": self.model.config.variance, "width": width, **found}

    def point(self, setting: Setting) -> dict:
        r"""One point of a curve."""
        if self.classifier is None and self.extract is None:
            raise LeftOut(NO_CLASSIFIER)
        x, point = self.draw(setting, self.curve_n), setting._asdict() | {"n": self.curve_n}
        if self.classifier is not None:
            told = self.scores(self.seen(x), slice(self.curve_n))
            point |= {"adherence": told["mean"], "interval": told["interval"], "counted": told["counted"]}
        if self.extract is not None:
            real = gaussian_of(self.real_features[: self.curve_n])
            point["frechet"] = frechet_distance(*real, *gaussian_of(self.features(x)))
        return point

    def guidance_curve(self) -> list[dict]:
        r"""Adherence and Frechet distance over the guidance scale; same prompts, same noise."""
        points = [self.point(setting) for setting in guidance_settings(self.main, self.scope)]
        self.files["guidance.png"] = lambda to: plot_points(to, points, "guidance", lambda p: self.main.name)
        return points

    def steps_curve(self) -> list[dict]:
        r"""Adherence and Frechet distance over the number of steps of each sampler; same prompts, same noise."""
        points = [self.point(setting) for setting in steps_settings(self.main, self.scope, self.model)]
        self.files["steps.png"] = lambda to: plot_points(to, points, "steps", name_of)
        return points

    def grid(self) -> Callable[[Path], None]:
        r"""The first pictures of up to 32 distinct prompts."""
        first = sorted({self.prompts.index(p) for p in self.prompts})[:32]
        prompts = [self.prompts[i] for i in first]
        sheet = labelled_grid(self.draw(self.main, self.n)[first], prompts, 8)
        settings = {
            "prompt": json.dumps(prompts),
            "seed": str(self.a.seed),
            **{k: str(v) for k, v in self.main._asdict().items()},
        }
        return lambda to: save_png(to, sheet, settings)


def attributes_apart(pictures: Pictures, held: Pictures) -> Tensor:
    r"""(n,) in how many of the forty attributes, as full captions say them, a held-out picture's row differs from the
    training picture's that is the nearest; 0: it has been seen."""
    mine, known = (
        truths(held, np.arange(len(held.pixels))),
        truths(pictures, pictures.rows(TRAIN)).unique(dim=0),
    )
    mine, known = mine.double(), known.double()
    return (mine @ (1 - known).T + (1 - mine) @ known.T).min(dim=1).values.long()


def guidance_settings(main: Setting, scope: Scope) -> list[Setting]:
    return [main._replace(guidance=g) for g in scope.guidances]


def steps_settings(main: Setting, scope: Scope, model: TextToImage) -> list[Setting]:
    T = model.schedule.timesteps
    ways = [(sampler, 0.0) for sampler in SAMPLERS] + [("dpm++", 1.0)]
    settings = [
        Setting(sampler, n, main.guidance, eta) for sampler, eta in ways for n in scope.steps if n <= T
    ]
    return settings + [Setting("ddpm", T, main.guidance)] * scope.whole_chain


METHODS = {  # part -> method
    "adherence": Evaluation.adherence,
    "frechet": Evaluation.frechet,
    "neighbours": Evaluation.neighbours,
    "vae": Evaluation.vae,
    "latents": Evaluation.latent_health,
    "loss": Evaluation.loss,
    "bits": Evaluation.bits,
    "guidance": Evaluation.guidance_curve,
    "steps": Evaluation.steps_curve,
}
DRAWING = {"adherence", "frechet", "neighbours"}  # parts that look at the pictures of the main setting
READING = {
    "adherence",
    "neighbours",
    "guidance",
    "steps",
}  # parts that ask the classifier, if there can be one


# ----------------------------------------------------------------------------------------------- the time


@torch.no_grad()
def seconds_each(work: Callable[[], object], device: torch.device) -> float:
    r"""Seconds that `work` takes on the device once it has warmed up."""
    work()
    wait_for(device)
    started = time.monotonic()
    work()
    wait_for(device)
    return time.monotonic() - started


def estimate(e: Evaluation, parts: Iterable[str]) -> float:
    r"""Seconds that the parts will take, bits a dimension aside, from a batch of each kind of work.

    A classifier that is in the cache already is free.
    """
    model, parts, b = e.model, set(parts), min(BATCH, e.n)
    each = partial(seconds_each, device=model.device)
    z, t = (torch.randn(b, *model.latent_shape, device=model.device), torch.zeros(b, dtype=torch.long))
    context, x = torch.zeros(b, 77, 512, device=model.device), e.x[:b].to(model.device)
    with autocast(model.device, e.precision):
        call = each(lambda: model.unet(z, t.to(model.device), context)) / b
        code = each(lambda: model.vae.decode(model.vae.encode(x).mode())) / b
    drawings = {e.main: e.n} if parts & DRAWING else {}
    curves = guidance_settings(e.main, e.scope) * ("guidance" in parts)
    curves += steps_settings(e.main, e.scope, model) * ("steps" in parts)
    for setting in curves:
        drawings[setting] = max(drawings.get(setting, 0), e.curve_n)
    seconds = sum(n * (setting.calls * call + code) for setting, n in drawings.items())
    seconds += 4 * e.n * code + e.n * (10 * call if "loss" in parts else 0)

    names = learnable_names(e.pictures)
    network = AttributeClassifier(names).to(model.device) if names else None
    read = each(lambda: network(x)) / b if names else 0.0
    if names and e.needs_classifier(parts) and not classifier_path(e.cache, e.pictures, e.judging).exists():
        seconds += training_seconds(network, e.x, e.judging)
    extract = read if e.extract is None else each(lambda: e.extract(x)) / b
    seconds += (4 * e.n * ("frechet" in parts) + e.curve_n * len(curves) + e.n) * extract
    seconds += 2 * len(e.pictures.rows(TRAIN)) * read * ("neighbours" in parts)
    told = e.prompts[:8]
    if parts - {"vae", "latents"}:
        seconds += len(set(e.prompts)) * each(lambda: model.text(told)) / len(told)
    return seconds


# ---------------------------------------------------------------------------------------------- the plots


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path):
    figure.savefig(path, format="png", dpi=110)


def plot_adherence(path: Path, sources: dict):
    r"""Balanced accuracy of each attribute: generated pictures as bars, the classifier's own accuracy as marks."""
    drawn = sources["generated"]["attributes"]
    names = sorted((n for n in drawn if drawn[n]["counted"]), key=lambda n: drawn[n]["balanced_accuracy"])
    figure = new_figure(7, 1.5 + 0.22 * len(names))
    axis = figure.subplots()
    values = {s: [of["attributes"][n]["balanced_accuracy"] for n in names] for s, of in sources.items()}
    axis.barh(names, values["generated"], color="#4477aa", label="generated")
    axis.plot(values["reconstructed"], names, "|", ms=10, color="#cc6677", label="real, through the VAE")
    axis.plot(values["real"], names, ".", color="#222222", label="real")
    axis.axvline(0.5, color="#888888", lw=0.8)
    axis.set(xlim=(0.4, 1.02), xlabel="balanced accuracy; 0.5 is chance")
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    save_figure(figure, path)


def plot_points(path: Path, points: list[dict], x: str, line: Callable[[dict], str]):
    r"""The points of a curve: adherence beside Frechet distance, a line for each name that `line` gives."""
    figure = new_figure(9, 3.5)
    for axis, y in zip(figure.subplots(1, 2), ("adherence", "frechet"), strict=True):
        for name in dict.fromkeys(map(line, points)):
            mine = [p for p in points if line(p) == name and p.get(y) is not None]
            axis.plot([p[x] for p in mine], [p[y] for p in mine], "o-", ms=4, label=name)
        axis.set(xlabel=x, ylabel="mean balanced accuracy" if y == "adherence" else "Frechet distance")
        axis.set_xscale("log" if x == "steps" else "linear")
        values = sorted({p[x] for p in points})
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.legend()
    save_figure(figure, path)


def plot_loss(path: Path, tenths: list[float], prediction: str):
    r"""The loss over the tenths of the time axis."""
    figure = new_figure(5, 3.5)
    axis = figure.subplots()
    axis.plot(range(1, len(tenths) + 1), tenths, "o-", ms=4, color="#4477aa")
    axis.set(
        xlabel="tenth of the time axis, from the picture to noise",
        ylabel=f"held-out loss ({prediction})",
        yscale="log",
    )
    save_figure(figure, path)


def plot_latents(path: Path, health: dict):
    r"""The latents' moments by channel, and their correlations."""
    figure = new_figure(9, 3.5)
    bars, square = figure.subplots(1, 2)
    for k, name in enumerate(("mean", "variance", "kl")):
        bars.bar(np.arange(len(health[name])) + 0.27 * (k - 1), health[name], 0.27, label=name)
    bars.set(xlabel="channel of the scaled latent")
    bars.legend()
    image = square.imshow(health["correlation"], vmin=-1, vmax=1, cmap="RdBu_r")
    square.set(xlabel="channel", title="correlation")
    figure.colorbar(image)
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------- the command


def check(a: argparse.Namespace):
    r"""Refuse what cannot be before anything slow is loaded."""
    cli.check_drawing(a)
    a.only = tuple(PARTS) if a.only is None else tuple(part.strip() for part in a.only.split(","))
    if unknown := [part for part in a.only if part not in PARTS]:
        raise UserError(
            f"expected --only with some of {','.join(PARTS)}, got {', '.join(map(repr, unknown))}"
        )
    if not Path(a.run).is_dir():
        raise UserError(f"expected the folder of a run, {a.run} is none; train one with python train.py")
    ships = Path(a.run).resolve() == SHIPPED.resolve()  # the package's own folder stays as it is
    out = a.out = Path(a.out or (Path("runs/shipped-evaluation") if ships else Path(a.run) / "evaluation"))
    a.cache = Path(a.cache or (Path("runs/cache") if ships else Path(a.run).parent / "cache"))
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError:
        raise UserError(
            f"expected a folder that can be written to, {there} cannot; choose another --out"
        ) from None


def open_run(a: argparse.Namespace, cache: Path) -> tuple[TextToImage, Config, Pictures]:
    r"""The run's model and its data; UserError where either is not whole."""
    model = TextToImage.load(a.run, a.weights)
    if a.steps > model.schedule.timesteps:
        raise UserError(
            f"expected --steps from 1 to {model.schedule.timesteps}, the model's chain, got {a.steps}"
        )
    config = Config.read(Path(a.run) / "config.json")
    if a.data is not None:
        config = config.with_training(data=a.data)
    try:
        table = open_data(config)
    except DataError as error:
        raise UserError(f"{error}; or say with --data where the run's data is now") from None
    return model, config, load_pictures(config, table, cache, progress_bar)


def choose_rows(pictures: Pictures, a: argparse.Namespace) -> np.ndarray:
    r"""n rows of the split, shuffled by the seed; without --n as many as the scope wants or there are.

    Shuffled, for the curves take the first of them, and drawn faces stand four of a prompt together.
    """
    rows = pictures.rows(SPLITS[a.split])
    n = min(SCOPES[a.scope].prompts, len(rows)) if a.n is None else a.n
    if len(rows) < MIN_EACH:
        raise UserError(
            f"expected at least {MIN_EACH} pictures in the {a.split} split, got {len(rows)}; see --split"
        )
    if not MIN_EACH <= n <= len(rows):
        raise UserError(
            f"expected --n from {MIN_EACH} to {len(rows)}, the pictures of the {a.split} split, got {n}"
        )
    return rows[torch.randperm(len(rows), generator=generator(a.seed, "evaluation", "rows"))[:n].numpy()]


def rounded(value):
    r"""The same with six digits a number; what is not a number becomes null."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def settings_of(e: Evaluation, config: Config, device: torch.device) -> dict:
    r"""What a person needs to get the same figures again, and to see whether weights and data are the same."""
    a, t, m = e.a, config.training, config.model
    return {
        "run": str(a.run),
        "preset": config.preset,
        "data": t.data,
        "image_size": m.image_size,
        "crop": t.crop or "automatic",
        "split": a.split,
        "n": e.n,
        "extractor": a.extractor,
        "sampler": a.sampler,
        "steps": a.steps,
        "guidance": a.guidance,
        "eta": a.eta,
        "weights": a.weights,
        "text_weights": m.text_weights,
        "seed": a.seed,
        "scope": a.scope,
        "precision": e.precision,
        "device": str(device),
        "ddpm": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "digests": {
            "vae": digest_of([e.model.vae.state_dict(), e.model.latent_scale]),
            "unet": digest_of(e.model.unet.state_dict()),
            "data": key_of(e.pictures.key),
        },
    }


def summary(result: dict) -> Iterator[str]:
    r"""What a person reads of a result, or of one of its parts, in lines."""
    for name in ("held_out", "unseen", "far"):
        if told := result.get("adherence", {}).get(name):
            mine = told["generated"]
            low, high = mine["interval"] or (math.nan, math.nan)
            figures = {source: told[source]["mean"] or math.nan for source in told}
            yield (
                f"adherence, {name.replace('_', '-')}, {mine['n']} pictures of {mine['prompts']} prompts: "
                f"{figures['generated']:.3f} ({low:.3f} to {high:.3f}) over {mine['counted']} attributes; real "
                f"pictures {figures['real']:.3f}, through the VAE {figures['reconstructed']:.3f}"
            )
    for name, row in result.get("frechet", {}).items():
        if isinstance(row, dict):
            yield (
                f"Frechet distance, n {row['n']}, {name}: {row['distance']:.3g}; precision {row['precision']:.2f}, "
                f"recall {row['recall']:.2f}"
            )
    for name, row in result.get("neighbours", {}).items():
        told = (
            f"{row[f'ratio_to_{of}']:.2f} of the distance of {what}, {row[f'nearer_than_1_percent_of_{of}']:.1%} "
            "nearer than the nearest 1 % of those"
            for of, what in (
                ("held_out", "held-out ones"),
                ("reconstructed", "held-out ones through the VAE"),
            )
        )
        yield f"nearest training picture, {name}: {'; '.join(told)}"
    if told := result.get("vae"):
        yield f"VAE, n {told['n']}: {told['psnr']:.2f} dB PSNR, {told['ssim']:.4f} SSIM"
    if told := result.get("loss"):
        yield f"loss ({told['prediction']}), n {told['n']}: {told['mean']:.4f}"
    if told := result.get("bits"):
        own, picture = told["latent"][told["variance"]], told["picture"]
        yield (
            f"bits a dimension, n {told['n']}: latents {own['total']:.2f} +- {own['standard_error']:.2f} (Sigma "
            f"{told['variance']}), pictures {picture['total']:.2f} +- {picture['standard_error']:.2f}: latent "
            f"{picture['latent']:.2f}, error {picture['error']:.2f}"
        )
    for part in ("guidance", "steps"):
        for p in result.get(part, []):
            told = ", ".join(f"{y} {p[y]:.3g}" for y in ("adherence", "frechet") if p.get(y) is not None)
            yield f"{name_of(p)}, {p['steps']} steps, guidance {p['guidance']:g}, n {p['n']}: {told}"


def write(out: Path, result: dict, files: dict[str, Callable[[Path], None]]):
    r"""Replace the evaluation in `out` once the new one is on the disk; the old JSON stays as result.previous.json.

    The JSON comes last, so a folder that has it is whole.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(result), indent=2, allow_nan=False)
    with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as folder:
        new = Path(folder)
        for name, content in files.items():
            write_atomically(new / name, content)
        write_atomically(new / FILES[0], (text + "\n").encode())
        if (out / FILES[0]).exists():
            (out / FILES[0]).replace(out / "result.previous.json")
        for name in reversed(FILES):
            if (new / name).exists():
                (new / name).replace(out / name)
            else:
                (out / name).unlink(missing_ok=True)


def main(argv: list[str] | None = None):
    r"""The command `python -m ddpm.evaluation`."""
    a = parser().parse_args(argv)
    check(a)
    device = devices.choose_device(a.device)
    precision = devices.choose_precision(a.precision, device)
    model, config, pictures = open_run(a, a.cache)
    rows = choose_rows(pictures, a)
    model.to(device, memory_format=CHANNELS_LAST)
    e = Evaluation(model, pictures, rows, a.cache, a, precision)
    say(f"{len(rows)} {a.split} pictures of {config.training.data}, {precision} on {device}")
    say(f"about {estimate(e, a.only) / 60:.1f} minutes for {', '.join(a.only)}")

    result = {"format": 2, "settings": settings_of(e, config, device)}
    seconds, left_out = {}, {}
    for part in ("prepare", *a.only):
        started = time.monotonic()
        try:
            if part == "prepare":
                e.prepare()
            else:
                result[part] = METHODS[part](e)
                for line in summary({part: result[part]}):  # at once: what comes after may fail
                    say(line)
        except LeftOut as reason:
            left_out[part] = str(reason)
            say(f"{part} left out: {reason}")
        seconds[part] = round(time.monotonic() - started, 1)
        say(f"{part}: {seconds[part]:.0f} s")
    if DRAWING & set(a.only):
        e.files["pictures.png"] = e.grid()
    write(a.out, result | {"left_out": left_out, "seconds": seconds}, e.files)
    say(f"wrote {a.out}")


if __name__ == "__main__":
    sys.exit(cli.exit_code(main))
