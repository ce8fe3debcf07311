r"""What the command may be told, without torch, so that `--help` answers at once."""

import math
from typing import NamedTuple

CURVES = ("guidance", "steps")
PARTS = (
    "adherence",
    "wordings",
    "frechet",
    "spread",
    "neighbours",
    "vae",
    "latents",
    "loss",
    "bits",
    *CURVES,
)
SAMPLERS = ("ddpm", "ddim", "dpm++")
EXTRACTORS = ("classifier", "efficientnet-lite0", "inception")


class Scope(NamedTuple):
    r"""How much is measured where `--n` does not say it, and how far the curves go.

    Attributes:
        prompts: held-out pictures, fewer where the split has fewer.
        curve_prompts: the most prompts for each point of a curve, and in other wordings; math.inf: as many as there are
            held-out pictures.
        guidances: guidance scales of the guidance curve. steps: numbers of steps of the steps curve.
        whole_chain: whether DDPM at all timesteps is a point of the steps curve.
    """

    prompts: int
    curve_prompts: float
    guidances: tuple[float, ...]
    steps: tuple[int, ...]
    whole_chain: bool = False


SCOPES = {
    "quick": Scope(128, 64, (1.0, 3.0, 7.5), (5, 20)),
    "normal": Scope(391, 128, (1.0, 2.0, 3.0, 5.0, 7.5), (5, 10, 20, 50)),
    "full": Scope(391, math.inf, (1.0, 2.0, 3.0, 5.0, 7.5), (5, 10, 20, 50), whole_chain=True),
}


class Setting(NamedTuple):
    r"""How pictures are drawn; prompts and noise are the same for all settings."""

    sampler: str
    steps: int
    guidance: float
    eta: float = 0.0
    noise_scale: float = 1.0

    @property
    def name(self) -> str:
        r"""The sampler, with its eta and its noise scale where it has them."""
        eta = f", eta {self.eta:g}" if self.eta else ""
        return self.sampler + eta + (f", noise scale {self.noise_scale:g}" if self.noise_scale < 1 else "")

    @property
    def calls(self) -> int:
        r"""How often the UNet runs for one picture: guidance takes two runs a step, except at 0 and 1."""
        return self.steps * (1 if self.guidance in (0, 1) else 2)

    def __str__(self) -> str:
        return f"{self.name}, {self.steps} steps, guidance {self.guidance:g}"


def setting_of(point: dict) -> Setting:
    r"""The setting of one point of a curve, as the result has it."""
    return Setting(*(point[field] for field in Setting._fields))


def curve_settings(main: Setting, scope: Scope, timesteps: int) -> dict[str, list[Setting]]:
    r"""The points of each curve: the main setting at all guidance scales; all samplers, and dpm++ with noise."""
    kinds = [*((sampler, 0.0) for sampler in SAMPLERS), ("dpm++", 1.0)]
    counts = [steps for steps in scope.steps if steps <= timesteps]
    steps = [
        main._replace(sampler=sampler, steps=count, eta=eta) for sampler, eta in kinds for count in counts
    ]
    if scope.whole_chain:
        steps.append(main._replace(sampler="ddpm", steps=timesteps, eta=0.0))
    return {"guidance": [main._replace(guidance=scale) for scale in scope.guidances], "steps": steps}
