r"""What reads pictures: a small classifier of the attributes, trained on the run's own data, and ready-made networks.

The classifier reads what a model has drawn, so that a picture can be held against its prompt; its lower levels
describe pictures for the Frechet distance. It belongs to a data set, not to a model: every model trained on
the same pictures is read by the same classifier, from one file in the cache."""

import hashlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.celeba.captions import ATTRIBUTES, consistent
from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.tools.arrays import Progress, key_of, silent
from ddpm.tools.devices import autocast, wait_for
from ddpm.tools.errors import UserError
from ddpm.tools.seeding import generator
from ddpm.tools.weights import load_weights, save_weights

VERSION = 2  # of the network and of its training; another one is another file
SIDE = 64  # larger pictures are averaged down to it
WIDTHS = (64, 128, 192)
STEPS, BATCH, LR, WEIGHT_DECAY = 1_500, 64, 3e-3, 0.05
MIN_SHARE, MIN_PICTURES = (0.01, 30)  # of either value in the train split, for an attribute to be learned


class NothingToLearn(UserError):
    r"""The data has no attribute that a classifier could learn."""


class Residual(nn.Module):
    r"""x + BN(conv(relu(BN(conv(x))))), then relu (ResNet, figure 2); keeps the shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_1, self.conv_2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_1, self.norm_2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h + self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(h))))))


class AttributeClassifier(nn.Module):
    r"""Pictures (B, 3, S, S) in [-1, 1] -> one logit for each attribute in `names`, (B, A); above 0 is yes.

    Two by two pixels become twelve channels, so nothing is lost before the first convolution: a necklace is two
    pixels high. Three levels follow, at 32 x 32, 16 x 16 and 8 x 8.
    """

    def __init__(self, names: tuple[str, ...], widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        self.names = tuple(names)
        levels, before = [], 12
        for level, width in enumerate(widths):
            into = nn.Conv2d(before, width, 3, stride=2 if level else 1, padding=1, bias=False)
            levels.append(nn.Sequential(into, nn.BatchNorm2d(width), nn.ReLU(), Residual(width)))
            before = width
        self.levels, self.head = nn.ModuleList(levels), nn.Linear(before, len(self.names))
        self.register_buffer("deviation", torch.ones(sum(widths[:-1])))

    def means(self, x: Tensor) -> list[Tensor]:
        r"""The mean over the picture of the channels of each level, (B, width)."""
        if x.shape[-1] > SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="area")
        h, means = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last), []
        for level in self.levels:
            h = level(h)
            means.append(h.mean(dim=(2, 3)))
        return means

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.means(x)[-1])

    def features(self, x: Tensor) -> Tensor:
        r"""What a picture looks like, (B, D): the means of all levels but the last, of unit variance on real pictures.

        The last level keeps what tells the attributes apart and is taught to overlook blur and noise; of the levels
        below it, the Frechet distance of blurred pictures is several times that of other real ones.
        """
        return torch.cat(self.means(x)[:-1], dim=1) / self.deviation

    @property
    def columns(self) -> list[int]:
        r"""The places of `names` among the forty attributes."""
        return [ATTRIBUTES.index(name) for name in self.names]


# -------------------------------------------------------------------------------------------- what is true


def truths(pictures: Pictures, rows: np.ndarray) -> Tensor:
    r"""What the full captions of some pictures say of the forty attributes, (B, 40) bool.

    The full form names every positive attribute of `consistent(row)`, so what it does not name is absent; only
    No_Beard of a woman goes without saying, and is true.
    """
    return torch.from_numpy(
        np.array([consistent(row) for row in pictures.attributes[rows]]).reshape(-1, 40) > 0
    )


def learnable_names(pictures: Pictures) -> tuple[str, ...]:
    r"""The attributes with enough training pictures of both values: 1 % of them, and 30.

    Of drawn faces these are the 24 that change the picture, since the others are never true. Without attributes
    there are none.
    """
    if pictures.attributes is None:
        return ()
    truth = truths(pictures, pictures.rows(TRAIN))
    rarer = torch.minimum(truth.sum(dim=0), (~truth).sum(dim=0)).tolist()
    enough = max(MIN_PICTURES, MIN_SHARE * len(truth))
    return tuple(name for name, count in zip(ATTRIBUTES, rarer, strict=True) if count >= enough)


# ------------------------------------------------------------------------------------------------ training


def degrade(x: Tensor, g: torch.Generator) -> Tensor:
    r"""Mirrored, moved, resized, blurred, paler and noisier pictures, each by amounts of its own.

    A drawn picture has passed a VAE: it is softer and its colours are paler. A classifier that knew sharp pictures
    alone would misread it. One that learned from a VAE's pictures would see what that VAE hides from people.
    """
    B = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, 1, 1, 1, generator=g)

    mirror, size, move = uniform(-1, 1).sign(), uniform(0.92, 1.08), 2 / 32  # two pixels of 64
    affine = torch.zeros(B, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = (mirror * size).flatten(), size.flatten()
    affine[:, :, 2] = torch.cat([uniform(-move, move), uniform(-move, move)], dim=1).flatten(1)
    grid = F.affine_grid(affine, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    sigma = uniform(-1.2, 1.2).clamp(min=0.05) * x.shape[-1] / SIDE  # half of them stay sharp
    x = gaussian_blur(x, sigma, reach=max(2, 2 * x.shape[-1] // SIDE))
    gray = x.mean(dim=1, keepdim=True)
    x = gray + uniform(0.5, 1.3) * (x - gray)
    return x + uniform(0, 0.04) * torch.randn(x.shape, generator=g)


def gaussian_blur(x: Tensor, sigma: Tensor | float, reach: int = 2) -> Tensor:
    r"""Pictures (B, 3, S, S) blurred with a Gaussian of `sigma` pixels, one for all or (B, 1, 1, 1).

    It is cut off after `reach` pixels.
    """
    B, C, H, W = x.shape
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(B, 1, 1, 1)
    line = torch.exp(-(torch.arange(-reach, reach + 1, device=x.device) ** 2) / (2 * sigma**2))
    line = (line / line.sum(dim=3, keepdim=True)).repeat_interleave(C, dim=0)
    padded = F.pad(x, (reach,) * 4, mode="reflect").reshape(1, B * C, H + 2 * reach, W + 2 * reach)
    across = F.conv2d(padded, line, groups=B * C)
    return F.conv2d(across, line.transpose(2, 3), groups=B * C).reshape(B, C, H, W)


def initialise(network: nn.Module, g: torch.Generator):
    r"""Draw the weights from `g` (He et al. 2015), so that nothing global is seeded."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=g)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def balanced_loss(logits: Tensor, truth: Tensor, share: Tensor) -> Tensor:
    r"""Binary cross-entropy in which both values of every attribute weigh the same; `share` (A,) has it.

    $$L = -\frac{1}{A} \sum_a \left[\frac{y_a}{2 p_a} \log \sigma(l_a)
    + \frac{1 - y_a}{2 (1 - p_a)} \log(1 - \sigma(l_a))\right]$$

    averaged over the batch, so that a logit above 0 is the fair answer for balanced accuracy.
    """
    y = truth.float()
    return F.binary_cross_entropy_with_logits(
        logits.float(), y, weight=y / (2 * share) + (1 - y) / (2 * (1 - share))
    )


def train_classifier(
    pictures: Pictures,
    names: tuple[str, ...],
    device: torch.device,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress = silent,
) -> AttributeClassifier:
    r"""A classifier of `names` after STEPS steps on degraded pictures of the train split."""
    rows = pictures.rows(TRAIN)
    network = AttributeClassifier(names)
    truth = truths(pictures, rows)[:, network.columns]
    share = truth.float().mean(dim=0).to(device)
    initialise(network, generator(seed, "classifier", "weights"))
    network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=device.type in ("cuda", "cpu")
    )
    for step in progress(range(STEPS), STEPS, "training the attribute classifier"):
        g = generator(seed, "classifier", step)
        chosen = torch.randint(len(rows), (BATCH,), generator=g)
        x = degrade(pictures.batch(rows[chosen.numpy()]), g).to(device)
        done = step / STEPS
        optimizer.param_groups[0]["lr"] = (
            LR * min(1.0, (step + 1) / (0.15 * STEPS)) * (1 + math.cos(math.pi * done)) / 2
        )
        with autocast(device, precision):
            logits = network(x)
        loss = balanced_loss(logits, truth[chosen].to(device), share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        sample = pictures.batch(rows[:: -(-len(rows) // 512)]).to(device)
        network.deviation.copy_(
            torch.cat([network.features(x) for x in sample.split(BATCH)]).std(dim=0).clamp(min=1e-3)
        )
    return network


def training_seconds(network: AttributeClassifier, x: Tensor, precision: str) -> float:
    r"""What `train_classifier` would take, from one step on a batch of the pictures `x`."""
    device = network.head.weight.device
    x = x[torch.arange(BATCH) % len(x)]
    for _ in range(2):  # the first is slower
        started = time.monotonic()
        with autocast(device, precision):
            loss = network(degrade(x, generator()).to(device)).float().square().mean()
        loss.backward()
        wait_for(device)
    return STEPS * (time.monotonic() - started)


def classifier_path(folder: Path, pictures: Pictures, precision: str = "fp32", seed: int = 0) -> Path:
    r"""The file in the cache for the classifier of this data set; its name follows from all that shapes it."""
    rows = pictures.rows(TRAIN)
    told = hashlib.sha256(
        rows.tobytes() + np.ascontiguousarray(pictures.attributes[rows]).tobytes()
    ).hexdigest()
    key = key_of(
        "classifier", VERSION, WIDTHS, STEPS, BATCH, LR, WEIGHT_DECAY, pictures.key, told, precision, seed
    )
    return folder / f"classifier-{key}.safetensors"


def attribute_classifier(
    folder: Path,
    pictures: Pictures,
    device: torch.device,
    precision: str = "fp32",
    seed: int = 0,
    progress: Progress = silent,
) -> AttributeClassifier:
    r"""The classifier of a data set, from the cache, trained first where it is not there.

    Raises: NothingToLearn when the data has no attributes, or too few pictures of any.
    """
    names = learnable_names(pictures)
    if not names:
        raise NothingToLearn(
            f"expected at least {MIN_PICTURES} training pictures of both values of an attribute to learn it, "
            f"found none among {len(pictures.rows(TRAIN))}"
        )
    path = classifier_path(folder, pictures, precision, seed)
    if not path.exists():
        network = train_classifier(pictures, names, device, precision, seed, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path, network.state_dict())
    network = AttributeClassifier(names)
    load_weights(path, network)
    return network.to(device, memory_format=torch.channels_last).eval()
