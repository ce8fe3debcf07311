r"""A distance between pictures by VGG16's features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

from ddpm.tools.errors import UserError


def perceptual_loss(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    r"""Distance between VGG16 features of two batches of pictures in [-1, 1] (Johnson et al. 2016).

    It compares the features after the first three groups of convolutions, each normalised over its channels.

    Raises: UserError when torchvision cannot get the network's weights.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn here are replaced
            features = models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1).features
    except Exception as error:  # the network, the host, the checksum
        raise UserError(f"could not get VGG16's weights ({error}); leave --perceptual-weight at 0") from None
    features = features.to(device).eval().requires_grad_(False)
    groups = [features[:4], features[4:9], features[9:16]]
    training_pictures = models.VGG16_Weights.IMAGENET1K_V1.transforms()
    mean = torch.tensor(training_pictures.mean, device=device)[:, None, None]
    std = torch.tensor(training_pictures.std, device=device)[:, None, None]

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x = ((x + 1) / 2 - mean) / std
        y = ((y + 1) / 2 - mean) / std
        total = x.new_zeros(())
        for group in groups:
            x = group(x)
            y = group(y)
            total = total + (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean()
        return total

    return distance
