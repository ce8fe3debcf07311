r"""What the parts of an evaluation share: pictures, and what is seen in them, each drawn or computed once."""

import argparse
import json
import time
from collections.abc import Callable
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.config import TrainConfig
from ddpm.evaluation import metrics
from ddpm.evaluation.choices import CURVES, SCOPES, Setting, curve_settings
from ddpm.evaluation.classifier import attribute_classifier, learnable_names, truths
from ddpm.evaluation.features import feature_extractor
from ddpm.evaluation.prompts import prompts_of
from ddpm.model import TextToImage
from ddpm.tools.command import bar, progress_bar
from ddpm.tools.devices import autocast, wait_for
from ddpm.tools.grids import labelled_grid
from ddpm.tools.seeding import generator
from ddpm.training.caches import Texts, encode_latents

DRAWING = {"adherence", "frechet", "neighbours"}  # parts that look at the pictures of the main setting
# Parts that use the classifier, if there is one.
READING = {"adherence", "wordings", "neighbours", "guidance", "steps"}
MIN_READ = 0.8  # balanced accuracy on real pictures, for an attribute to count
NO_CLASSIFIER = "the data has no attribute with enough pictures of both values to train a classifier on"
BATCH = 32
SPREAD_PROMPTS, SPREAD_EACH = 16, 8  # distinct prompts of the part `spread`, and pictures of each


class LeftOut(Exception):
    r"""A part that this run or its data cannot have; the message says why."""


class Evaluation:
    r"""One model and the held-out pictures that it is measured on; the parts are functions of it.

    Attributes:
        held_out: the n held-out pictures, as a data set of their own; x: the same, (n, 3, S, S).
        prompts: kind -> prompts; `full` are the full captions, and `prompts_of` makes the others.
        groups: (n,) long, equal where the full captions are.
        training: how the model was trained.
        planned: (kind of prompts, setting) -> how many of these prompts the chosen parts draw with it.
        files: name -> plot or grid.
    """

    def __init__(
        self,
        model: TextToImage,
        pictures: Pictures,
        rows: np.ndarray,
        options: argparse.Namespace,
        training: TrainConfig = TrainConfig(),  # noqa: B008 (it is frozen)
    ):
        self.model = model
        self.training = training
        self.pictures = pictures
        self.options = options
        self.train_rows = pictures.rows(TRAIN)
        self.held_out = pictures.subset(rows)
        self.n = len(rows)
        self.x = self.held_out.batch(np.arange(self.n))
        full = [self.held_out.full_caption(i) for i in range(self.n)]
        self.prompts = {"full": full}
        number = {full[i]: i for i in reversed(range(self.n))}
        self.groups = torch.tensor([number[prompt] for prompt in full])
        self.files: dict[str, Figure | Image.Image] = {}
        self.classifier = None
        is_ready_made = options.extractor != "classifier"
        self.extract = feature_extractor(options.extractor, model.device) if is_ready_made else None
        scope = SCOPES[options.scope]
        self.main = Setting(
            options.sampler, options.steps, options.guidance, options.eta, options.noise_scale
        )
        self.curve_n = min(self.n, scope.curve_prompts)
        self.few_steps = model.config.few_steps
        self.curves = {} if self.few_steps else curve_settings(self.main, scope, model.schedule.timesteps)
        self.drawn: dict[tuple[str, Setting], Tensor] = {}
        parts = set(options.only)
        if not is_ready_made and not learnable_names(pictures):
            parts &= {"neighbours"}  # nothing else draws, because no classifier reads it
        of_curves = [
            ("full", setting) for part in CURVES if part in parts for setting in self.curves.get(part, ())
        ]
        self.planned = dict.fromkeys(of_curves, self.curve_n)
        if DRAWING & parts:
            self.planned["full", self.main] = self.n
        if "spread" in parts:
            distinct = list(dict.fromkeys(full))[:SPREAD_PROMPTS]
            self.prompts["spread"] = [prompt for prompt in distinct for _ in range(SPREAD_EACH)]
            self.planned["spread", self.main] = len(self.prompts["spread"])
        if "wordings" in parts and pictures.attributes is not None:
            others = prompts_of(self.held_out.attributes[: self.curve_n], options.seed)
            self.planned |= {(kind, self.main): len(prompts) for kind, prompts in others.items()}
            self.prompts |= others

    def check_all_times(self):
        r"""LeftOut for a model of few steps, which predicts at its own times alone."""
        if self.few_steps:
            raise LeftOut(
                f"this model was trained at {self.few_steps} times alone, and this part needs others"
            )

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
        return seconds / size / 60 * sum(n * setting.calls for (_, setting), n in self.planned.items())

    def prepare(self):
        r"""What the parts need from the cache, or made now: classifier, the prompts' embeddings, latents."""
        parts = set(self.options.only)
        cache, device, precision = self.options.cache, self.model.device, self.options.precision
        if parts & READING or ({"frechet", "spread"} & parts and self.extract is None):
            safe = "fp32" if precision == "fp16" else precision  # its training scales no loss
            self.classifier = attribute_classifier(cache, self.pictures, device, safe, progress_bar)
            if self.classifier is not None and self.extract is None:
                self.extract = self.classifier.features
        if parts - {"vae", "latents"}:
            prompts, limit_gb = chain(*self.prompts.values()), self.training.text_cache_gb
            self.texts = Texts(cache, self.model.text, prompts, limit_gb=limit_gb, progress=progress_bar)
            self.model.embed = lambda prompts: self.texts(prompts).to(device)
        if parts & {"latents", "loss", "bits"}:
            self.encoded = encode_latents(
                cache, self.model.vae, self.held_out, precision, progress_bar, ways=1
            )

    def draw(self, setting: Setting, kind: str = "full") -> Tensor:
        r"""The pictures of a planned setting, of the first prompts of a kind."""
        if (kind, setting) not in self.drawn:
            prompts = self.prompts[kind][: self.planned[kind, setting]]
            sampler, steps, guidance, eta, noise_scale = setting
            how = {"eta": eta, "noise_scale": noise_scale}
            how |= {"precision": self.options.precision, "batch_size": BATCH}
            with bar(total=steps * -(-len(prompts) // BATCH), desc=str(setting), leave=False) as progress:
                how["callback"] = lambda state: progress.update()
                x = self.model.sample(prompts, sampler, steps, guidance, self.options.seed, **how)
            self.drawn[kind, setting] = x.cpu()
        return self.drawn[kind, setting]

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
        g = generator(self.options.seed, "evaluation", "others")
        chosen = torch.randperm(len(self.train_rows), generator=g)[: self.n]
        return self.pictures.batch(np.sort(self.train_rows[chosen.numpy()]))

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
        seen = self.attributes(self.x)
        accuracy = metrics.balanced_accuracy(self.wanted, seen)
        return metrics.enough(self.wanted) & (accuracy >= MIN_READ)

    def scores(self, seen: Tensor, rows: Tensor | slice) -> dict:
        r"""`metrics.adherence` of the attributes seen in pictures of the prompts `rows`."""
        wanted, names, groups = self.wanted[rows], self.classifier.names, self.groups[rows]
        return metrics.adherence(wanted, seen, names, groups, self.countable)

    def grid(self) -> Image.Image:
        r"""The first pictures of up to 32 distinct full captions."""
        first = self.groups.unique()[:32].tolist()
        return self.sheet(self.draw(self.main)[first], [self.prompts["full"][i] for i in first])

    def sheet(self, x: Tensor, prompts: list[str]) -> Image.Image:
        r"""Pictures of the main setting above their prompts, with what drew them in `info`."""
        sheet = labelled_grid(x, prompts, columns=8)
        sheet.info |= {"prompt": json.dumps(prompts), "seed": str(self.options.seed)}
        sheet.info |= {name: str(value) for name, value in self.main._asdict().items()}
        return sheet
