r"""The parts `guidance` and `steps`: adherence and Frechet distance over a setting."""

from ddpm.evaluation import metrics, plots
from ddpm.evaluation.shared import Evaluation


def curve(e: Evaluation, x: str) -> list[dict]:
    r"""The points of the curve over `x`, guidance or steps; same prompts, same noise."""
    e.check_all_times()
    n = e.curve_n
    real = metrics.gaussian_of(e.real_features[:n])
    points = []
    for setting in e.curves[x]:
        drawn = e.draw(setting)[:n]
        point = {**setting._asdict(), "n": n}
        if e.classifier is not None:
            scores = e.scores(e.attributes(drawn), slice(n))
            point |= {"adherence": scores["mean"], **{key: scores[key] for key in ("interval", "counted")}}
        point["frechet"] = metrics.frechet_distance(*real, *metrics.gaussian_of(e.features(drawn)))
        points.append(point)
    e.files[f"{x}.png"] = plots.plot_curve(points, x)
    return points
