r"""To and from the folder that diffusers' `StableDiffusionPipeline` opens; needs neither diffusers nor transformers.

python -m ddpm.export runs/drawn64 exported             # a run becomes a diffusers folder
python -m ddpm.export --reverse exported runs/again     # and back
python -m ddpm.export --half runs/drawn64 small         # a run's configuration and weights alone, in float16

Our modules already have diffusers' names, so a table of renames is all that lies between the two. The folder names our
default sampler, DPM-Solver++ 2M with trailing steps, or DDIM for a model of few steps. Give the pipeline the steps and
the guidance, because its own defaults differ.
"""

import argparse
import sys

from ddpm.config import WORDS_FILE
from ddpm.tools.command import Parser, exit_code, path
from ddpm.tools.errors import printable


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.prog = "python -m ddpm.export"
    p.add_argument("source", type=path, metavar="RUN", help="a run folder; with --reverse a diffusers folder")
    p.add_argument(
        "target", type=path, metavar="DIR", help="the folder to write; with --reverse a run folder"
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument("--reverse", action="store_true", help="from diffusers to a run")
    how.add_argument(
        "--half", action="store_true", help="a run of weights in float16 alone, to hand on, not to resume"
    )
    p.add_argument(
        "--weights", choices=("ema", "unet"), default="ema", help="averaged weights or the last ones [ema]"
    )
    return p


def main(argv: list[str] | None = None):
    p = parser()
    a = p.parse_args(argv)
    if a.reverse and a.weights != "ema":
        p.error("expected --weights without --reverse, because a diffusers folder has one UNet; leave it out")
    # after the parser, because torch takes seconds
    from ddpm.export.diffusers_folder import export, import_diffusers
    from ddpm.model import TextToImage
    from ddpm.tools.files import new_folder, write_atomically

    model = import_diffusers(a.source) if a.reverse else TextToImage.load(a.source, a.weights)
    if not (a.reverse or a.half):
        export(model, a.target)
    else:
        with new_folder(a.target) as folder:
            if a.half:
                model.half().save(folder)
                for name in ("config.json", WORDS_FILE):
                    if (a.source / name).is_file():
                        write_atomically(folder / name, (a.source / name).read_bytes())
            else:
                model.save(folder)  # with its text tower, which no name would bring back
    unknown = "; it does not say what it was trained on, so give an evaluation --data"
    print(printable(f"wrote {a.target}{unknown if a.reverse else ''}"))


if __name__ == "__main__":
    sys.exit(exit_code(main))
