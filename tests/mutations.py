r"""Departs from every equation in several ways and demands that a test which holds it fails.

    python tests/mutations.py           # all of them
    python tests/mutations.py kl ema    # those of some equations

Each departure is one replacement in a copy of the code. The tests that are marked with its equation (docs/equations.py
reads the marks) then run on the copy; those in tests/compat do not, since they need other packages. One that no test
notices is a missing test. At last the tests that noticed one must pass on the code as it is. Exits 1 if any of this
fails, or if a replacement no longer finds its text.
"""

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from equations import ROWS, marked_tests  # noqa: E402


@dataclass(frozen=True)
class Mutation:
    r"""One departure: `old`, which stands once in `file`, becomes `new`."""

    equation: str
    name: str
    file: str
    old: str
    new: str


def read(table: str) -> list[Mutation]:
    r"""The departures in a table such as the one below."""
    found = []
    for block in re.split(r"^(?=ddpm/)", table, flags=re.MULTILINE)[1:]:
        file, _, rest = block.partition("\n")
        for equation, name, *parts in re.findall(
            r"^([\w-]+): (.+)\n((?:- .*\n)+)((?:\+ .*\n)+)", rest, re.MULTILINE
        ):
            old, new = ("\n".join(line[2:] for line in part.splitlines()) for part in parts)
            found.append(Mutation(equation, name, file, old, new))
    return found


# A file, and departures in it: the equation's id, what is done to it, the text that goes, the text that comes.
MUTATIONS = read(r"""
ddpm/config.py
network-configuration: another width
- channels: tuple[int, ...] = option((64, 128, 256)
+ channels: tuple[int, ...] = option((64, 128, 192)
network-configuration: a shorter chain
- timesteps: int = option(1000
+ timesteps: int = option(500
network-configuration: latents of 8 channels
- latent_channels: int = option(4
+ latent_channels: int = option(8
small-machine: four at once
- "accumulation": 8
+ "accumulation": 4
small-machine: thirty epochs
- "epochs": 3,
+ "epochs": 30,

ddpm/schedule.py
alpha-bar: a sum for the product
- torch.cumprod(self.alpha, dim=0)
+ torch.cumsum(self.alpha, dim=0) / 2000
alpha-bar: t off by one
- first=-1) + 1, like)
+ first=-1), like)
linear-schedule: one end of another paper
- end: float = 0.02)
+ end: float = 0.012)
linear-schedule: not scaled with T
- linspace(start * scale, end * scale, timesteps
+ linspace(start, end, timesteps
scaled-linear-schedule: roots not squared
- return roots**2
+ return roots
scaled-linear-schedule: ends without their roots
- linspace(math.sqrt(start) * scale, math.sqrt(end) * scale
+ linspace(start * scale, end * scale
cosine-schedule: cosine not squared
- * math.pi / 2) ** 2
+ * math.pi / 2)
cosine-schedule: no offset
- (time + offset) / (1 + offset)
+ time
cosine-schedule: cut elsewhere
- largest: float = 0.999
+ largest: float = 0.99

ddpm/diffusion.py
forward-step: sqrt(beta) dropped
- + beta_t.sqrt() * eps
+ + beta_t * eps
forward-step: x_prev not scaled
- (1 - beta_t).sqrt() * x_prev
+ x_prev
forward-step: alpha_bar for beta
- schedule.beta_at(t, x_prev)
+ 1 - schedule.alpha_bar_at(t, x_prev)
closed-form: sqrt(alpha_bar) dropped
- x_t = alpha_bar_t.sqrt() * x_0 +
+ x_t = alpha_bar_t * x_0 +
closed-form: noise subtracted
- x_t = alpha_bar_t.sqrt() * x_0 + (
+ x_t = alpha_bar_t.sqrt() * x_0 - (
closed-form: alpha_bar of the step before
- alpha_bar_t = schedule.alpha_bar_at(schedule.checked(t, x_0), x_0)
-     x_t
+ alpha_bar_t = schedule.alpha_bar_at(schedule.checked(t, x_0) - 1, x_0)
+     x_t
posterior: alpha_bar_t for alpha_bar_s
- alpha_bar_s.sqrt() * beta_ts
+ alpha_bar_t.sqrt() * beta_ts
posterior: sqrt of alpha_ts dropped
- + alpha_ts.sqrt() * (1
+ + alpha_ts * (1
posterior: variance without its factor
- variance = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta_ts
+ variance = beta_ts
posterior: two steps back
- s = t - 1 if s is None else schedule.checked(s, x_t
+ s = (t - 2).clamp(min=-1) if s is None else schedule.checked(s, x_t
v: sign
- alpha_bar_t.sqrt() * eps - (1
+ alpha_bar_t.sqrt() * eps + (1
v: eps and x_0 swapped
- (alpha_bar_t.sqrt() * eps - (1 - alpha_bar_t).sqrt() * x_0)
+ (alpha_bar_t.sqrt() * x_0 - (1 - alpha_bar_t).sqrt() * eps)
predictions: not divided by the signal
- (x_t - noise * output) / signal, output
+ x_t - noise * output, output
predictions: v with the wrong sign
- signal * x_t - noise * output, noise
+ signal * x_t + noise * output, noise
predictions: signal and noise swapped
- alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
+ (1 - alpha_bar_t).sqrt(), alpha_bar_t.sqrt()
score: sign
- (-eps / (1 - alpha_bar_t).sqrt())
+ (eps / (1 - alpha_bar_t).sqrt())
score: divided by the variance
- (-eps / (1 - alpha_bar_t).sqrt())
+ (-eps / (1 - alpha_bar_t))
score: read with the wrong sign
- eps = -noise * output
+ eps = noise * output
reverse-variance: between the ends in a straight line
- torch.exp(nu * beta_ts.log() + (1 - nu) * beta_tilde.log())
+ nu * beta_ts + (1 - nu) * beta_tilde
reverse-variance: the ends swapped
- torch.exp(nu * beta_ts.log() + (1 - nu) * beta_tilde.log())
+ torch.exp(nu * beta_tilde.log() + (1 - nu) * beta_ts.log())
reverse-variance: from -1 to 1
- return prediction, (raw.float() + 1) / 2
+ return prediction, raw.float()
variational-bound: the divergence the other way round
- beta_tilde / sigma_2 - 1 + (sigma_2 / beta_tilde).log()
+ sigma_2 / beta_tilde - 1 + (beta_tilde / sigma_2).log()
variational-bound: alpha_bar_t for the one before
- alpha_bar_before = schedule.alpha_bar_at(t - 1, z_t)
+ alpha_bar_before = schedule.alpha_bar_at(t, z_t)
variational-bound: the last step's density without 2 pi
- (2 * math.pi * sigma_2).log()
+ sigma_2.log()
prior-term: the mean forgotten
- alpha_bar_T * z_0.cpu().double() ** 2 - alpha_bar_T
+ alpha_bar_T - alpha_bar_T
prior-term: sign of the logarithm
- - math.log1p(-alpha_bar_T))
+ + math.log1p(-alpha_bar_T))
hybrid-loss: the bound teaches the mean too
- output.detach().float()
+ output.float()
hybrid-loss: one time for all T
- vlb_weight * schedule.timesteps * bits.float()
+ vlb_weight * bits.float()
objective: absolute for squared
- (target.float() - output.float()) ** 2
+ (target.float() - output.float()).abs()
objective: sum for mean
- loss = ((target.float() - output.float()) ** 2).flatten(1).mean(dim=1)
+ loss = ((target.float() - output.float()) ** 2).flatten(1).sum(dim=1)
objective: the network sees z_0
- split_output(denoise(z_t, t), z_t)
+ split_output(denoise(z_0, t), z_t)
objective: eps asked where x_0 is meant
- "x_0": lambda: x_0
+ "x_0": lambda: eps

ddpm/layers.py
time-embedding: sines first
- [angle.cos(), angle.sin()]
+ [angle.sin(), angle.cos()]
time-embedding: frequencies up to another end
- device=t.device) / half)
+ device=t.device) / (half - 1))
time-embedding: no SiLU between
- F.silu(self.linear_1(embedding))
+ self.linear_1(embedding)
res-block: time not added
- h = h + self.time_emb_proj
+ h = h + 0 * self.time_emb_proj
res-block: no shortcut
- return h + (x if
+ return h + 0 * (x if
res-block: norm after SiLU
- self.conv2(F.silu(self.norm2(h)))
+ self.conv2(self.norm2(F.silu(h)))
group-norm: 16 groups
- GroupNorm(32, channels, eps=eps)
+ GroupNorm(16, channels, eps=eps)
group-norm: epsilon left out
- GroupNorm(32, channels, eps=eps)
+ GroupNorm(32, channels)
group-norm-gradient: a term dropped
- constant = -inverse_sigma * mean_1 - mu * of_x
+ constant = -mu * of_x
group-norm-gradient: sign
- -(inverse_sigma**2) * mean_x_hat
+ inverse_sigma**2 * mean_x_hat

ddpm/attention.py
attention: not divided by sqrt(d)
- (q * q.shape[3] ** -0.5)
+ q
attention: softmax over the queries
- weights.softmax(dim=3)
+ weights.softmax(dim=2)
attention: values in another order than keys
- self.by_head(self.to_v(context))
+ self.by_head(self.to_v(context.flip(1)))
feed-forward: the wrong half gated
- value * F.gelu(gate)
+ gate * F.gelu(value)
feed-forward: another gate
- F.gelu(gate)
+ F.silu(gate)
noise-network: no cross-attention
- self.attn2(self.norm2(x), context)
+ self.attn2(self.norm2(x), 0 * context)
noise-network: cross-attention not added to its input
- x = x + self.attn2(
+ x = self.attn2(

ddpm/unet.py
noise-network: skips in the wrong order
- skips.pop()
+ skips.pop(0)
noise-network: time forgotten
- time = self.time_embedding(t)
+ time = self.time_embedding(0 * t)
network-configuration: one ResBlock a level
- res_blocks: int = 2
+ res_blocks: int = 1
small-machine: nothing is computed again
- level.gradient_checkpointing = on
+ level.gradient_checkpointing = False

ddpm/vae.py
vae-shapes: a latent of 3 channels
- latent_channels: int = 4
+ latent_channels: int = 3
vae-shapes: no level halves the side
- ModuleList([] if last else [Downsample
+ ModuleList([] if True else [Downsample
latent-gaussian: wrong clamp
- clamp(-30.0, 20.0)
+ clamp(-20.0, 30.0)
latent-gaussian: variance for deviation
- (self.logvar / 2).exp() * eps
+ self.logvar.exp() * eps
latent-gaussian: halves swapped
- mu, logvar = self.quant_conv
+ logvar, mu = self.quant_conv
kl: mu not squared
- (self.mu**2 + self.logvar.exp()
+ (self.mu.abs() + self.logvar.exp()
kl: mean for sum
- - 1 - self.logvar).flatten(1).sum(dim=1)
+ - 1 - self.logvar).flatten(1).mean(dim=1)
entropy: e left out
- math.log(2 * math.pi * math.e)
+ math.log(2 * math.pi)
entropy: deviation for variance
- math.e) + self.logvar)
+ math.e) + self.logvar / 2)
kl: sign of log sigma^2
- - 1 - self.logvar)
+ - 1 + self.logvar)
vae-loss: KL summed over the latent
- posterior.kl().mean() / elements
+ posterior.kl().mean()
vae-loss: weight left out
- reconstruction + kl_weight * posterior
+ reconstruction + posterior
vae-loss: l1 and l2 swapped
- if norm == "l1" else
+ if norm == "l2" else

ddpm/text.py
text-shapes: pooled, one vector for all
- self.tower(tokens)[1]
+ self.tower(tokens)[0][:, None].expand(-1, 77, -1)
text-shapes: 76 tokens
- context_length=TOKENS)
+ context_length=TOKENS - 1)
text-shapes: the other activation
- QuickGELU if quick_gelu else
+ QuickGELU if not quick_gelu else
causal-text: no mask
- self.tower.build_causal_mask()
+ None
causal-text: mask the other way
- self.tower.build_causal_mask()
+ self.tower.build_causal_mask().T.contiguous()

ddpm/sampling.py
sampling-times: one later
- T / steps) - 1 for k
+ T / steps) for k
sampling-times: cut for rounded
- return [round(T - k * T / steps) - 1
+ return [int(T - k * T / steps) - 1
sampling-times: the loop stops before the clean picture
- [*times[1:], -1]
+ [*times[1:], 0]
reverse-process: deviation for variance
- mean + sigma_2.sqrt() * noise
+ mean + sigma_2 * noise
reverse-process: beta over one step
- reverse_variance(schedule, x_t, t, s, variance, nu)
+ reverse_variance(schedule, x_t, t, t - 1, variance, nu)
reverse-process: noise in the last step
- torch.where(schedule.alpha_bar_at(s, x_t) < 1, sigma_2, 0.0)
+ sigma_2
ddim-step: eta not squared
- eta**2 * (1 - alpha_bar_s)
+ eta * (1 - alpha_bar_s)
ddim-step: sigma not taken from the direction
- (1 - alpha_bar_s - sigma_2).clamp(min=0)
+ (1 - alpha_bar_s).clamp(min=0)
ddim-step: alpha_bar_t for alpha_bar_s
- x_s = alpha_bar_s.sqrt() * x_0
+ x_s = alpha_bar_t.sqrt() * x_0
dpm-solver-step: first order
- D = x_0 + of_difference * (x_0 - x_0_prev)
+ D = x_0
dpm-solver-step: sign of the difference
- D = x_0 + of_difference
+ D = x_0 - of_difference
dpm-solver-step: r upside down
- h / (2 * h_prev)
+ h_prev / (2 * h)
dpm-solver-step: the last picture's direction
- D, eps = x_0_and_eps(schedule, x_t, t, D, "x_0")
+ _, eps = x_0_and_eps(schedule, x_t, t, x_0, "x_0")
dpm-solver-step: without its noise
- return ddim_step(schedule, x_t, t, s, D, eps, noise, eta)
+ return ddim_step(schedule, x_t, t, s, D, eps, 0 * noise, eta)
dpm-solver-step: signal times noise for signal over noise
- (alpha_bar.log() - torch.log1p(-alpha_bar))
+ (alpha_bar.log() + torch.log1p(-alpha_bar))
guidance: from the conditional
- mean = uncond + scale
+ mean = cond + scale
guidance: the halves swapped
- uncond, cond = network(
+ cond, uncond = network(
guidance: the variance led too
- torch.cat([mean[:, :C], cond[:, C:]], dim=1)
+ mean
guidance: 1 is unconditional
- context if scale == 1.0 else negative
+ negative if scale == 1.0 else context

ddpm/captions.py
captions: absent attributes are told
- return (values > 0).tolist()
+ return (values >= 0).tolist()
captions: the opposite is told
- row[phrase.name] == phrase.value and
+ row[phrase.name] != phrase.value and

ddpm/data.py
preprocessing: the top of the picture, not its middle
- (width - side) // 2, (height - side) // 2
+ (width - side) // 2, 0
preprocessing: no antialiasing
- Image.Resampling.BICUBIC, reducing_gap=3.0
+ Image.Resampling.NEAREST
preprocessing: CelebA in its largest square
- 148 if (width, height)
+ 178 if (width, height)

ddpm/cache.py
preprocessing: from 0 to 1
- / 127.5 - 1
+ / 255
training-path: captions of the unconditional alone
- self.row[s] for s in sentences]]).float()
+ self.row[""] for s in sentences]]).float()

ddpm/training.py
training-path: latents not scaled
- .sample(eps=share(eps_vae)) * model.latent_scale
+ .sample(eps=share(eps_vae))
training-path: captions never dropped
- generator=g) < model.config.caption_drop
+ generator=g) < 0
training-path: captions of other pictures
- for i, drop in zip(share(chosen),
+ for i, drop in zip(share(chosen[::-1]),
ema: old and new swapped
- parameters, 1 - d)
+ parameters, d)
ema: no warm-up
- min(self.decay, (1 + n) / (10 + n))
+ self.decay

ddpm/muon.py
newton-schulz: the cubic term with its sign lost
- QUINTIC = (3.4445, -4.7750, 2.0315)
+ QUINTIC = (3.4445, 4.7750, 2.0315)
newton-schulz: rounds of the square alone
- torch.baddbmm(A, A, A, beta=b, alpha=c)
+ b * A
muon: momentum without the gradient's own part
- as_rows(p.grad.lerp(M, momentum))
+ as_rows(M)
muon: the smaller side for the larger
- math.sqrt(max(m, n))
+ math.sqrt(min(m, n))
muon: no decay
- W.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
+ W.sub_(

ddpm/metrics.py
latent-scale: the variance for the deviation
- 1 / math.sqrt(float(np.mean(second_moments)))
+ 1 / float(np.mean(second_moments))
latent-scale: without sigma
- ** 2 + q.logvar.double().exp()).mean()
+ ** 2).mean()
psnr: the peak of pictures in [0, 1]
- torch.log10(4 / mse
+ torch.log10(1 / mse
psnr: the error not squared
- .square().flatten(1)
+ .abs().flatten(1)
bits-per-dimension: the start left out
- widths[1:] @ terms[1:], prior + widths @ terms
+ widths[1:] @ terms[1:], widths @ terms
bits-per-dimension: one step for each slice
- last, steps, total = terms[0], widths[1:] @ terms[1:]
+ last, steps, total = terms[0], terms[1:].sum(dim=0)
bits-per-dimension: the error of one term alone
- _standard_error(total)}
+ _standard_error(last)}
bits-per-dimension: the latent scale forgotten
- + math.log2(model.latent_scale)
+ + 0
laplace-bits: bins half as wide
- torch.where(x >= 1, math.inf, x + 1 / 255 - x_hat)
+ torch.where(x >= 1, math.inf, x - x_hat)
laplace-bits: no tails
- torch.where(x <= -1, -math.inf, x - 1 / 255 - x_hat)
+ x - 1 / 255 - x_hat
ssim: a wider window
- (2 * 1.5**2)
+ (2 * 2.5**2)
ssim: the constants swapped
- C_1, C_2 = 0.01**2, 0.03**2
+ C_1, C_2 = 0.03**2, 0.01**2
ssim: covariance of the means
- mean(x * y) - mu_x * mu_y
+ mean(x * y)
latent-moments: the covariance scaled as the mean is
- scale**2 * (torch.cov(mu)
+ scale * (torch.cov(mu)
latent-moments: the encoder's variance forgotten
- + logvar.exp().mean(dim=1).diag())
+ + 0)
latent-moments: the deviation for the variance
- + logvar.exp().mean(dim=1).diag())
+ + (logvar / 2).exp().mean(dim=1).diag())
latent-moments: the mean not scaled
- (scale * mu.mean(dim=1)).tolist()
+ mu.mean(dim=1).tolist()
balanced-accuracy: not balanced
- ((rows * right).sum(0) / rows.sum(0) + ((1 - rows) * right).sum(0) / (1 - rows).sum(0)) / 2
+ right.double().mean(0)
balanced-accuracy: of those seen, not of those wanted
- (rows * right).sum(0) / rows.sum(0)
+ (rows * right).sum(0) / seen.sum(0)
balanced-accuracy: what is not wanted left out
- + ((1 - rows) * right).sum(0) / (1 - rows).sum(0)) / 2
+ + 0)
wilson-interval: around the share itself
- centre = (right + Z**2 / 2) / (of + Z**2)
+ centre = right / of
wilson-interval: the normal approximation's width
- (right * (of - right) / of + Z**2 / 4).sqrt()
+ (right * (of - right) / of).sqrt()
wilson-interval: an interval of 90 of 100
- Z = 1.96
+ Z = 1.645
balanced-interval: below and above swapped
- below + (share - low) ** 2, above + (high - share) ** 2
+ below + (high - share) ** 2, above + (share - low) ** 2
balanced-interval: that of the sum, not of the mean
- return p - below.sqrt() / 2, p + above.sqrt() / 2
+ return p - below.sqrt(), p + above.sqrt()
balanced-interval: the widths added, not their squares
- below + (share - low) ** 2, above + (high - share) ** 2
+ below + (share - low), above + (high - share)
balanced-interval: of those that want the attribute alone
- for group in (wanted, ~wanted):
+ for group in (wanted, wanted):
frechet-distance: the means left out
- float(apart + S_1
+ float(S_1
frechet-distance: the inner root left out
- (vectors * values.clamp(min=0).sqrt()) @ vectors.T
+ (vectors * values.clamp(min=0)) @ vectors.T
frechet-distance: the outer root left out
- @ root).clamp(min=0).sqrt().sum()
+ @ root).clamp(min=0).sum()
frechet-distance: the cross term once
- - 2 * cross
+ - cross
frechet-distance: second moments for covariances
- torch.cov(features.T).reshape(features.shape[1], -1)
+ features.T @ features / (len(features) - 1)
precision-recall: each its own nearest fellow
- kthvalue(k + 1, dim=1)
+ kthvalue(k, dim=1)
precision-recall: swapped
- return covered(generated, by=real), covered(real, by=generated)
+ return covered(real, by=generated), covered(generated, by=real)
precision-recall: in all balls, not in any
- <= reach).any(dim=1)
+ <= reach).all(dim=1)
precision-recall: the balls of one member for all
- by) <= reach).any(dim=1)
+ by) <= reach.max()).any(dim=1)

ddpm/classifier.py
classifier-loss: not balanced
- weight=y / (2 * share) + (1 - y) / (2 * (1 - share))
+ weight=None
classifier-loss: the shares swapped
- weight=y / (2 * share) + (1 - y) / (2 * (1 - share))
+ weight=y / (2 * (1 - share)) + (1 - y) / (2 * share)
classifier-loss: twice as large
- weight=y / (2 * share) + (1 - y) / (2 * (1 - share))
+ weight=y / share + (1 - y) / (1 - share)
classifier-loss: a logit above 0 is no
- with_logits(logits.float(), y,
+ with_logits(-logits.float(), y,

ddpm/model.py
sampling-path: latents not scaled back
- self.vae.decode(z / self.latent_scale)
+ self.vae.decode(z)
sampling-path: prompt and negative swapped
- guided(self.unet, context, uncond, guidance_scale
+ guided(self.unet, uncond, context, guidance_scale
sampling-path: the picture not clipped
- x.float().clamp(-1, 1)
+ x.float()
sampling-path: eps read whatever is predicted
- self.config.prediction, eta, variance
+ "eps", eta, variance
""")


class FirstFailure:
    r"""A pytest plugin that keeps the node id of the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid


def outcome(job: tuple[Mutation | None, list[str]]) -> tuple[int, str, float]:
    r"""Run tests on a copy of the code, changed or not: pytest's exit code, the first that failed, seconds.

    Runs in a process of its own, forked with torch loaded and without ddpm.
    """
    import pytest

    mutation, tests = job
    begin, failure = time.monotonic(), FirstFailure()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ddpm", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name), copy_function=os.symlink)
        shutil.copy(ROOT / "setup.cfg", folder)
        if mutation:
            path = Path(folder, mutation.file)
            path.unlink()  # the link, not the file
            path.write_text(
                (ROOT / mutation.file).read_text("utf-8").replace(mutation.old, mutation.new), "utf-8"
            )
        os.chdir(folder)
        options = ["-x", "-q", "--assert=plain", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts="]
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
            code = int(pytest.main([*options, f"--rootdir={folder}", *tests], plugins=[failure]))
        if code not in (0, 1) or not Path(sys.modules["ddpm"].__file__).is_relative_to(folder):
            code, failure.name = -1, f"could not be tested: {printed.getvalue()[-2000:]}"
        os.chdir(ROOT)
    return code, failure.name, time.monotonic() - begin


def load_packages():
    r"""Load once what every forked process needs, and forget ddpm again: each loads its own copy."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    importlib.import_module("pytest")
    sys.path.insert(0, str(ROOT))
    for path in sorted((ROOT / "ddpm").glob("*.py")):
        importlib.import_module(f"ddpm.{path.stem}")
    importlib.import_module("open_clip.transformer")
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "ddpm"]:
        del sys.modules[name]
    gc.freeze()  # pytest collects garbage after each run; what is loaded here is none


def main(wanted: list[str]) -> int:
    unknown = set(wanted) - {row.id for row in ROWS}
    if unknown:
        print(f"expected ids of docs/equations.md, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [m for m in MUTATIONS if not wanted or m.equation in wanted]
    stale = [m for m in chosen if (ROOT / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    for m in stale:
        print(
            f"{m.equation}, {m.name}: expected {m.old!r} once in {m.file}; correct it in tests/mutations.py"
        )
    if stale:
        return 1
    held = {id: [t for t in tests if "/compat/" not in t] for id, tests in marked_tests().items()}
    load_packages()
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        noticed, bad = set(), 0
        found = pool.imap(outcome, [(m, held[m.equation]) for m in chosen], chunksize=1)
        for m, (code, told, seconds) in zip(chosen, found, strict=True):
            good = code == 1
            bad += not good
            noticed |= {told} if good else set()
            said = told.split("::")[-1] if good else f"WRONG {told or 'no test failed'}"
            print(f"{m.equation}: {m.name:<{60 - len(m.equation)}} {seconds:5.1f} s  {said}", flush=True)
        files = [list(tests) for _, tests in groupby(sorted(noticed), key=lambda test: test.split("::")[0])]
        for code, told, _ in pool.imap(outcome, [(None, tests) for tests in files], chunksize=1):
            bad += code != 0
            print(f"WRONG {told} fails on the code as it is\n" if code else "", end="")
    print(f"{len(chosen)} departures, noticed by {len(noticed)} tests; {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
