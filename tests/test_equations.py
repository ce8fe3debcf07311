r"""The page of equations: up to date, without gaps, and its formulas' numbers those of the code."""

import inspect
import json
import re
from types import SimpleNamespace

import equations
import numpy as np
import pytest
import torch
from conftest import normal
from equations import ROWS, Row, definition, docstring_tex, faults, marked_tests, page, tagged_cells
from torch import nn

from ddpm.celeba.dataset import Pictures
from ddpm.diffusion import (
    forward_step,
    q_posterior,
    q_sample,
    reverse_variance,
    score_from,
    v_from,
    x_0_and_eps,
)
from ddpm.evaluation.bits import laplace_bits
from ddpm.evaluation.classifier import balanced_loss
from ddpm.evaluation.metrics import balanced_accuracy, frechet_distance, wilson_interval
from ddpm.losses import diffusion_loss, prior_term, variational_term
from ddpm.sampling import ddim_step, ddpm_step, dpmpp_2m_step, guided, scale_noise
from ddpm.schedule import Schedule
from ddpm.tools.kernels import attend
from ddpm.training.optimization import EMA
from ddpm.training.validation import psnr
from ddpm.vae import DiagonalGaussian, vae_loss

# ------------------------------------------------------------------------------------------- page


def test_every_row_has_code_symbols_an_equation_and_a_test_and_every_mark_and_docstring_a_row():
    assert faults() == []


def test_the_page_is_what_the_script_writes(tmp_path, monkeypatch, capsys):
    assert equations.main(["--check"]) == 0
    monkeypatch.setattr(equations, "PAGE", tmp_path / "equations.md")
    assert equations.main(["--check"]) == 1
    told = capsys.readouterr().err
    assert "run python docs/equations.py" in told and told.count("\n") == 1
    assert equations.main([]) == 0 == equations.main(["--check"])
    equations.PAGE.write_text(page() + "more")
    assert equations.main(["--check"]) == 1


HELD = {"forward-step": ["tests/test_diffusion.py::test_one"]}


def row(code="diffusion.forward_step", symbols="", tex="x"):
    return Row("forward-step", "", code, symbols, tex)


FORWARD = row(symbols="beta_t", tex="")


@pytest.mark.parametrize(
    "rows, held, told",
    [
        ([FORWARD], {}, "no test outside tests/compat holds 'forward-step'"),
        ([FORWARD], {"forward-step": ["tests/compat/test_x.py::test_one"]}, "no test outside tests/compat"),
        ([FORWARD], HELD | {"x": ["tests/test_x.py::test_two"]}, "got 'x' on tests/test_x.py::test_two"),
        ([row(code="diffusion.back")], HELD, "names ddpm.diffusion.back, which is not there"),
        ([row(code="nowhere.step")], HELD, "names ddpm.nowhere.step, which is not there"),
        ([row(symbols="gamma_t")], HELD, "names the symbol gamma_t, which is not in its code"),
        ([row(code="losses.training_target", tex="")], HELD, "'forward-step' has no equation"),
        ([FORWARD, FORWARD], HELD, "two rows are called 'forward-step'; rename one"),
        ([FORWARD], HELD, "the equation of ddpm.diffusion.q_sample has no row"),
    ],
)
def test_a_gap_is_told_in_one_line_that_says_where(rows, held, told):
    found = [fault for fault in faults(rows, held, {}) if told in fault]
    assert len(found) == 1 and "\n" not in found[0]


def test_marks_and_tags_are_read_in_the_order_of_their_files_and_without_running_anything(
    tmp_path, monkeypatch
):
    (tmp_path / "tests" / "compat").mkdir(parents=True)
    (tmp_path / "tests" / "test_b.py").write_text(
        "raise SystemExit\n@pytest.mark.parametrize('x', [1])\n@pytest.mark.equation('v', 'kl')\ndef test_one(x): ...\n"
        "def test_two(): ...\n"
    )
    (tmp_path / "tests" / "compat" / "test_a.py").write_text(
        "@pytest.mark.equation('v')\ndef test_three(): ...\n"
    )
    one, three = "tests/test_b.py::test_one", "tests/compat/test_a.py::test_three"
    assert marked_tests(tmp_path / "tests") == {"v": [one, three], "kl": [one]}

    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name, tags in (("02_b", ["eq-kl", "hide-input"]), ("01_a", ["eq-forward-step", "eq-kl"])):
        cells = [
            {"id": f"{name[:2]}-01", "metadata": {}},
            {"id": f"{name[:2]}-12", "metadata": {"tags": tags}},
        ]
        (folder / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    one, two = "notebooks/01_a.ipynb#cell-id=01-12", "notebooks/02_b.ipynb#cell-id=02-12"
    shown = tagged_cells(folder)
    assert shown == {"forward-step": [one], "kl": [one, two]}
    [fault] = [fault for fault in faults([FORWARD], HELD, shown) if "has no row" not in fault]
    assert f"got eq-kl on {one}" in fault
    monkeypatch.setattr(equations, "tagged_cells", lambda: shown)
    assert f"[01, cell 12](../{one})<br>[02, cell 12](../{two})" in page()


def test_the_page_can_be_read_as_markdown():
    r"""A cell ends at any bar, and a backslash before punctuation is Markdown's, not TeX's."""
    rows = [line for line in page().split("\n") if re.match(r"\| \d", line)]
    assert [int(line.split("|")[1]) for line in rows] == list(range(1, len(ROWS) + 1))
    for line in rows:
        assert line.count("|") == len(equations.NAMES) + 1 and line.count("$") % 2 == 0
        assert not re.search(r"\\[!-/:-@\[-`{-~]", line)
        for path in re.findall(r"\]\(\.\./(.+?)[#)]", line):
            assert (equations.ROOT / path).is_file()


@pytest.mark.parametrize("id", ["forward-step", "objective", "hybrid-loss"])
def test_an_equation_that_the_table_brings_along_stands_in_the_docstring_too(id):
    r"""Up to spaces, dots of multiplication and the kind of bars and braces."""

    def bare(tex):
        tex = tex.replace(r"\left\|", r"\lVert").replace(r"\right\|", r"\rVert")
        return re.sub(r"\\left|\\right|\\cdot|\\[ ,;]|[\s{}]", "", tex)

    [row] = [row for row in ROWS if row.id == id]
    assert bare(row.tex) in bare("".join(docstring_tex(definition(row.code.split()[0]))))


# ------------------------------------------------------------------------------------------- numbers

N = 100
ANSWERS = 60  # pictures in which attributes are counted
LINEAR = Schedule.named("linear")
CHAINS = {name: Schedule.named(name) for name in ("linear", "scaled_linear", "cosine")}


def drawn():
    r"""A random number for every symbol that a formula takes: tensors of N, or one for all."""
    g = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return low + (high - low) * torch.rand(N, generator=g, dtype=torch.float64)

    def below(high):
        r"""A whole number from 0 to high - 1."""
        return (uniform(0, 1) * high).long()

    names = "x_prev x_0 x_0_hat x_0_prev x_t x_s x x_hat eps eps_hat noise output mu logvar uncond cond"
    names += " average theta q k_0 k_1 v_0 v_1 mu_1 mu_2 S_1 S_2 logit"
    V = {name: normal(N, seed=seed) for seed, name in enumerate(names.split())}
    for name in ("x", "x_hat"):  # pictures, in [-1, 1]
        V[name] = V[name].tanh()
    for name in ("S_1", "S_2"):  # variances
        V[name] = V[name].exp()
    V["t_prev"] = torch.randint(2, 1000, (N,), generator=g)
    V["t"] = 1 + below(V["t_prev"] - 1)
    V["s"] = below(V["t"])
    for letter, t in (("s", V["s"]), ("t", V["t"]), ("prev", V["t_prev"]), ("before", V["t"] - 1)):
        V[f"alpha_bar_{letter}"] = LINEAR.alpha_bar[t]
        V[f"lambda_{letter}"] = torch.logit(LINEAR.alpha_bar[t]) / 2
    V["alpha_bar_T"] = LINEAR.alpha_bar[-1].item()
    V["beta_t"] = LINEAR.beta[V["t"]]
    V["nu"] = uniform(0, 1)
    V["level"] = below(256)
    V["truth"] = below(2)
    V["share"] = uniform(0.05, 0.95)
    V["n_wanted"] = 1 + below(ANSWERS - 1)
    V["n_both"] = below(V["n_wanted"] + 1)
    V["n_unwanted"] = ANSWERS - V["n_wanted"]
    V["n_neither"] = below(V["n_unwanted"] + 1)
    constants = {"eta": 0.6, "scale": 3.5, "kl_weight": 0.3, "decay": 0.7, "n": 7, "width": 0.4, "gamma": 0.8}
    return SimpleNamespace(**V, **constants, beta=LINEAR.beta.tolist())


def vae_losses(V):
    r"""Of single numbers: the mean over a batch is taken of one."""
    numbers = torch.stack([V.x, V.x_hat, V.mu, V.logvar], dim=1).float()
    losses = [
        vae_loss(x, x_hat, DiagonalGaussian(mu[None, None], logvar[None, None]), V.kl_weight)
        for x, x_hat, mu, logvar in numbers
    ]
    return [torch.stack(column) for column in zip(*losses, strict=True)]


def averaged(V):
    network = nn.Linear(N, 1, bias=False).double()
    network.weight.data.copy_(V.average)
    ema = EMA(network, V.decay)
    network.weight.data.copy_(V.theta)
    ema.update(network, V.n)
    return ema.shadow["weight"][0]


def pictures_of(level):
    pixels = level.to(torch.uint8).numpy()[:, None, None, None].repeat(3, axis=3)
    return Pictures(pixels, np.ones(N, bool), np.zeros(N, np.uint8), None, ("",) * N, (), "")


def accuracies(V):
    r"""Of N attributes: first the pictures that want one, the right answers before the wrong ones."""
    place = torch.arange(ANSWERS)[:, None]
    wanted = place < V.n_wanted
    right = torch.where(wanted, place < V.n_both, place < V.n_wanted + V.n_neither)
    return balanced_accuracy(wanted, wanted == right)


def frechet_distances(V):
    r"""Of normal distributions of single numbers."""
    numbers = torch.stack([V.mu_1, V.S_1, V.mu_2, V.S_2], dim=1)[:, :, None]
    found = [frechet_distance(mu_1, S_1[:, None], mu_2, S_2[:, None]) for mu_1, S_1, mu_2, S_2 in numbers]
    return torch.tensor(found, dtype=torch.float64)


def classifier_losses(V):
    numbers = zip(V.logit, V.truth, V.share, strict=True)
    return torch.stack([balanced_loss(logit, truth == 1, share) for logit, truth, share in numbers])


def guided_answers(V):
    answer, empty = torch.cat([V.uncond, V.cond])[:, None], torch.zeros(N, 1, 1)
    return guided(lambda z_t, t, context: answer, empty, empty.clone(), V.scale)(V.x_t[:, None], V.t)[:, 0]


EXACT = {  # id -> what the code computes of the drawn numbers, one tensor of N or several
    "forward-step": lambda V: forward_step(LINEAR, V.x_prev, V.t, V.eps),
    "reverse-process": lambda V: ddpm_step(LINEAR, V.x_t, V.t, V.s, V.x_0, V.noise),
    "objective": lambda V: diffusion_loss(
        LINEAR, lambda z_t, t: V.eps_hat[:, None], V.x_0[:, None], V.t, V.eps[:, None]
    ),
    "closed-form": lambda V: q_sample(LINEAR, V.x_0, V.t, V.eps),
    "preprocessing": lambda V: pictures_of(V.level).batch(np.arange(N))[:, 0, 0, 0],
    "alpha-bar": lambda V: LINEAR.alpha_bar[V.t],
    "linear-schedule": lambda V: CHAINS["linear"].beta[V.t],
    "scaled-linear-schedule": lambda V: CHAINS["scaled_linear"].beta[V.t],
    "cosine-schedule": lambda V: CHAINS["cosine"].beta[V.t],
    "posterior": lambda V: q_posterior(LINEAR, V.x_0, V.x_t, V.t, V.s),
    "v": lambda V: v_from(LINEAR, V.x_0, V.t, V.eps),
    "predictions": lambda V: [
        x_0_and_eps(LINEAR, V.x_t, V.t, V.output, prediction)[i]
        for prediction, i in (("eps", 0), ("v", 0), ("v", 1), ("x_0", 1))
    ],
    "score": lambda V: score_from(LINEAR, V.t, V.eps),
    "reverse-variance": lambda V: reverse_variance(LINEAR, V.x_t, V.t, V.s, "learned", V.nu),
    "variational-bound": lambda V: variational_term(
        LINEAR, V.x_0[:, None], V.x_t[:, None], V.t, V.x_0_hat[:, None], "x_0", "beta"
    ),
    "prior-term": lambda V: prior_term(LINEAR, V.x_0[:, None]),
    "attention": lambda V: attend(
        V.q[:, None, None, None],
        torch.stack([V.k_0, V.k_1], dim=1)[:, None, :, None],
        torch.stack([V.v_0, V.v_1], dim=1)[:, None, :, None],
    ).flatten(),
    "kl": lambda V: DiagonalGaussian(V.mu[:, None], V.logvar[:, None]).kl(),
    "entropy": lambda V: DiagonalGaussian(V.mu[:, None], V.logvar[:, None]).entropy(),
    "vae-loss": vae_losses,
    "ddim-step": lambda V: ddim_step(LINEAR, V.x_t, V.t, V.s, V.x_0, V.eps, V.noise, V.eta),
    "dpm-solver-step": lambda V: dpmpp_2m_step(
        LINEAR, V.x_t, V.t, V.s, V.x_0, (V.t_prev, V.x_0_prev), V.noise, eta=1.0
    ),
    "noise-scale": lambda V: scale_noise(LINEAR, V.x_s, V.t, V.s, V.x_0, V.gamma),
    "guidance": guided_answers,
    "psnr": lambda V: psnr(V.x[:, None], V.x_hat[:, None]),
    "laplace-bits": lambda V: laplace_bits(V.x, V.x_hat, V.width),
    "classifier-loss": classifier_losses,
    "balanced-accuracy": accuracies,
    "wilson-interval": lambda V: wilson_interval(V.n_both.double(), V.n_wanted.double()),
    "frechet-distance": frechet_distances,
    "ema": averaged,
}


def difference_of(row, V):
    r"""The largest difference between a row's formula and its code, relative where numbers are above 1."""
    names = inspect.signature(row.formula).parameters
    values = [getattr(V, name) for name in names]
    by_formula = [
        row.formula(*(v[i].item() if isinstance(v, torch.Tensor) else v for v in values)) for i in range(N)
    ]
    by_formula = torch.tensor(by_formula, dtype=torch.float64).reshape(N, -1).T
    computed = EXACT[row.id](V)
    computed = torch.stack([computed] if isinstance(computed, torch.Tensor) else list(computed))
    difference = (computed.double() - by_formula).abs() / by_formula.abs().clamp(min=1)
    return difference.max().item(), 1e-9 if computed.dtype == torch.float64 else 1e-5


@pytest.mark.equation(
    "forward-step", "reverse-process", "objective", "closed-form", "preprocessing", "alpha-bar"
)
@pytest.mark.equation("linear-schedule", "scaled-linear-schedule", "cosine-schedule", "posterior", "v")
@pytest.mark.equation("predictions", "score", "reverse-variance", "variational-bound", "prior-term")
@pytest.mark.equation("attention", "kl", "entropy", "vae-loss", "ddim-step", "dpm-solver-step", "guidance")
@pytest.mark.equation("psnr", "laplace-bits", "classifier-loss", "balanced-accuracy")
@pytest.mark.equation("wilson-interval", "frechet-distance", "ema", "noise-scale")
@pytest.mark.parametrize("row", [row for row in ROWS if row.formula], ids=lambda row: row.id)
def test_a_formula_gives_the_numbers_of_its_code(row):
    r"""float64: alpha_bar near 1 loses some of sixteen digits. 1e-5: float32, which the loss and pictures are in."""
    difference, tolerance = difference_of(row, drawn())
    assert difference < tolerance


def test_a_formula_that_departs_from_its_code_is_seen_and_every_formula_is_compared():
    wrong = Row(
        "forward-step", "", "", "", "", lambda x_prev, eps, beta_t: (1 - beta_t) * x_prev + beta_t * eps
    )
    difference, tolerance = difference_of(wrong, drawn())
    assert difference > 1000 * tolerance
    this = "tests/test_equations.py::test_a_formula_gives_the_numbers_of_its_code"
    marked = {id for id, tests in marked_tests().items() if this in tests}
    assert marked == set(EXACT) == {row.id for row in ROWS if row.formula}
