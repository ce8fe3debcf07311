r"""What is written for GPUs; without CUDA or ROCm all of it is left out, and nothing here has been measured."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import normal, without_zeros

from ddpm.celeba.dataset import drawn_pictures
from ddpm.config import Config
from ddpm.model import TextToImage
from ddpm.tools import devices
from ddpm.tools.grids import to_uint8
from ddpm.tools.kernels import attend
from ddpm.training import __main__ as train
from ddpm.training.batches import to_device
from ddpm.training.caches import Latents
from ddpm.training.loops import train_unet, train_vae
from ddpm.training.optimization import Bound, Optimization
from ddpm.unet import UNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_steps_in_every_precision_are_finite_and_move_the_weights(stage, precision, tower, tmp_path):
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bf16")
    config = Config.from_preset("tiny", image_size=16, channels=(32, 32), drawn_images=32, muon_lr=0.005)
    torch.manual_seed(0)
    model = TextToImage(config.model, tower)
    model.vae.to(CUDA)
    model.unet.to(CUDA)
    pictures = drawn_pictures(tmp_path, 32, seed=0, size=16)
    network = model.vae if stage == "vae" else model.unet
    opt = Optimization(network, config, 1e-3, Bound(5), stage == "unet", precision)
    assert opt.optimizers[0].defaults["fused"] and opt.scaler.is_enabled() == (precision == "fp16")
    before = [p.detach().clone() for p in network.parameters()]
    if stage == "vae":
        reports = list(train_vae(model, pictures, config, opt))
    else:
        latents = Latents(np.zeros((32, 2, 2, *model.latent_shape), np.float16))

        def texts(captions):
            return torch.zeros(len(captions), 77, 512)

        reports = list(train_unet(model, latents, texts, pictures, config, opt))
    assert len(reports) == 5 and reports[-1].finite
    assert precision == "fp16" or all(report.finite for report in reports)  # fp16 looks for its loss scale
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_unet_predicts_the_same_as_on_the_cpu_and_keeps_the_memory_layout():
    torch.manual_seed(0)
    unet = UNet(channels=(32, 64), attention_levels=(1,), res_blocks=1, context_width=16)
    unet = without_zeros(unet).eval()
    z, c = normal(2, 4, 8, 8).float(), normal(2, 5, 16).float()
    t = torch.tensor([10, 700])
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = unet(z, t, c)
        unet.to(CUDA, memory_format=torch.channels_last)
        output = unet(z.to(CUDA).contiguous(memory_format=torch.channels_last), t.to(CUDA), c.to(CUDA))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert (output.cpu() - expected).abs().max() < 1e-3


def test_a_picture_is_the_same_as_on_the_cpu_give_or_take_a_level(tiny):
    expected = tiny.sample(["a bald man", "a woman"], steps=5)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = tiny.to(CUDA).sample(["a bald man", "a woman"], steps=5)
    finally:
        tiny.cpu()  # the tower is that of the whole session
    assert np.abs(to_uint8(x.cpu()).astype(int) - to_uint8(expected).astype(int)).max() <= 1


def test_attention_is_torchs_fused_one_where_something_is_learned_too(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: calls.append(1) or q)
    attend(*(torch.zeros(1, 2, 4, 32, device=CUDA, requires_grad=True) for _ in range(3)))
    assert calls == [1]


def test_a_batch_comes_to_the_gpu_whole_and_one_that_is_there_stays():
    x = normal(1000, 1000)
    there = to_device(x, CUDA)
    assert torch.equal(there.cpu(), x)
    assert to_device(there, CUDA) is there


def test_what_is_on_its_way_to_the_gpu_is_pinned(monkeypatch):
    pinned, pin = [], torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(pin(x)) or pinned[-1])
    assert to_device(normal(4), CUDA).device.type == "cuda"
    assert len(pinned) == 1 and pinned[0].is_pinned()


def test_training_multiplies_in_tf32(tmp_path):
    flags = ["--preset", "tiny", "--image-size", "16", "--channels", "32,32", "--drawn-images", "32"]
    flags += ["--device", "cuda", "--max-steps", "2"]
    before = torch.get_float32_matmul_precision()
    try:
        train.main([*flags, "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")])
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_takes_the_gpu():
    assert devices.choose_device("auto").type == "cuda"
