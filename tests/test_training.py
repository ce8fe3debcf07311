import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from small_runs import PlainTower
from torch import nn

from ddpm.celeba.dataset import drawn_pictures
from ddpm.celeba.lists import TRAIN
from ddpm.config import Config
from ddpm.model import TextToImage
from ddpm.tools.seeding import seed_of
from ddpm.training import batches
from ddpm.training.caches import Latents, Texts
from ddpm.training.loops import train_unet, train_vae
from ddpm.training.optimization import BAD_STEPS, EMA, Bound, NotFinite, Optimization
from ddpm.training.perceptual import perceptual_loss
from ddpm.training.validation import (
    loss_by_timestep,
    measure_latent_scale,
    psnr,
    reconstruction_quality,
    ssim,
)

SMALL = {"image_size": 16, "channels": (32, 32), "drawn_images": 32, "accumulation": 1, "warmup": 2}


@pytest.fixture
def small():
    config = Config.from_preset("tiny", **SMALL)
    torch.manual_seed(0)
    return config, TextToImage(config.model, PlainTower())


@pytest.fixture
def pictures(tmp_path):
    return drawn_pictures(tmp_path, 32, seed=0, size=16)


@pytest.mark.equation("ema")
def test_the_average_follows_its_formula_and_its_decay_warms_up():
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 0.0)
    ema, expected = EMA(network, 0.9), 0.0
    for n in range(1, 200):
        nn.init.constant_(network.weight, float(n))
        ema.update(network, n)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
        assert abs(ema.shadow["weight"].item() - expected) < 1e-3  # fp32 sums of numbers up to 200


def test_the_averaged_weights_are_lent_and_given_back():
    network = nn.Linear(2, 2)
    ema = EMA(network, 0.5)
    own = network.weight.detach().clone()
    nn.init.zeros_(network.weight)
    with ema.applied(network):
        assert torch.equal(network.weight, own)
    assert torch.equal(network.weight, torch.zeros(2, 2))


def test_every_epoch_is_a_permutation_drawn_once_of_which_each_step_takes_its_place(monkeypatch):
    seeds = []
    rows = np.arange(100, 130)
    orders = [np.random.default_rng(seed_of(7, "unet", "order", e)).permutation(30) for e in range(2)]
    batches.permutation.cache_clear()
    rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or rng(seed))
    for step in range(6):
        epoch, place = divmod(step, 3)
        expected = rows[orders[epoch]][8 * place : 8 * place + 8]
        chosen, its_epoch = batches.batch_rows(rows, 8, step, 7, "unet")
        assert (chosen.tolist(), its_epoch) == (expected.tolist(), epoch)
    assert seeds == [seed_of(7, "unet", "order", epoch) for epoch in range(2)]


def test_data_smaller_than_a_batch_is_repeated():
    rows, _ = batches.batch_rows(np.array([4, 7]), 5, 0, 0)
    assert sorted(set(rows.tolist())) == [4, 7] and len(rows) == 5


def test_timesteps_of_a_batch_are_spread_over_the_chain_and_uniform():
    g = torch.Generator().manual_seed(0)
    drawn = [batches.timestep_batch(10, 1000, g) for _ in range(2000)]
    for t in drawn:
        gaps = t.sort().values.diff()
        assert gaps.min() >= 99 and gaps.max() <= 101
    counts = torch.bincount(torch.cat(drawn) // 10, minlength=100)
    assert counts.min() > 140 and counts.max() < 260  # 200 expected; 60 is four standard deviations


def test_progress_is_whichever_bound_comes_first():
    now = [0.0]
    bound = Bound(steps=100, clock=lambda: now[0], since=10.0, until=20.0)
    now[0] = 12.0
    assert bound.progress(10) == pytest.approx(0.2)
    assert bound.progress(50) == pytest.approx(0.5)
    now[0] = 25.0
    assert bound.progress(0) == 1.0


def optimization(network, config, lr=1e-3, steps=100, ema=False, precision="fp32") -> Optimization:
    return Optimization(network, config, lr, Bound(steps), ema, precision)


def take_step(opt, loss):
    opt.begin_step()
    opt.backward(loss)
    return opt.end_step()


def squares(network):
    return sum(p.square().sum() for p in network.parameters())


def test_the_learning_rate_warms_up_and_comes_down(small):
    config, model = small
    opt = optimization(model.unet, config, lr=1.0)
    # the first of two steps of warm-up, half way, the end
    for step, expected in ((0, 0.5), (50, 0.505), (100, 0.01)):
        opt.step = step
        opt.begin_step()
        assert opt.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected, rel=1e-3)


def test_with_a_rate_for_muon_the_inner_matrices_are_under_it_and_all_rates_come_down_together(small):
    config, model = small
    opt = optimization(model.unet, config.changed(muon_lr=0.02), lr=1.0, precision="bf16")
    adamw, muon = opt.optimizers
    outer, inner = (sum(p.numel() for g in o.param_groups for p in g["params"]) for o in opt.optimizers)
    assert adamw.defaults["weight_decay"] == config.training.weight_decay > 0
    assert outer + inner == sum(p.numel() for p in model.unet.parameters()) and inner > 9 * outer
    assert muon.dtype == torch.bfloat16 and muon.defaults["weight_decay"] == config.training.weight_decay
    opt.step = 50
    opt.begin_step()
    rates = [g["lr"] for optimizer in (adamw, muon) for g in optimizer.param_groups]
    assert rates == pytest.approx([0.505, 0.0101, 0.0101])


@pytest.mark.parametrize("clip, size, is_cut", [(0.5, 1e3, True), (0.5, 1e-6, False), (0.0, 1e3, False)])
def test_a_gradient_is_scaled_to_the_norm_that_clip_allows(clip, size, is_cut, small, monkeypatch):
    config, model = small
    opt = optimization(model.unet, config.changed(clip=clip))
    taken = []
    norm = lambda: torch.cat([p.grad.flatten() for p in model.unet.parameters()]).norm().item()  # noqa: E731
    monkeypatch.setattr(opt.optimizers[0], "step", lambda: taken.append(norm()))
    report = take_step(opt, size * squares(model.unet))
    assert taken == pytest.approx([clip if is_cut else report.grad_norm], rel=1e-3)


def run_vae(config, model, pictures, steps):
    opt = optimization(model.vae, config, 2e-3, steps)
    return list(train_vae(model, pictures, config, opt))


def prepared_unet(tmp_path, config, model, pictures):
    r"""Latents of unit variance and little noise, as those of a trained VAE are, and the captions' states."""
    moments = np.random.default_rng(0).normal(size=(32, 2, 2, *model.latent_shape)).astype(np.float16)
    moments[:, :, 1] = -8.0
    return Latents(moments), Texts(tmp_path, model.text, {pictures.caption(i, 0) for i in range(32)})


def run_unet(config, model, pictures, latents, texts, steps):
    opt = optimization(model.unet, config, 1e-3, steps, ema=True)
    return list(train_unet(model, latents, texts, pictures, config, opt))


def test_the_vae_learns_to_give_pictures_back(small, pictures):
    config, model = small
    before, _ = reconstruction_quality(model, pictures, pictures.rows(TRAIN))
    reports = run_vae(config, model, pictures, 60)
    after, _ = reconstruction_quality(model, pictures, pictures.rows(TRAIN))
    assert after > before + 4  # decibels
    assert [r.step for r in reports] == list(range(1, 61))
    assert set(np.concatenate([r.rows for r in reports])) == set(pictures.rows(TRAIN))
    assert reports[0].t is None


def test_the_unet_learns_a_latent_by_heart(small, pictures, tmp_path):
    config, model = small
    latents, texts = prepared_unet(tmp_path, config, model, pictures)
    latents.moments[:, :, 0] = latents.moments[0, 0, 0, :, :1, :1]  # one and the same, flat
    reports = run_unet(config, model, pictures, latents, texts, 80)
    assert all(len(r.rows) == len(r.t) == config.training.batch_size for r in reports)
    first, last = (np.mean([r.loss for r in part]) for part in (reports[:5], reports[-5:]))
    assert last < 0.7 * first


@pytest.mark.equation("training-path")
def test_a_step_asks_the_unet_about_scaled_latents_with_noise_and_about_their_captions(
    small, pictures, tmp_path, tower
):
    r"""Certain latents of 4 or -4 at a scale of 1/8: z_0 is 0.5 or -0.5, and what stands beside it in z_t is standard
    normal. 10,240 numbers: a mean is off by 0.01, a variance by 0.014, each allowed four times."""
    config, _ = small
    model = TextToImage(dataclasses.replace(config.model, caption_drop=0.25), tower)
    model.latent_scale = 1 / 8
    latents, texts = prepared_unet(tmp_path, config, model, pictures)
    sign = np.where(np.arange(32) % 3, 1, -1)
    latents.moments[:, :, 0] = 4 * sign[:, None, None, None, None]
    latents.moments[:, :, 1] = -30
    inputs = []
    keep = lambda unet, arguments, named: inputs.append((*arguments, named["context"]))  # noqa: E731
    model.unet.register_forward_pre_hook(keep, with_kwargs=True)
    reports = run_unet(config, model, pictures, latents, texts, 5)
    noise, dropped = [], 0
    for step, (z_t, t, context) in enumerate(inputs):
        chosen, _ = batches.batch_rows(pictures.rows(TRAIN), len(t), step, 0, "unet")
        assert np.array_equal(reports[step].rows, chosen) and torch.equal(reports[step].t, t)
        alpha_bar_t = model.schedule.alpha_bar_at(t, z_t)
        z_0 = 0.5 * torch.from_numpy(sign[chosen])[:, None, None, None]
        noise.append((z_t - alpha_bar_t.sqrt() * z_0) / (1 - alpha_bar_t).sqrt() * z_0.sign())
        for i, states in zip(chosen, context, strict=True):
            empty = torch.equal(states, texts([""])[0])
            dropped += empty
            assert empty or torch.equal(states, texts([pictures.caption(i, 0)])[0])
    noise = torch.cat(noise)
    assert noise.numel() == 10_240 and 3 <= dropped <= 17  # of 40
    assert abs(noise.mean().item()) < 0.04 and abs(noise.var().item() - 1) < 0.056


@pytest.mark.parametrize("flip", [True, False])
def test_epochs_take_turns_in_wordings_and_mirror_half_of_the_pictures(flip, small, pictures, tmp_path):
    config, model = small
    config = config.changed(caption_variants=3, flip=flip)
    latents, texts = prepared_unet(tmp_path, config, model, pictures)
    told, flips = [], []
    both = SimpleNamespace(gaussian=lambda rows, flip: flips.append(flip) or latents.gaussian(rows, flip))
    run_unet(config, model, pictures, both, lambda captions: told.append(captions) or texts(captions), 12)
    rows = pictures.rows(TRAIN)
    epochs = set()
    for step, captions in enumerate(told):
        chosen, epoch = batches.batch_rows(rows, len(captions), step, 0, "unet")
        epochs.add(epoch)
        expected = [pictures.caption(i, 0, epoch % 3) for i in chosen]
        assert all(said in ("", wording) for said, wording in zip(captions, expected, strict=True))
    assert len(epochs) > 2 and len({said for captions in told for said in captions}) > 8
    assert torch.cat(flips).unique().tolist() == ([False, True] if flip else [False])


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(small, pictures, tmp_path):
    config, _ = small
    results = []
    for accumulation in (1, 4):
        torch.manual_seed(2)
        model = TextToImage(config.model, small[1].text)
        changed = config.changed(accumulation=accumulation)
        latents, texts = prepared_unet(tmp_path, changed, model, pictures)
        reports = run_unet(changed, model, pictures, latents, texts, 3)
        results.append([r.loss for r in reports])
    assert np.allclose(*results, rtol=1e-4)  # sums in another order, in fp32


def test_a_step_that_is_not_finite_changes_nothing_and_several_stop_the_run(small):
    config, model = small
    opt = optimization(model.unet, config, ema=True)
    before = [p.detach().clone() for p in model.unet.parameters()]
    for shadow in opt.ema.shadow.values():
        shadow.zero_()
    for step in range(1, BAD_STEPS + 1):
        assert not take_step(opt, squares(model.unet) * math.nan).finite
        assert opt.step == step and not any(shadow.any() for shadow in opt.ema.shadow.values())
    assert all(torch.equal(a, b) for a, b in zip(before, model.unet.parameters(), strict=True))
    with pytest.raises(NotFinite, match="not finite for 5 steps"):
        opt.begin_step()


def test_in_fp16_an_overflow_moves_nothing_halves_the_scale_and_is_no_failure(small):
    config, model = small
    opt = optimization(model.unet, config.changed(muon_lr=0.02), ema=True, precision="fp16")
    parts = [[p for g in o.param_groups for p in g["params"] if p.any()] for o in opt.optimizers]
    before = [[p.detach().clone() for p in part] for part in parts]
    scale = opt.scaler.get_scale()
    finite_but_not_times_the_scale = sum(p.sum() for p in model.unet.parameters()) * 1e34
    report = take_step(opt, finite_but_not_times_the_scale)
    assert math.isfinite(report.loss) and not report.finite and opt.bad == 0
    assert opt.scaler.get_scale() == scale / 2
    for part, old in zip(parts, before, strict=True):
        assert part and all(torch.equal(a, b) for a, b in zip(part, old, strict=True))
    assert take_step(opt, squares(model.unet)).finite
    for part, old in zip(parts, before, strict=True):
        assert not any(torch.equal(a, b) for a, b in zip(part, old, strict=True))


def test_a_state_of_another_device_does_not_choose_the_kernels_of_this_one(small):
    config, model = small
    opt = optimization(model.unet, config)
    state = copy.deepcopy(opt.state_dict())
    state["optimizers"][0]["param_groups"][0]["fused"] = False  # as on mps
    opt.load_state_dict(state)
    assert opt.optimizers[0].param_groups[0]["fused"] is True


@pytest.mark.equation("latent-scale")
def test_the_latent_scale_makes_the_mean_square_one():
    g = np.random.default_rng(0)
    moments = np.zeros((500, 2, 2, 4, 8, 8), np.float16)
    moments[:, :, 0] = g.normal(0, 3, (500, 2, 4, 8, 8))
    moments[:, :, 1] = math.log(16.0)
    scale = measure_latent_scale(Latents(moments), np.arange(500))
    assert abs(scale - 1 / 5) < 2e-3  # variance 9 of mu and 16 of the noise


def test_validation_loss_is_the_same_each_time_and_one_for_a_network_that_says_nothing(
    small, pictures, tmp_path
):
    config, model = small
    latents, texts = prepared_unet(tmp_path, config, model, pictures)
    rows = pictures.rows(TRAIN)
    losses = loss_by_timestep(model, latents, texts, pictures, rows)
    assert losses == loss_by_timestep(model, latents, texts, pictures, rows)
    assert np.mean(losses) == pytest.approx(1.0, abs=0.1)  # conv_out starts at zero and v has mean square one
    as_eps = loss_by_timestep(model, latents, texts, pictures, rows, weighting="eps")
    assert as_eps[0] > 0.9 * losses[0] and as_eps[-1] < 0.1 * losses[-1]  # times alpha_bar


def test_the_last_time_of_validation_is_one_of_the_chain_however_it_is_rounded(
    small, pictures, tmp_path, monkeypatch
):
    config, model = small
    latents, texts = prepared_unet(tmp_path, config, model, pictures)
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2**-24))
    assert len(loss_by_timestep(model, latents, texts, pictures, pictures.rows(TRAIN))) == 10


@pytest.mark.equation("psnr")
def test_psnr_of_a_known_error():
    x = torch.zeros(2, 3, 8, 8)
    assert torch.allclose(psnr(x, x + 0.2), torch.full((2,), 20.0), atol=1e-4)  # (2 / 0.2)^2 is 20 dB
    for end in (-1, 1):  # what lies beyond the range of pictures is at its end
        inside, beyond = x + 0.9 * end, x + 3.0 * end
        assert psnr(beyond, inside).tolist() == pytest.approx([20 * math.log10(2 / 0.1)] * 2, abs=1e-3)
        assert torch.allclose(psnr(inside, beyond), psnr(beyond, inside))


@pytest.mark.equation("ssim")
def test_ssim_is_its_equation_window_by_window():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 3, 13, 12, generator=g, dtype=torch.float64) for _ in range(2))
    bell = torch.tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)], dtype=torch.float64)
    weight, values = bell[:, None] * bell / (bell[:, None] * bell).sum(), []
    for c, top, left in np.ndindex(3, 3, 2):
        p, q = (picture[0, c, top : top + 11, left : left + 11] for picture in (x, y))
        mu_p, mu_q = (weight * p).sum(), (weight * q).sum()
        var_p, var_q = (weight * (p - mu_p) ** 2).sum(), (weight * (q - mu_q) ** 2).sum()
        cov = (weight * (p - mu_p) * (q - mu_q)).sum()
        luminance = (2 * mu_p * mu_q + 1e-4) / (mu_p**2 + mu_q**2 + 1e-4)
        values.append(luminance * (2 * cov + 9e-4) / (var_p + var_q + 9e-4))
    assert ssim(2 * x - 1, 2 * y - 1).item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-12)


def test_the_perceptual_loss_is_zero_for_equal_pictures_and_grows_with_the_difference(monkeypatch):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(16)]
    vgg = SimpleNamespace(features=nn.Sequential(*layers))
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: vgg)
    distance = perceptual_loss(torch.device("cpu"))
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    noise = torch.randn_like(x)
    values = [distance(x, x + amount * noise).item() for amount in (0.0, 0.1, 0.5)]
    assert values[0] == 0 and values[0] < values[1] < values[2]
