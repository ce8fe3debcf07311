r"""Writes equations.md: every equation, the code that computes it and the tests that hold it.

    python docs/equations.py            # write the page
    python docs/equations.py --check    # exit 1 unless the page is what this would write

`SPEC` and `CODE` below are the tables. A row of `SPEC` brings its equation along, in the specification's words; a row
of `CODE` takes it from the docstring of the first thing it names. A test says what it holds by its mark,
`@pytest.mark.equation("forward-step")`, a cell of a notebook what it shows by its tag, `eq-forward-step`. Code, tests
and notebooks are parsed and never run, so this needs Python alone.
"""

import ast
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import copysign, cos, exp, expm1, log, log2, log10, pi, prod, sqrt
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "equations.md"


@dataclass(frozen=True)
class Row:
    r"""One equation.

    Attributes:
        id: what tests name it by. title: what it is, in words.
        code: who computes it, by names in ddpm such as `vae.KLVAE.encode`, with spaces between.
        symbols: names of its symbols in that code, with spaces between.
        tex: the equation; empty: as the docstring of the first of `code` has it.
        formula: the equation once more, for single numbers. Its parameters are named as in tests/test_equations.py,
            which compares it with the code.
    """

    id: str
    title: str
    code: str
    symbols: str
    tex: str = ""
    formula: Callable | None = None


SPEC = (
    Row(
        "forward-step",
        "One step of noise",
        "diffusion.forward_step",
        "x_prev beta_t eps",
        r"q(x_t \mid x_{t-1}) = \mathcal{N}(x_t; \sqrt{1 - \beta_t} \cdot x_{t-1}, \beta_t \cdot \mathbf{I})",
        lambda x_prev, eps, beta_t: sqrt(1 - beta_t) * x_prev + sqrt(beta_t) * eps,
    ),
    Row(
        "reverse-process",
        "One step of the reverse process, learned; theta are the UNet's parameters, c is the prompt's embedding",
        "sampling.ddpm_step sampling.sample_loop diffusion.q_posterior diffusion.reverse_variance",
        "mean sigma_2 x_t x_0",
        r"p_\theta(x_{t-1} \mid x_t, c) = \mathcal{N}(x_{t-1}; \mu_\theta(x_t, t, c), \Sigma_\theta(x_t, t, c))",
        lambda x_0, x_t, noise, alpha_bar_t, alpha_bar_s: (
            (
                sqrt(alpha_bar_s) * (1 - alpha_bar_t / alpha_bar_s) * x_0
                + sqrt(alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) * x_t
            )
            / (1 - alpha_bar_t)
            + sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)) * noise
        ),
    ),
    Row(
        "vae-shapes",
        "The VAE makes a picture small, and large again",
        "vae.KLVAE vae.KLVAE.encode vae.KLVAE.decode",
        "x z",
        r"\mathbb{R}^{64 \times 64 \times 3} \to \mathbb{R}^{32 \times 32 \times 4}",
    ),
    Row(
        "text-shapes",
        "The CLIP text encoder makes a prompt 77 vectors",
        "text.TextTower",
        "prompts tokens",
        r"c \in \mathbb{R}^{77 \times 512}",
    ),
    Row(
        "noise-network",
        "The UNet predicts the noise, given latent, time and, by cross-attention, text",
        "unet.UNet layers.Level attention.CrossAttentionBlock attention.TransformerBlock",
        "z_t t context",
        r"\epsilon_\theta(z_t, t, c)",
    ),
    Row(
        "objective",
        "The simplified loss",
        "losses.diffusion_loss losses.training_target",
        "target output z_t t",
        r"\mathcal{L} = \mathbb{E}_{z_0, \epsilon \sim \mathcal{N}(0, \mathbf{I}), t}"
        r" \left[ \left\| \epsilon - \epsilon_\theta(z_t, t, c) \right\|^2 \right]",
        lambda eps, eps_hat: (eps - eps_hat) ** 2,
    ),
    Row(
        "closed-form",
        "All steps of noise up to t at once",
        "diffusion.q_sample",
        "x_0 alpha_bar_t eps",
        r"z_t = \sqrt{\bar{\alpha}_t} \cdot z_0 + \sqrt{1 - \bar{\alpha}_t} \cdot \epsilon",
        lambda x_0, eps, alpha_bar_t: sqrt(alpha_bar_t) * x_0 + sqrt(1 - alpha_bar_t) * eps,
    ),
    Row(
        "captions",
        "Captions from facial attributes: a person with black hair and sunglasses",
        "celeba.captions.describe celeba.captions.consistent",
        "attributes",
        r"\text{attributes} \in \lbrace -1, 1 \rbrace^{40} \to \text{sentence}",
    ),
    Row(
        "preprocessing",
        "Resize to 64 x 64, normalize to the range from -1 to 1",
        "celeba.images.crop_and_resize celeba.dataset.Pictures.batch",
        "image size x",
        r"x \in [-1, 1]^{64 \times 64 \times 3}",
        lambda level: level / 127.5 - 1,
    ),
    Row(
        "network-configuration",
        "The network: latents of 32 x 32 x 4, three widths, cross-attention to vectors of 512, 1000 timesteps",
        "config.ModelConfig unet.UNet",
        "in_channels out_channels channels context_width timesteps",
        r"4 \to [64, 128, 256] \to 4, \quad c \in \mathbb{R}^{77 \times 512}, \quad T = 1000",
    ),
    Row(
        "training-path",
        "The diagram, in training: image, VAE, latents, add noise, UNet, predicted noise",
        "training.loops.train_unet training.caches.Latents.gaussian training.caches.Texts",
        "z_0 eps context",
        r"x \to \mathrm{VAE} \to z_0 \to z_t \to \epsilon_\theta(z_t, t, c)",
    ),
    Row(
        "sampling-path",
        "The diagram, in sampling: text, CLIP, noise, UNet, denoised latents, decode",
        "model.TextToImage.sample model.TextToImage.decode sampling.sample_loop",
        "context denoise z",
        r"z_T \to \epsilon_\theta(z_t, t, c) \to z_0 \to \mathrm{VAE}^{-1} \to x",
    ),
    Row(
        "small-machine",
        "The plan for a small card: 1-2 samples, 50-100 steps an epoch, 2-3 epochs, gradient checkpointing",
        "config.PRESETS unet.UNet.set_gradient_checkpointing layers.Level.pair",
        "gradient_checkpointing",
        r"\text{batch} \in \lbrace 1, 2 \rbrace, \quad \text{steps an epoch} \in [50, 100],"
        r" \quad \text{epochs} \in \lbrace 2, 3 \rbrace",
    ),
)

CODE = (
    Row(
        "alpha-bar",
        "What is left of the picture",
        "schedule.Schedule",
        "beta alpha alpha_bar",
        formula=lambda beta, t: prod(1 - beta[s] for s in range(t + 1)),
    ),
    Row(
        "linear-schedule",
        "beta in equal steps",
        "schedule.linear_beta",
        "start end timesteps",
        r"\beta_t = \beta_{\mathrm{start}} + \frac{t}{T - 1} (\beta_{\mathrm{end}} - \beta_{\mathrm{start}})",
        lambda t: 1e-4 + t / 999 * (0.02 - 1e-4),
    ),
    Row(
        "scaled-linear-schedule",
        "sqrt(beta) in equal steps",
        "schedule.scaled_linear_beta",
        "start end timesteps roots",
        r"\sqrt{\beta_t} = \sqrt{\beta_{\mathrm{start}}}"
        r" + \frac{t}{T - 1} (\sqrt{\beta_{\mathrm{end}}} - \sqrt{\beta_{\mathrm{start}}})",
        lambda t: (sqrt(0.00085) + t / 999 * (sqrt(0.012) - sqrt(0.00085))) ** 2,
    ),
    Row(
        "cosine-schedule",
        "alpha_bar along a squared cosine; the paper's t",
        "schedule.cosine_beta",
        "f offset largest",
        formula=lambda t: min(
            1
            - cos(((t + 1) / 1000 + 0.008) / 1.008 * pi / 2) ** 2
            / cos((t / 1000 + 0.008) / 1.008 * pi / 2) ** 2,
            0.999,
        ),
    ),
    Row(
        "posterior",
        "The reverse step when the picture is known",
        "diffusion.q_posterior",
        "alpha_bar_t alpha_bar_s alpha_ts beta_ts mean variance",
        formula=lambda x_0, x_t, alpha_bar_t, alpha_bar_s: (
            (
                sqrt(alpha_bar_s) * (1 - alpha_bar_t / alpha_bar_s) * x_0
                + sqrt(alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) * x_t
            )
            / (1 - alpha_bar_t),
            (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s),
        ),
    ),
    Row(
        "v",
        "The velocity",
        "diffusion.v_from",
        "alpha_bar_t eps x_0",
        formula=lambda x_0, eps, alpha_bar_t: sqrt(alpha_bar_t) * eps - sqrt(1 - alpha_bar_t) * x_0,
    ),
    Row(
        "predictions",
        "Picture and noise, from a network that predicts eps, v or x_0",
        "diffusion.x_0_and_eps",
        "x_t signal noise output x_0 eps",
        formula=lambda x_t, output, alpha_bar_t: (
            (x_t - sqrt(1 - alpha_bar_t) * output) / sqrt(alpha_bar_t),
            sqrt(alpha_bar_t) * x_t - sqrt(1 - alpha_bar_t) * output,
            sqrt(1 - alpha_bar_t) * x_t + sqrt(alpha_bar_t) * output,
            (x_t - sqrt(alpha_bar_t) * output) / sqrt(1 - alpha_bar_t),
        ),
    ),
    Row(
        "score",
        "The gradient of the logarithm of the density",
        "diffusion.score_from diffusion.x_0_and_eps",
        "eps alpha_bar_t",
        formula=lambda eps, alpha_bar_t: -eps / sqrt(1 - alpha_bar_t),
    ),
    Row(
        "reverse-variance",
        "The variance of the reverse step, learned between its two ends",
        "diffusion.reverse_variance losses.split_output",
        "nu beta_ts beta_tilde",
        formula=lambda nu, alpha_bar_t, alpha_bar_s: exp(
            nu * log(1 - alpha_bar_t / alpha_bar_s)
            + (1 - nu) * log((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
        ),
    ),
    Row("loss-weight", "The squared error of one prediction as that of another", "losses.loss_weight", "snr"),
    Row(
        "distillation-target",
        "The picture by which one step goes as far as a teacher went in many",
        "training.distillation.x_0_between",
        "z_t z_s ratio",
    ),
    Row(
        "distillation-loss",
        "How far a student's one step misses it",
        "training.distillation.distillation_loss",
        "x_0 target weight",
    ),
    Row(
        "variational-bound",
        "What one step adds to the variational bound, here in nats, in the code in bits",
        "losses.variational_term",
        "beta_tilde sigma_2 z_0 z_0_hat",
        formula=lambda x_0, x_0_hat, beta_t, alpha_bar_t, alpha_bar_before: (
            (
                (1 - alpha_bar_before) / (1 - alpha_bar_t)
                - 1
                - log((1 - alpha_bar_before) / (1 - alpha_bar_t))
                + alpha_bar_before * beta_t / (1 - alpha_bar_t) ** 2 * (x_0 - x_0_hat) ** 2
            )
            / 2
            / log(2)
        ),
    ),
    Row(
        "prior-term",
        "What the start of the reverse process adds to it",
        "losses.prior_term",
        "alpha_bar_T z_0",
        formula=lambda x_0, alpha_bar_T: (alpha_bar_T * (x_0**2 - 1) - log(1 - alpha_bar_T)) / 2 / log(2),
    ),
    Row(
        "hybrid-loss",
        "The loss of a network that learns its variance",
        "losses.diffusion_loss",
        "loss vlb_weight bits",
        r"\mathcal{L}_{\mathrm{hybrid}} = \mathcal{L} + \lambda\, T\, L_{t-1}",
    ),
    Row(
        "time-embedding",
        "The time as cosines and sines",
        "layers.timestep_embedding layers.TimeEmbedding",
        "t width frequency angle",
    ),
    Row("res-block", "The residual block", "layers.ResBlock", "x time norm1 conv1 time_emb_proj norm2 conv2"),
    Row("group-norm", "Group normalisation", "layers.group_norm tools.kernels.GroupNorm", "eps"),
    Row(
        "group-norm-gradient",
        "Its derivative",
        "tools.kernels.ChannelsLastGroupNorm",
        "gamma dy inverse_sigma group_mean dx",
    ),
    Row(
        "attention",
        "Attention: softmax of the scores, over the values",
        "attention.Attention tools.kernels.attend",
        "q k v",
        formula=lambda q, k_0, k_1, v_0, v_1: (
            (exp(q * k_0) * v_0 + exp(q * k_1) * v_1) / (exp(q * k_0) + exp(q * k_1))
        ),
    ),
    Row("feed-forward", "The gated layer after it", "attention.FeedForward", "value gate"),
    Row(
        "latent-gaussian",
        "What the encoder makes of a picture",
        "vae.DiagonalGaussian vae.DiagonalGaussian.sample vae.KLVAE.encode",
        "mu logvar eps",
    ),
    Row(
        "kl",
        "Its distance from the standard normal",
        "vae.DiagonalGaussian.kl",
        "mu logvar",
        formula=lambda mu, logvar: (mu**2 + exp(logvar) - 1 - logvar) / 2,
    ),
    Row(
        "entropy",
        "Its entropy",
        "vae.DiagonalGaussian.entropy",
        "logvar",
        formula=lambda logvar: (log(2 * pi) + 1 + logvar) / 2,
    ),
    Row(
        "vae-loss",
        "The VAE's loss",
        "vae.vae_loss",
        "x x_hat kl_weight reconstruction",
        formula=lambda x, x_hat, mu, logvar, kl_weight: (
            abs(x - x_hat),
            abs(x - x_hat) + kl_weight * (mu**2 + exp(logvar) - 1 - logvar) / 2,
        ),
    ),
    Row(
        "causal-text",
        "A token's state depends on the tokens up to it",
        "text.TextTower",
        "tokens tower",
        r"c_i = c_i(w_1, \ldots, w_i)",
    ),
    Row(
        "sampling-times",
        "Where the samplers stop, spaced `trailing`; k from 0",
        "sampling.timesteps",
        "T steps",
        r"t_k = \mathrm{round}\left(T - k \frac{T}{K}\right) - 1",
    ),
    Row(
        "ddim-step",
        "DDIM",
        "sampling.ddim_step",
        "alpha_bar_t alpha_bar_s sigma_2 eta x_s",
        formula=lambda x_0, eps, noise, alpha_bar_t, alpha_bar_s, eta: (
            sqrt(alpha_bar_s) * x_0
            + sqrt(
                1
                - alpha_bar_s
                - eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
            )
            * eps
            + eta * sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * sqrt(1 - alpha_bar_t / alpha_bar_s) * noise
        ),
    ),
    Row(
        "dpm-solver-step",
        "DPM-Solver++ 2M",
        "sampling.dpmpp_2m_step",
        "h h_prev D noise eta",
        formula=lambda x_t, x_0, x_0_prev, noise, alpha_bar_t, alpha_bar_s, lambda_s, lambda_t, lambda_prev: (
            sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * exp(lambda_t - lambda_s) * x_t
            - sqrt(alpha_bar_s)
            * expm1(2 * (lambda_t - lambda_s))
            * (x_0 + (lambda_s - lambda_t) / (lambda_t - lambda_prev) / 2 * (x_0 - x_0_prev))
            + sqrt((alpha_bar_s - 1) * expm1(2 * (lambda_t - lambda_s))) * noise
        ),
    ),
    Row(
        "start",
        "Starting from a given picture; S is the strength",
        "sampling.Start sampling.timesteps",
        "x_0 strength T",
    ),
    Row("inpainting", "Keeping a part of it", "sampling.keep_known", "mask x_s x_0 eps"),
    Row(
        "noise-scale",
        "Less noise in every step; gamma over the whole chain",
        "sampling.scale_noise",
        "x_s a_s x_0 scale t s",
        formula=lambda x_s, x_0, t, s, alpha_bar_s, gamma: (
            sqrt(alpha_bar_s) * x_0 + gamma ** ((t - s) / 1000) * (x_s - sqrt(alpha_bar_s) * x_0)
        ),
    ),
    Row(
        "guidance",
        "Classifier-free guidance",
        "sampling.guided",
        "uncond cond scale",
        formula=lambda uncond, cond, scale: uncond + scale * (cond - uncond),
    ),
    Row("newton-schulz", "A matrix made orthogonal", "training.muon.orthogonalized", "G X A a b c QUINTIC"),
    Row("muon", "A step of Muon", "training.muon.Muon", "M momentum G lr weight_decay size"),
    Row("latent-scale", "The latent scale", "training.validation.measure_latent_scale", "second_moments"),
    Row(
        "psnr",
        "Peak signal-to-noise ratio",
        "training.validation.psnr",
        "x y mse",
        formula=lambda x, x_hat: 10 * log10(4 / (x - x_hat) ** 2),
    ),
    Row("ssim", "Structural similarity", "training.validation.ssim", "mu_x mu_y var_x var_y cov C_1 C_2"),
    Row(
        "bits-per-dimension",
        "The whole variational bound, of latents and of pictures",
        "evaluation.bits.bits_per_dimension",
        "prior terms entropy rate error",
    ),
    Row(
        "laplace-bits",
        "The probability of an 8-bit value",
        "evaluation.bits.laplace_bits",
        "x x_hat width F",
        formula=lambda x, x_hat, width: (
            -log2(
                copysign(1 - exp(-abs(x + 1 / 255 - x_hat) / width), x + 1 / 255 - x_hat) / 2
                - copysign(1 - exp(-abs(x - 1 / 255 - x_hat) / width), x - 1 / 255 - x_hat) / 2
            )
        ),
    ),
    Row(
        "latent-moments",
        "Mean and covariance of the scaled latents, by channel",
        "evaluation.metrics.latent_health",
        "mu logvar scale covariance variance",
    ),
    Row(
        "classifier-loss",
        "The attribute classifier's loss: both values of an attribute weigh the same",
        "evaluation.classifier.balanced_loss",
        "y frequency logits",
        formula=lambda truth, share, logit: (
            truth / (2 * share) * log(1 + exp(-logit)) + (1 - truth) / (2 * (1 - share)) * log(1 + exp(logit))
        ),
    ),
    Row(
        "balanced-accuracy",
        "Balanced accuracy: do pictures have what their prompts want, and lack what they do not",
        "evaluation.metrics.balanced_accuracy",
        "wanted seen right positive negative",
        formula=lambda n_wanted, n_both, n_unwanted, n_neither: (
            (n_both / n_wanted + n_neither / n_unwanted) / 2
        ),
    ),
    Row(
        "wilson-interval",
        "The interval of a rate; Z is 1.96",
        "evaluation.metrics.wilson_interval",
        "right n Z centre half",
        formula=lambda n_both, n_wanted: tuple(
            (n_both + 1.96**2 / 2 + sign * 1.96 * sqrt(n_both * (1 - n_both / n_wanted) + 1.96**2 / 4))
            / (n_wanted + 1.96**2)
            for sign in (-1, 1)
        ),
    ),
    Row(
        "balanced-interval",
        "The interval of balanced accuracy; i counts its two rates",
        "evaluation.metrics.balanced_interval evaluation.metrics.wilson_interval",
        "p rate n low high below above",
    ),
    Row(
        "frechet-distance",
        "The Frechet distance of two normal distributions",
        "evaluation.metrics.frechet_distance evaluation.metrics.gaussian_of",
        "mu_1 S_1 mu_2 S_2 root cross",
        formula=lambda mu_1, S_1, mu_2, S_2: (mu_1 - mu_2) ** 2 + S_1 + S_2 - 2 * sqrt(S_1 * S_2),
    ),
    Row(
        "precision-recall",
        "What a set of pictures covers: precision counts the generated that real ones cover, recall the reverse",
        "evaluation.metrics.precision_recall",
        "x by k reach covered",
    ),
    Row(
        "ema",
        "The average of the weights",
        "training.optimization.EMA training.optimization.EMA.update",
        "d decay n",
        formula=lambda average, theta, decay, n: (
            min(decay, (1 + n) / (10 + n)) * average + (1 - min(decay, (1 + n) / (10 + n))) * theta
        ),
    ),
)

ROWS = SPEC + CODE


# ------------------------------------------------------------------------------------------- reading


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def file_of(name: str) -> tuple[Path, list[str]]:
    r"""`training.caches.Latents.gaussian` -> ddpm/training/caches.py and the names within it, Latents and gaussian."""
    parts = name.split(".")
    depths = range(1, len(parts) + 1)
    paths = [ROOT.joinpath("ddpm", *parts[:depth]).with_suffix(".py") for depth in depths]
    return next(
        ((path, parts[d:]) for d, path in zip(depths, paths, strict=True) if path.is_file()), (paths[0], [])
    )


def definition(name: str) -> ast.AST | None:
    r"""The class, function or assignment called `diffusion.q_sample` or `vae.KLVAE.encode`; None if there is none."""
    path, inner = file_of(name)
    node = parsed(path) if inner else None
    for part in inner:
        node = next((child for child in getattr(node, "body", ()) if part in _names(child)), None)
    return node


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]


def docstring_tex(node: ast.AST | None) -> list[str]:
    r"""What stands between double dollars in a docstring."""
    documented = isinstance(node, ast.FunctionDef | ast.ClassDef)
    return re.findall(r"\$\$(.+?)\$\$", (documented and ast.get_docstring(node)) or "", re.DOTALL)


def documented_equations() -> list[str]:
    r"""Names of the classes and functions in ddpm whose docstring has an equation."""
    found = []

    def walk(node: ast.AST, name: str):
        for child in getattr(node, "body", ()):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}"
                found.extend([inner] if docstring_tex(child) else [])
                walk(child, inner)

    for path in sorted((ROOT / "ddpm").rglob("*.py")):
        walk(parsed(path), ".".join(path.relative_to(ROOT / "ddpm").with_suffix("").parts))
    return found


def marked_tests(folder: Path = ROOT / "tests") -> dict[str, list[str]]:
    r"""Equation id -> `tests/test_x.py::test_name` of every test that is marked with it, in the order of the files."""
    held: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py"), key=lambda p: (len(p.parts), p)):
        for node in parsed(path).body:
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.equation":
                    for argument in mark.args:
                        test = f"{path.relative_to(folder.parent).as_posix()}::{node.name}"
                        held.setdefault(ast.literal_eval(argument), []).append(test)
    return held


def tagged_cells(folder: Path = ROOT / "notebooks") -> dict[str, list[str]]:
    r"""Equation id -> `notebooks/05_name.ipynb#cell-id=05-07` of every cell with its tag, in order."""
    shown: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for tag in cell["metadata"].get("tags", ()):
                if tag.startswith("eq-"):
                    shown.setdefault(tag[3:], []).append(f"{folder.name}/{path.name}#cell-id={cell['id']}")
    return shown


def faults(
    rows: Iterable[Row] = ROWS,
    held: dict[str, list[str]] | None = None,
    shown: dict[str, list[str]] | None = None,
) -> list[str]:
    r"""What is wrong with the tables, one line each."""
    held = marked_tests() if held is None else held
    shown = tagged_cells() if shown is None else shown
    ids = [row.id for row in rows]
    named = {name for row in rows for name in row.code.split()}
    found = [
        f"two rows are called {id!r}; rename one" for id in sorted({id for id in ids if ids.count(id) > 1})
    ]
    for id in sorted(set(held) - set(ids)):
        found.append(f"expected the id of a row in docs/equations.py, got {id!r} on {held[id][0]}")
    for id in sorted(set(shown) - set(ids)):
        found.append(f"expected eq- and the id of a row in docs/equations.py, got eq-{id} on {shown[id][0]}")
    for name in sorted(set(documented_equations()) - named):
        found.append(f"the equation of ddpm.{name} has no row in docs/equations.py; add one and mark a test")
    return found + [fault for row in rows for fault in _row_faults(row, held)]


def _row_faults(row: Row, held: dict[str, list[str]]) -> Iterator[str]:
    if all("/compat/" in test for test in held.get(row.id, ())):
        yield f"no test outside tests/compat holds {row.id!r}; mark one with @pytest.mark.equation({row.id!r})"
    names = row.code.split()
    nodes = {name: definition(name) for name in names}
    for name in names:
        if nodes[name] is None:
            yield f"{row.id!r} names ddpm.{name}, which is not there; correct it in docs/equations.py"
    inner = [node for outer in nodes.values() if outer for node in ast.walk(outer)]
    known = {getattr(node, field, None) for node in inner for field in ("id", "arg", "attr")}
    for symbol in set(row.symbols.split()) - known:
        yield f"{row.id!r} names the symbol {symbol}, which is not in its code; correct it in docs/equations.py"
    if not row.tex and not docstring_tex(nodes[names[0]]):
        yield f"{row.id!r} has no equation; write one between $$ in the docstring of ddpm.{names[0]}"


# ------------------------------------------------------------------------------------------- writing

HEAD = r"""# Equations

<!-- Made by `python docs/equations.py` from its tables, the docstrings in ddpm/, tagged cells and marked tests. -->

Every equation of this project, with the code that computes it, the notebooks' cells that show it and the tests that
fail when the code departs from it. First come the specification's equations, in its order and its words, then those
that the code adds. [Notation](notation.md) lists the symbols and says where papers differ. Pictures are $x$ and latents
$z$. In [diffusion.py](../ddpm/diffusion.py) and [sampling.py](../ddpm/sampling.py) $x$ stands for both, because the
chain is the same.

A test's name is its claim. Tests of parity compare with another implementation and need the extra `compat`.
[test_equations.py](../tests/test_equations.py) compares the code of many rows, for single numbers, with the equation
typed a second time in [equations.py](equations.py). [mutations.py](../tests/mutations.py) changes the code of every
row, one place at a time and up to twelve places in each function, and demands that a test of its row fails.
"""
NAMES = ("", "Equation", "Symbols in the code", "Computed by", "Shown in", "Held by")
COLUMNS = f"| {' | '.join(NAMES)} |\n|{' --- |' * len(NAMES)}\n"


def page() -> str:
    r"""The text of equations.md."""
    held, shown = marked_tests(), tagged_cells()
    lines = [
        _line(number, row, held.get(row.id, []), shown.get(row.id, [])) for number, row in enumerate(ROWS, 1)
    ]
    spec, code = "".join(lines[: len(SPEC)]), "".join(lines[len(SPEC) :])
    return f"{HEAD}\n## The specification\n\n{COLUMNS}{spec}\n## What the code adds\n\n{COLUMNS}{code}"


def _line(number: int, row: Row, tests: list[str], cells: list[str]) -> str:
    names = row.code.split()
    node = definition(names[0])
    equations = [row.tex] if row.tex else docstring_tex(node)
    parts = [part for tex in equations for part in re.split(r",?\s*\\q?quad\s*", tex.strip())]
    links = "<br>".join(f"[{_sentence(test)}](../{test.split('::')[0]})" for test in tests)
    columns = (
        str(number),
        "<br>".join([f"{row.title} (`{row.id}`)", *(f"${_plain(part)}$" for part in parts)]),
        ", ".join(f"`{symbol}`" for symbol in row.symbols.split()),
        "<br>".join(f"[{name}](../{file_of(name)[0].relative_to(ROOT).as_posix()})" for name in names),
        "<br>".join(f"[{_place(cell)}](../{cell})" for cell in cells) or "-",
        f"<details><summary>{len(tests)} {'test' if len(tests) == 1 else 'tests'}</summary>{links}</details>",
    )
    return f"| {' | '.join(columns)} |\n"


def _plain(tex: str) -> str:
    r"""TeX on one line without a backslash before punctuation, and without bars: Markdown reads both as its own."""
    for old, new in ((r"\,", r"\thinspace "), (r"\|", r"\Vert "), ("|", r"\vert ")):
        tex = tex.replace(old, new)
    return " ".join(tex.split())


def _place(cell: str) -> str:
    r"""notebooks/05_name.ipynb#cell-id=05-07 -> 05, cell 7."""
    number, place = cell.rpartition("=")[2].split("-")
    return f"{number}, cell {int(place)}"


def _sentence(test: str) -> str:
    r"""tests/test_x.py::test_q_sample_is_right[...] -> q_sample is right."""
    words = test.split("::test_")[1].replace("_", " ")
    words = re.sub(r"\b(x|z|q|alpha|eps) (0|t|T|sample|bar|hat)\b", r"\1_\2", words)
    return f"{words} (parity)" if "/compat/" in test else words


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(f"expected no argument or --check, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    found = faults()
    if not found and not arguments:
        PAGE.write_text(page(), encoding="utf-8")
    elif not found and (not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page()):
        found = [
            f"{PAGE.name} is not what the code and the tests say; run python docs/equations.py and commit it"
        ]
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
