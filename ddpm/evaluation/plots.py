r"""The plots of an evaluation, each from the part of the result that it shows."""

import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, no global state

from ddpm.evaluation.choices import setting_of


def plot_adherence(sources: dict) -> Figure:
    r"""Balanced accuracy of each attribute: generated pictures as bars, the classifier's own accuracy as marks."""
    generated = sources["generated"]["attributes"]
    names = [name for name, figures in generated.items() if figures["counted"]]
    names.sort(key=lambda name: generated[name]["balanced_accuracy"])
    values = {}
    for source, figures in sources.items():
        values[source] = [figures["attributes"][name]["balanced_accuracy"] for name in names]
    figure = Figure((7, 1.5 + 0.22 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.barh(names, values["generated"], color="#4477aa", label="generated")
    axis.plot(values["reconstructed"], names, "|", ms=10, color="#cc6677", label="real, through the VAE")
    axis.plot(values["real"], names, ".", color="#222222", label="real")
    axis.axvline(0.5, color="#888888", lw=0.8)
    axis.set(xlim=(0.4, 1.02), xlabel="balanced accuracy; 0.5 is chance")
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    return figure


def plot_curve(points: list[dict], x: str) -> Figure:
    r"""Adherence beside Frechet distance over `x`, guidance or steps, a line for each sampler."""
    names = [setting_of(point).name for point in points]
    ticks = sorted({point[x] for point in points})
    figure = Figure((9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_ylabel("mean balanced accuracy")
    right.set_ylabel("Frechet distance")
    for axis, y in ((left, "adherence"), (right, "frechet")):
        for line in dict.fromkeys(names):
            on_line = zip(points, names, strict=True)
            values = [(p[x], p[y]) for p, name in on_line if name == line and p.get(y) is not None]
            axis.plot(*np.reshape(values, (-1, 2)).T, "o-", ms=4, label=line)
        axis.set(xlabel=x, xscale="log" if x == "steps" else "linear")
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend()
    return figure


def plot_loss(tenths: list[float], prediction: str) -> Figure:
    r"""The loss over the tenths of the time axis."""
    figure = Figure((5, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(1, len(tenths) + 1), tenths, "o-", ms=4, color="#4477aa")
    axis.set(xlabel="tenth of the time axis, from the picture to noise", yscale="log")
    axis.set(ylabel=f"held-out loss ({prediction})")
    return figure


def plot_latents(health: dict) -> Figure:
    r"""The latents' moments by channel, and their correlations."""
    figure = Figure((9, 3.5), layout="constrained")
    bars, square = figure.subplots(1, 2)
    for k, name in enumerate(("mean", "variance", "kl")):
        bars.bar(np.arange(len(health[name])) + 0.27 * (k - 1), health[name], 0.27, label=name)
    bars.set(xlabel="channel of the scaled latent")
    bars.legend()
    image = square.imshow(health["correlation"], vmin=-1, vmax=1, cmap="RdBu_r")
    square.set(xlabel="channel", title="correlation")
    figure.colorbar(image)
    return figure
