r"""The parts of an evaluation: what is measured of one run, from pictures that are drawn once."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.evaluation import metrics, plots
from ddpm.evaluation.bits import bits_per_dimension
from ddpm.evaluation.choices import SAMPLERS, SCOPES, Scope, Setting
from ddpm.evaluation.classifier import attribute_classifier, gaussian_blur, truths
from ddpm.evaluation.features import feature_extractor
from ddpm.model import TextToImage
from ddpm.tools.command import bar, progress_bar
from ddpm.tools.devices import autocast, wait_for
from ddpm.tools.grids import labelled_grid
from ddpm.tools.seeding import generator
from ddpm.training.caches import Texts, encode_latents
from ddpm.training.validation import loss_by_timestep, psnr, ssim

DRAWING = {"adherence", "frechet", "neighbours"}  # parts that look at the pictures of the main setting
READING = {"adherence", "neighbours", "guidance", "steps"}  # parts that use the classifier, if there is one
MIN_READ = 0.8
RULE = (
    f"counted are attributes that the captions of at least {metrics.MIN_EACH} held-out pictures want and of "
    f"{metrics.MIN_EACH} do not, and that the classifier reads from the real ones with a balanced accuracy of at least "
    f"{MIN_READ}; of a part of the pictures, those among them that some of it want and some do not"
)
UNSEEN = "held-out pictures whose row of 40 attributes, as the full caption says it, no training picture has"
FAR = "those of them whose row differs from that of every training picture in two attributes or more"
NO_CLASSIFIER = "the data has no attribute with enough pictures of both values to train a classifier on"
BATCH = 32
POOL = 512  # training pictures that are compared at once


class LeftOut(Exception):
    r"""A part that this run or its data cannot have; the message says why."""


class CachedText(nn.Module):
    r"""The text tower with every prompt embedded once."""

    def __init__(self, texts: Texts, device: torch.device):
        super().__init__()
        self.texts = texts
        self.device = device

    def forward(self, prompts: list[str]) -> Tensor:
        return self.texts(prompts).to(self.device)


class Evaluation:
    r"""One run measured: the method called like a part returns what goes into the result under that name.

    Attributes:
        held_out: the n held-out pictures, as a data set of their own; x: the same, (n, 3, S, S).
        prompts: their full captions. groups: (n,) long, equal where the prompts are.
        planned: setting -> how many prompts the chosen parts draw with it.
        files: name -> plot or grid.
    """

    def __init__(self, model: TextToImage, pictures: Pictures, rows: np.ndarray, options: argparse.Namespace):
        self.model = model
        self.pictures = pictures
        self.options = options
        self.held_out = pictures.subset(rows)
        self.n = len(rows)
        self.x = self.held_out.batch(np.arange(self.n))
        self.prompts = [self.held_out.full_caption(i) for i in range(self.n)]
        self.groups = torch.tensor([self.prompts.index(prompt) for prompt in self.prompts])
        self.files: dict[str, Figure | Image.Image] = {}
        self.classifier = None
        self.extract = None
        if options.extractor != "classifier":
            self.extract = feature_extractor(options.extractor, model.device)

        scope = SCOPES[options.scope]
        self.main = Setting(options.sampler, options.steps, options.guidance, options.eta)
        self.curve_n = min(self.n, scope.curve_prompts)
        self.curves = {
            "guidance": [self.main._replace(guidance=scale) for scale in scope.guidances],
            "steps": steps_settings(options.guidance, scope, model.schedule.timesteps),
        }
        self.drawn: dict[Setting, Tensor] = {}
        self.planned: dict[Setting, int] = {}
        for part in options.only:
            self.planned |= dict.fromkeys(self.curves.get(part, ()), self.curve_n)
        if DRAWING & set(options.only):
            self.planned[self.main] = self.n

    @torch.no_grad()
    def minutes_of_drawing(self) -> float:
        r"""How long the planned pictures take here, from the UNet's time for one batch."""
        device = self.model.device
        size = min(BATCH, self.n)
        z_t = torch.zeros(size, *self.model.latent_shape, device=device)
        t = torch.zeros(size, dtype=torch.long, device=device)
        context = torch.zeros(size, 77, 512, device=device)
        for _ in range(2):  # the first call is slower
            wait_for(device)
            started = time.monotonic()
            with autocast(device, self.options.precision):
                self.model.unet(z_t, t, context)
            wait_for(device)
            seconds = time.monotonic() - started
        return seconds / size / 60 * sum(n * setting.calls for setting, n in self.planned.items())

    def prepare(self):
        r"""What the parts need from the cache, or made now: classifier, the prompts' embeddings, latents."""
        parts = set(self.options.only)
        cache = self.options.cache
        device = self.model.device
        precision = self.options.precision
        if parts & READING or ("frechet" in parts and self.extract is None):
            safe = "fp32" if precision == "fp16" else precision  # its training scales no loss
            self.classifier = attribute_classifier(cache, self.pictures, device, safe, progress_bar)
            if self.classifier is not None and self.extract is None:
                self.extract = self.classifier.features
        if parts - {"vae", "latents"}:
            self.texts = Texts(cache, self.model.text, self.prompts, progress=progress_bar)
            self.model.text = CachedText(self.texts, device)
        if parts & {"latents", "loss", "bits"}:
            self.encoded = encode_latents(cache, self.model.vae, self.held_out, precision, progress_bar)

    # ---- what several parts need

    def draw(self, setting: Setting) -> Tensor:
        r"""The pictures of a planned setting, of the first prompts."""
        if setting not in self.drawn:
            prompts = self.prompts[: self.planned[setting]]
            steps = setting.steps * -(-len(prompts) // BATCH)
            with bar(total=steps, desc=str(setting), leave=False) as progress:
                self.drawn[setting] = self.model.sample(
                    prompts,
                    setting.sampler,
                    setting.steps,
                    setting.guidance,
                    self.options.seed,
                    callback=lambda state: progress.update(),
                    eta=setting.eta,
                    precision=self.options.precision,
                    batch_size=BATCH,
                ).cpu()
        return self.drawn[setting]

    @torch.no_grad()
    def through(self, network: Callable[[Tensor], Tensor], x: Tensor, label: str = "") -> Tensor:
        r"""A network's output for many pictures, on the CPU in fp32, batch by batch."""
        batches = x.split(BATCH)
        if label:
            batches = progress_bar(batches, len(batches), label)
        return torch.cat([network(batch.to(self.model.device)).float().cpu() for batch in batches])

    def features(self, x: Tensor) -> Tensor:
        r"""What the Frechet distance compares, (N, D)."""
        if self.extract is None:
            raise LeftOut(f"{NO_CLASSIFIER}; --extractor efficientnet-lite0 needs none")
        return self.through(self.extract, x, f"features, {self.options.extractor}")

    def attributes(self, x: Tensor) -> Tensor:
        r"""What the classifier sees in pictures, (N, A) bool."""
        if self.classifier is None:
            raise LeftOut(NO_CLASSIFIER)
        return self.through(self.classifier, x, "reading attributes") > 0

    def decoded(self, x: Tensor) -> Tensor:
        r"""decode(encode(x).mode()): what the VAE lets through."""

        def network(x: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast(self.model.device, self.options.precision):
                return self.model.vae.decode(self.model.vae.encode(x).mode()).clamp(-1, 1)

        return self.through(network, x, "encoding and decoding")

    @cached_property
    def reconstructed(self) -> Tensor:
        return self.decoded(self.x)

    @cached_property
    def train_pictures(self) -> Tensor:
        r"""As many pictures of the train split as are held out."""
        train = self.pictures.rows(TRAIN)
        order = torch.randperm(len(train), generator=generator(self.options.seed, "evaluation", "others"))
        return self.pictures.batch(np.sort(train[order[: self.n].numpy()]))

    @cached_property
    def real_features(self) -> Tensor:
        return self.features(self.x)

    @cached_property
    def wanted(self) -> Tensor:
        r"""(n, A) bool: the attributes that the prompts want, of those that the classifier reads."""
        return truths(self.held_out, np.arange(self.n))[:, self.classifier.columns]

    @cached_property
    def countable(self) -> Tensor:
        r"""(A,) bool: attributes of enough held-out pictures, that the classifier reads well; see RULE."""
        accuracy = metrics.balanced_accuracy(self.wanted, self.attributes(self.x))
        return metrics.enough(self.wanted) & (accuracy >= MIN_READ)

    def scores(self, seen: Tensor, rows: Tensor | slice) -> dict:
        r"""`metrics.adherence` of the attributes seen in pictures of the prompts `rows`."""
        names = self.classifier.names
        return metrics.adherence(self.wanted[rows], seen, names, self.groups[rows], self.countable)

    # ---- the parts

    def adherence(self) -> dict:
        r"""Do the pictures show what their prompts say? Beside it, what the classifier reads from real pictures.

        `reconstructed` is what the VAE alone costs: pictures that are the prompt's own, but for the VAE.
        """
        seen = {
            "real": self.attributes(self.x),
            "reconstructed": self.attributes(self.reconstructed),
            "generated": self.attributes(self.draw(self.main)),
        }
        distance = attribute_distance(self.pictures, self.held_out)
        result = {"rule": RULE, "unseen_means": UNSEEN, "far_means": FAR}
        for least, name in enumerate(("held_out", "unseen", "far")):
            rows = distance >= least
            if rows.any():
                result[name] = {source: self.scores(values[rows], rows) for source, values in seen.items()}
        self.files["adherence.png"] = plots.plot_adherence(result["held_out"])
        return result

    def frechet(self) -> dict:
        r"""Distance, precision and recall against the held-out pictures, beside baselines of as many pictures."""
        side = self.x.shape[-1]
        train = self.train_pictures
        blurred = gaussian_blur(train, sigma=side / 32, reach=max(6, 6 * side // 64))
        sets = {
            "generated": self.draw(self.main),
            "train pictures": train,
            "train pictures through the VAE": self.decoded(train),
            "train pictures, blurred by 2 pixels of 64": blurred,
            "their mean": train.mean(dim=0, keepdim=True),
        }
        real = metrics.gaussian_of(self.real_features)
        result = {}
        for name, x in sets.items():
            features = self.features(x).expand(self.n, -1)  # one mean picture stands for n
            distance = metrics.frechet_distance(*real, *metrics.gaussian_of(features))
            precision, recall = metrics.precision_recall(self.real_features, features)
            result[name] = {"n": self.n, "distance": distance, "precision": precision, "recall": recall}
        return result

    def neighbours(self) -> dict:
        r"""How near the generated pictures come to training pictures and to their mirror images, trained on as well.

        Beside it how near held-out pictures come, as they are and through the VAE, because what is smooth is near to
        much. A ratio of medians near 1 is as new as new photographs are; near 0, copies.
        """
        queries = torch.cat([self.draw(self.main), self.x, self.reconstructed])
        found = {"pixels": self.nearest_train(nn.Flatten(), queries, "pixels")}
        if self.classifier is not None:
            found["features"] = self.nearest_train(self.classifier.features, queries, "features")
        result = {}
        for space, (distances, _) in found.items():
            generated, held_out, reconstructed = distances[:, 0].split(self.n)
            result[space] = {
                "n_train": len(self.pictures.rows(TRAIN)),
                "generated_median": generated.median().item(),
            }
            for name, others in (("held_out", held_out), ("reconstructed", reconstructed)):
                nearer = generated < others.quantile(0.01)
                result[space] |= {
                    f"{name}_median": others.median().item(),
                    f"ratio_to_{name}": (generated.median() / others.median()).item(),
                    f"nearer_than_1_percent_of_{name}": nearer.double().mean().item(),
                }
        self.files["neighbours.png"] = self.neighbour_grid(found)
        return result

    def nearest_train(self, network: Callable, queries: Tensor, label: str) -> tuple[Tensor, Tensor]:
        r"""`metrics.nearest` among all training pictures, and after them all their mirror images."""
        train = self.pictures.rows(TRAIN)
        chunks = [train[begin : begin + POOL] for begin in range(0, len(train), POOL)]

        def pool() -> Iterator[Tensor]:
            for mirrored in (False, True):
                for rows in chunks:
                    flip = torch.full((len(rows),), mirrored)
                    yield self.through(network, self.pictures.batch(rows, flip))

        parts = progress_bar(pool(), 2 * len(chunks), f"nearest training pictures, {label}")
        return metrics.nearest(self.through(network, queries), parts)

    def neighbour_grid(self, found: dict) -> Image.Image:
        r"""The eight generated pictures that come nearest to a training picture, each before its neighbours."""
        train = self.pictures.rows(TRAIN)
        nearest, _ = found.get("features", found["pixels"])
        closest = nearest[: self.n, 0].argsort(stable=True)[:8].tolist()
        pictures = []
        labels = []
        for i in closest:
            pictures.append(self.draw(self.main)[i : i + 1])
            labels.append(self.prompts[i])
            for space, (distances, places) in found.items():
                rows = train[(places[i] % len(train)).numpy()]
                pictures.append(self.pictures.batch(rows, flip=places[i] >= len(train)))
                labels += [f"{space} {distance:.2f}" for distance in distances[i].tolist()]
        return labelled_grid(torch.cat(pictures), labels, columns=len(labels) // len(closest), side=96)

    def vae(self) -> dict:
        r"""PSNR in dB and SSIM of the held-out pictures through the VAE."""
        return {
            "n": self.n,
            "psnr": psnr(self.x, self.reconstructed).mean().item(),
            "ssim": ssim(self.x, self.reconstructed).mean().item(),
        }

    def latents(self) -> dict:
        r"""Mean, variance, KL and correlation of the channels of the scaled latents."""
        q = self.encoded.gaussian(np.arange(self.n), torch.zeros(self.n, dtype=torch.bool))
        health = metrics.latent_health(q, self.model.latent_scale)
        self.files["latents.png"] = plots.plot_latents(health)
        return {"n": self.n, "scale": self.model.latent_scale, **health}

    def loss(self) -> dict:
        r"""The loss in each tenth of the time axis, on fixed noise."""
        n = min(self.n, 256)
        prediction = self.model.config.prediction
        inputs = (self.model, self.encoded, self.texts, self.held_out, np.arange(n))
        tenths = loss_by_timestep(*inputs, self.options.precision, seed=self.options.seed)
        self.files["loss.png"] = plots.plot_loss(tenths, prediction)
        return {"n": n, "prediction": prediction, "tenths": tenths, "mean": sum(tenths) / len(tenths)}

    def bits(self) -> dict:
        r"""Bits/dim, by the variational bound; the decoder's width is its mean error on train pictures."""
        n = min(self.n, 64)
        train = self.train_pictures[:n]
        width = (train - self.decoded(train)).abs().mean().item()
        inputs = (self.model, self.encoded, self.texts, self.held_out, np.arange(n))
        found = bits_per_dimension(*inputs, width, self.options.precision, seed=self.options.seed)
        return {"n": n, "variance": self.model.config.variance, "width": width, **found}

    def guidance(self) -> list[dict]:
        r"""Adherence and Frechet distance over the guidance scale; same prompts, same noise."""
        return self.curve("guidance")

    def steps(self) -> list[dict]:
        r"""Adherence and Frechet distance over the number of steps of each sampler; same prompts, same noise."""
        return self.curve("steps")

    def curve(self, x: str) -> list[dict]:
        r"""The points of the curve over `x`, and its plot."""
        points = [self.point(setting) for setting in self.curves[x]]
        self.files[f"{x}.png"] = plots.plot_curve(points, x)
        return points

    def point(self, setting: Setting) -> dict:
        r"""One point of a curve."""
        n = self.curve_n
        if self.extract is None:
            raise LeftOut(NO_CLASSIFIER)
        x = self.draw(setting)[:n]
        point = {**setting._asdict(), "n": n}
        if self.classifier is not None:
            scores = self.scores(self.attributes(x), slice(n))
            point["adherence"] = scores["mean"]
            point["interval"] = scores["interval"]
            point["counted"] = scores["counted"]
        real = metrics.gaussian_of(self.real_features[:n])
        point["frechet"] = metrics.frechet_distance(*real, *metrics.gaussian_of(self.features(x)))
        return point

    def grid(self) -> Image.Image:
        r"""The first pictures of up to 32 distinct prompts, with what drew them in `info`."""
        first = self.groups.unique()[:32].tolist()
        prompts = [self.prompts[i] for i in first]
        sheet = labelled_grid(self.draw(self.main)[first], prompts, columns=8)
        sheet.info |= {"prompt": json.dumps(prompts), "seed": str(self.options.seed)}
        sheet.info |= {name: str(value) for name, value in self.main._asdict().items()}
        return sheet


def attribute_distance(pictures: Pictures, held_out: Pictures) -> Tensor:
    r"""In how many of the forty attributes a held-out picture differs from the nearest training picture, (n,).

    The attributes are those that full captions say; at 0 the model has seen this row in training.
    """
    own = truths(held_out, np.arange(len(held_out.pixels))).double()
    known = truths(pictures, pictures.rows(TRAIN)).unique(dim=0).double()
    differences = own @ (1 - known).T + (1 - own) @ known.T
    return differences.min(dim=1).values.long()


def steps_settings(guidance: float, scope: Scope, timesteps: int) -> list[Setting]:
    r"""The points of the steps curve: all samplers, and dpm++ with noise."""
    kinds = [*((sampler, 0.0) for sampler in SAMPLERS), ("dpm++", 1.0)]
    counts = [steps for steps in scope.steps if steps <= timesteps]
    settings = [Setting(sampler, steps, guidance, eta) for sampler, eta in kinds for steps in counts]
    if scope.whole_chain:
        settings.append(Setting("ddpm", timesteps, guidance))
    return settings
