r"""How good a run is, in numbers: one JSON, its plots and grids, in RUN/evaluation.

python -m ddpm.evaluation runs/NAME              391 held-out prompts; says first how long drawing will take
python -m ddpm.evaluation runs/NAME --quick      128 prompts, short curves
python -m ddpm.evaluation runs/NAME --full       every curve with all prompts, and DDPM at all steps; hours on a CPU

An evaluation that is in the folder already is replaced; its figures stay as result.previous.json."""

import argparse
import sys

from ddpm.config import fill_in_drawing
from ddpm.evaluation.choices import EXTRACTORS, PARTS, SAMPLERS, SCOPES
from ddpm.tools.command import DEVICES, NOISE_SCALE, TRAIN, Parser, check_drawing, exit_code, path
from ddpm.tools.errors import UserError


def parser() -> Parser:
    p = Parser(__doc__)
    p.prog = "python -m ddpm.evaluation"
    add = p.add_argument
    add("run", type=path, metavar="RUN", help="a run folder")
    prompts = SCOPES["normal"].prompts
    add("--n", type=int, help=f"held-out pictures, whose captions are the prompts [{prompts}, or all]")
    add("--split", choices=("valid", "test"), default="test", help="where they come from [test]")
    add("--sampler", choices=SAMPLERS, help="[dpm++; ddim for a model of few steps]")
    add("--steps", type=int, help="steps, 1 to 1000 [20, or the model's few]")
    add("--guidance", type=float, help="how strongly to follow the prompt [3; 1 with few steps]")
    add("--eta", type=float, default=0.0, help="noise of ddim and dpm++, 0 to 1 [0]")
    add("--noise-scale", type=float, metavar="G", help=NOISE_SCALE)
    add("--weights", choices=("ema", "unet"), default="ema", help="averaged weights or the last ones [ema]")
    add("--seed", type=int, default=0, help="[0]")
    extractor_help = "whose features the Frechet distance compares [classifier]"
    add("--extractor", choices=EXTRACTORS, default="classifier", help=extractor_help)
    scope = p.add_mutually_exclusive_group()
    scopes = {"quick": "fewer prompts, short curves", "full": "whole curves, DDPM at all steps"}
    for name, meaning in scopes.items():
        scope.add_argument(f"--{name}", action="store_const", dest="scope", const=name, help=meaning)
    p.set_defaults(scope="normal")
    add("--only", type=part_names, default=PARTS, metavar="PART,...", help=f"only some of {','.join(PARTS)}")
    add("--data", type=path, metavar="PATH", help="where the run's data is now [where it was]")
    cache_help = "folder of decoded pictures and classifiers [beside the run: cache]"
    add("--cache", type=path, metavar="DIR", help=cache_help)
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="[auto]")
    add("--device", choices=DEVICES, default="auto", help="[auto]")
    out_help = "folder to write to [RUN/evaluation; of what ships, runs/shipped-evaluation]"
    add("--out", type=path, metavar="DIR", help=out_help)
    return p


def part_names(text: str) -> tuple[str, ...]:
    r"""The parts that `--only` lists, in its order, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [repr(name) for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, got {', '.join(unknown)}")
    return names


def main(argv: list[str] | None = None):
    r"""The command `python -m ddpm.evaluation`."""
    options = parser().parse_args(argv)
    fill_in_drawing(options, options.run)
    check_drawing(options)
    if options.seed < 0:
        raise UserError(f"expected --seed of at least 0, got {options.seed}")
    if not options.run.is_dir():
        run = options.run
        raise UserError(f"expected the folder of a run, {run} is none; train one with {TRAIN}")
    from ddpm.evaluation.command import evaluate  # here, because it loads torch

    evaluate(options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
