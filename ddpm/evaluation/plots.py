r"""The plots of an evaluation, each from the part of the result that it shows."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, no global state

from ddpm.evaluation.choices import Setting


def plot_adherence(path: Path, sources: dict):
    r"""Balanced accuracy of each attribute: generated pictures as bars, the classifier's own accuracy as marks."""
    generated = sources["generated"]["attributes"]
    names = [name for name, figures in generated.items() if figures["counted"]]
    names.sort(key=lambda name: generated[name]["balanced_accuracy"])
    values = {}
    for source, figures in sources.items():
        values[source] = [figures["attributes"][name]["balanced_accuracy"] for name in names]
    figure = _figure(7, 1.5 + 0.22 * len(names))
    axis = figure.subplots()
    axis.barh(names, values["generated"], color="#4477aa", label="generated")
    axis.plot(values["reconstructed"], names, "|", ms=10, color="#cc6677", label="real, through the VAE")
    axis.plot(values["real"], names, ".", color="#222222", label="real")
    axis.axvline(0.5, color="#888888", lw=0.8)
    axis.set(xlim=(0.4, 1.02), xlabel="balanced accuracy; 0.5 is chance")
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    _save(figure, path)


def plot_curve(path: Path, points: list[dict], x: str):
    r"""Adherence beside Frechet distance over `x`, guidance or steps, a line for each sampler."""
    lines = {}
    for point in points:
        lines.setdefault(Setting(*(point[field] for field in Setting._fields)).name, []).append(point)
    ticks = sorted({point[x] for point in points})
    figure = _figure(9, 3.5)
    axes = figure.subplots(1, 2)
    for axis, y, label in zip(
        axes, ("adherence", "frechet"), ("mean balanced accuracy", "Frechet distance"), strict=True
    ):
        for name, line in lines.items():
            measured = [point for point in line if point.get(y) is not None]
            axis.plot([p[x] for p in measured], [p[y] for p in measured], "o-", ms=4, label=name)
        axis.set(xlabel=x, ylabel=label, xscale="log" if x == "steps" else "linear")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend()
    _save(figure, path)


def plot_loss(path: Path, tenths: list[float], prediction: str):
    r"""The loss over the tenths of the time axis."""
    figure = _figure(5, 3.5)
    axis = figure.subplots()
    axis.plot(range(1, len(tenths) + 1), tenths, "o-", ms=4, color="#4477aa")
    axis.set(xlabel="tenth of the time axis, from the picture to noise", yscale="log")
    axis.set(ylabel=f"held-out loss ({prediction})")
    _save(figure, path)


def plot_latents(path: Path, health: dict):
    r"""The latents' moments by channel, and their correlations."""
    figure = _figure(9, 3.5)
    bars, square = figure.subplots(1, 2)
    for k, name in enumerate(("mean", "variance", "kl")):
        bars.bar(np.arange(len(health[name])) + 0.27 * (k - 1), health[name], 0.27, label=name)
    bars.set(xlabel="channel of the scaled latent")
    bars.legend()
    image = square.imshow(health["correlation"], vmin=-1, vmax=1, cmap="RdBu_r")
    square.set(xlabel="channel", title="correlation")
    figure.colorbar(image)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path):
    figure.savefig(path, format="png", dpi=110)
