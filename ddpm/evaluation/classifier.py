r"""A small classifier of the attributes, trained on the run's own data.

It reads what a model has drawn, so that a picture can be compared with its prompt; its lower levels describe pictures
for the Frechet distance. It belongs to a data set, not to a model: every model trained on the same pictures is read by
the same classifier, from one file in the cache."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.celeba.captions import ATTRIBUTES, consistent
from ddpm.celeba.dataset import Pictures
from ddpm.celeba.lists import TRAIN
from ddpm.tools.arrays import Progress, key_of, silent
from ddpm.tools.devices import autocast
from ddpm.tools.files import digest_of
from ddpm.tools.seeding import generator
from ddpm.tools.weights import load_weights, save_weights

VERSION = 3  # of the network and of its training; another one is another file
SIDE = 64  # larger pictures are averaged down to it
WIDTHS = (64, 128, 192)
STEPS = 1_500
BATCH = 64
LR = 3e-3
WEIGHT_DECAY = 0.05
MIN_FRACTION = 0.01  # of the train split with either value, for an attribute to be learned
MIN_PICTURES = 30  # of the same


class Residual(nn.Module):
    r"""x + BN(conv(relu(BN(conv(x))))), then relu (ResNet, figure 2); keeps the shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(channels)
        self.norm_2 = nn.BatchNorm2d(channels)

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(h + self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(h))))))


class AttributeClassifier(nn.Module):
    r"""Pictures (B, 3, S, S) in [-1, 1] -> one logit for each attribute in `names`, (B, A); above 0 is yes.

    Two by two pixels become twelve channels, so nothing is lost before the first convolution: a necklace is two
    pixels high. Three levels follow, at 32 x 32, 16 x 16 and 8 x 8. The weights start from a fixed seed.
    """

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = tuple(names)
        self.columns = [ATTRIBUTES.index(name) for name in names]
        levels = []
        for level, (before, width) in enumerate(zip((12, *WIDTHS), WIDTHS, strict=False)):
            into = nn.Conv2d(before, width, 3, stride=2 if level else 1, padding=1, bias=False)
            levels.append(nn.Sequential(into, nn.BatchNorm2d(width), nn.ReLU(), Residual(width)))
        self.levels = nn.ModuleList(levels)
        self.head = nn.Linear(WIDTHS[-1], len(self.names))
        self.register_buffer("std", torch.ones(sum(WIDTHS[:-1])))  # of `features` on real pictures
        g = generator(0, "classifier", "weights")
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=g)  # He et al. 2015
        nn.init.zeros_(self.head.bias)

    def means(self, x: Tensor) -> list[Tensor]:
        r"""The mean over the picture of the channels of each level, (B, width)."""
        if x.shape[-1] > SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="area")
        h = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        means = []
        for level in self.levels:
            h = level(h)
            means.append(h.mean(dim=(2, 3)))
        return means

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.means(x)[-1])

    def features(self, x: Tensor) -> Tensor:
        r"""What a picture looks like, (B, D): the means of all levels but the last, of unit variance on real pictures.

        The last level separates the attributes and learns to overlook blur and noise; at the levels below it, the
        Frechet distance of blurred pictures is several times that of other real ones.
        """
        return torch.cat(self.means(x)[:-1], dim=1) / self.std


# ------------------------------------------------------------------------------------------- ground truth


def truths(pictures: Pictures, rows: np.ndarray) -> Tensor:
    r"""The forty attributes of some pictures, as their full captions say them, (B, 40) bool.

    The full form names every positive attribute of `consistent(row)`, so what it does not name is absent; only
    No_Beard of a woman goes without saying, and is true.
    """
    attributes = np.array([consistent(row) for row in pictures.attributes[rows]]).reshape(-1, 40)
    return torch.from_numpy(attributes > 0)


def learnable_names(pictures: Pictures) -> tuple[str, ...]:
    r"""The attributes with enough training pictures of both values: 1 % of them, and 30.

    Of drawn faces these are the 24 that change the picture, since the others are never true. Without attributes
    there are none.
    """
    if pictures.attributes is None:
        return ()
    truth = truths(pictures, pictures.rows(TRAIN))
    rarer = torch.minimum(truth.sum(dim=0), (~truth).sum(dim=0)).tolist()
    least = max(MIN_PICTURES, MIN_FRACTION * len(truth))
    return tuple(name for name, count in zip(ATTRIBUTES, rarer, strict=True) if count >= least)


# ------------------------------------------------------------------------------------------------ training


def degrade(x: Tensor, g: torch.Generator) -> Tensor:
    r"""Mirrored, moved, resized, blurred, paler and noisier pictures, each by amounts of its own.

    A generated picture has passed a VAE: it is softer and its colours are paler. A classifier trained on sharp pictures
    alone would misread it. A classifier trained on a VAE's pictures would see what that VAE hides from people.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=g)

    mirror = uniform(-1, 1).sign()
    size = uniform(0.92, 1.08)
    move = 2 / 32  # two pixels of 64
    affine = torch.zeros(len(x), 2, 3)
    affine[:, 0, 0] = (mirror * size).flatten()
    affine[:, 1, 1] = size.flatten()
    affine[:, 0, 2] = uniform(-move, move).flatten()
    affine[:, 1, 2] = uniform(-move, move).flatten()
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


def balanced_loss(logits: Tensor, truth: Tensor, frequency: Tensor) -> Tensor:
    r"""Binary cross-entropy in which both values of every attribute weigh the same.

    $$L = -\frac{1}{A} \sum_a \left[\frac{y_a}{2 p_a} \log \sigma(l_a)
    + \frac{1 - y_a}{2 (1 - p_a)} \log(1 - \sigma(l_a))\right]$$

    where `frequency` (A,) is p_a, the fraction of pictures with attribute a; averaged over the batch. A logit above 0
    is then the best answer for balanced accuracy.
    """
    y = truth.float()
    weight = y / (2 * frequency) + (1 - y) / (2 * (1 - frequency))
    return F.binary_cross_entropy_with_logits(logits.float(), y, weight=weight)


def train_classifier(
    network: AttributeClassifier, pictures: Pictures, precision: str = "fp32", progress: Progress = silent
):
    r"""Train a new classifier for STEPS steps on degraded pictures of the train split."""
    device = network.head.weight.device
    rows = pictures.rows(TRAIN)
    truth = truths(pictures, rows)[:, network.columns]
    frequency = truth.float().mean(dim=0).to(device)
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=fused)

    network.train()
    for step in progress(range(STEPS), STEPS, "training the attribute classifier"):
        g = generator(0, "classifier", step)
        chosen = torch.randint(len(rows), (BATCH,), generator=g)
        x = degrade(pictures.batch(rows[chosen.numpy()]), g).to(device)
        warmup = min(1.0, (step + 1) / (0.15 * STEPS))
        cosine = (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.param_groups[0]["lr"] = LR * warmup * cosine
        with autocast(device, precision):
            logits = network(x)
        loss = balanced_loss(logits, truth[chosen].to(device), frequency)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    network.eval()
    with torch.no_grad():
        some = pictures.batch(rows[:: -(-len(rows) // 512)]).to(device)
        features = torch.cat([network.features(x) for x in some.split(BATCH)])
        network.std.copy_(features.std(dim=0).clamp(min=1e-3))


def attribute_classifier(
    folder: Path,
    pictures: Pictures,
    device: torch.device,
    precision: str = "fp32",
    progress: Progress = silent,
) -> AttributeClassifier | None:
    r"""The classifier of a data set, from the cache `folder`, trained first where it is not there.

    None where the data has no attributes, or too few pictures of any. The file's name follows from the data and from
    the training's numbers, but for its precision.
    """
    names = learnable_names(pictures)
    if not names:
        return None
    rows = pictures.rows(TRAIN)
    labels = digest_of([torch.from_numpy(rows), torch.from_numpy(pictures.attributes[rows])])
    training = (VERSION, WIDTHS, STEPS, BATCH, LR, WEIGHT_DECAY)  # not the precision: all are read by one
    path = folder / f"classifier-{key_of('classifier', pictures.key, labels, *training)}.safetensors"
    network = AttributeClassifier(names).to(device, memory_format=torch.channels_last)
    if path.exists():
        load_weights(path, network)
    else:
        train_classifier(network, pictures, precision, progress)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(path, network.state_dict())
    return network.eval()
