r"""A whole training, as train.py runs it: the data, the model, the run folder, and the stages."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ddpm.celeba.dataset import Pictures, fingerprint, load_pictures, open_data, reopen_data
from ddpm.celeba.download import download_celeba
from ddpm.celeba.lists import TRAIN, VALID
from ddpm.config import MOVABLE, TEXT_FILE, Config, size_warning
from ddpm.model import SHIPPED, TextToImage
from ddpm.tools import text_weights
from ddpm.tools.command import SAMPLE, Stopped, be_quiet, progress_bar, say
from ddpm.tools.devices import allow_tf32, choose_device, choose_precision
from ddpm.tools.errors import UserError
from ddpm.tools.files import CannotWrite, remove_leftovers, write_atomically
from ddpm.tools.weights import load_weights
from ddpm.training import dry_run, perceptual
from ddpm.training.batches import check_counts
from ddpm.training.optimization import NotFinite
from ddpm.training.parallel import Group, LostGroup, is_lost
from ddpm.training.run_folder import Run
from ddpm.training.stages import BEGUN_UNET, FewStepsStage, Session, Step, UnetStage, VaeStage, restore_vae

INIT_FILE = "init.txt"  # of a run with --init: which weights it began with


def print_needs(config: Config, device: str = "auto", stage: str = "all"):
    r"""Print what a training of this configuration would need; write nothing."""
    device = choose_device(device)
    allow_tf32(device)
    precision = choose_precision(config.training.precision, device)
    for line in dry_run.report(config, open_data(config), device, precision, stage):
        print(line)


def train(
    config: Config,
    folder: Path,
    resume: bool = False,
    stage: str = "all",
    stop_after: int | None = None,
    device: str = "auto",
    cache: Path | None = None,
    download: bool = False,
    started: float | None = None,
    pictures: Pictures | None = None,
) -> Iterator[Step]:
    r"""Train in `folder`, which is new, or resumed with the stored `config`: a step whenever the caller asks for one.

    Yields the stage's name, vae or unet, and the step's report. If the caller stops asking, the run is saved at that
    step, and `resume` goes on from there.

    Args:
        stage: vae, unet or all.
        stop_after: steps after which to save and return.
        cache: folder of decoded pictures, latents and captions; None: `cache` beside the run.
        download: try to download CelebA into the data folder first.
        started: when the command began, by `time.monotonic`; --max-minutes counts from there.
        pictures: the data, in place of what config.training.data names.

    Raises: UserError, or Stopped after a signal; both say what is saved and how to go on.
    """
    started = time.monotonic() if started is None else started
    folder = Path(folder)
    given = {"--cache": cache and str(cache), "--device": device if device != "auto" else None}
    places = "".join(f" {flag} {shlex.quote(value)}" for flag, value in given.items() if value)
    cache = cache or folder.absolute().parent / "cache"
    device = choose_device(device)
    precision = choose_precision(config.training.precision, device)
    if config.model.few_steps:
        if stage == "vae" or not config.training.init:
            raise UserError(
                "expected a teacher for --few-steps, and no --stage vae; name a run with --distill"
            )
        stage = "unet"
    with Group.joined(device) as group:
        if group.rank:
            be_quiet()
        with group.main_process_first():
            run = Run(folder, config, resume, started, writes=group.rank == 0)
        run.stage, run.places = stage, places
        with run, advising(run):
            check_batches(config, group)
            session = prepared(run, group, precision, stage, resume, cache, download, pictures)
            session.steps_left = stop_after
            is_vae_done = restore_vae(session, stage) or (yield from VaeStage(session).train())
            second = FewStepsStage if config.model.few_steps else UnetStage
            if is_vae_done and stage != "vae" and (yield from second(session).train()):
                say(f"done in {run.clock() / 60:.1f} minutes; try:")
                prompt = "a smiling woman with blond hair and eyeglasses"
                if session.pictures.captions is not None:
                    prompt = session.pictures.full_caption(session.pictures.rows(TRAIN)[0])
                say(f"  {SAMPLE} {shlex.quote(prompt)} --model {run.quoted}")


def check_batches(config: Config, group: Group):
    r"""Raise UserError where the processes and their micro-batches do not divide a batch."""
    settings = config.training
    for batch_size in (settings.batch_size, settings.vae_batch_size):
        if batch_size % (settings.accumulation * group.size):
            raise UserError(
                f"expected a batch that {group.size} processes x {settings.accumulation} parts divide, "
                f"got {batch_size}; change --nproc_per_node or --accumulation, or start anew with another "
                "--batch-size and --vae-batch-size"
            )


@contextlib.contextmanager
def advising(run: Run) -> Iterator[None]:
    r"""Within this context the error that ends the training says how to go on."""
    try:
        yield
    except (CannotWrite, NotFinite, LostGroup) as error:
        raise UserError(f"{error}; {run.advice()}") from None
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise UserError(f"{LostGroup(error)}; {run.advice()}") from None
    except Stopped as stop:
        raise Stopped(stop.signum, f"{stop}; {run.advice()}") from None


def prepared(
    run: Run, group: Group, precision: str, stage: str, resume, cache: Path, download, given: Pictures | None
) -> Session:
    r"""The data and the model of a run, and its folder, made after every check that may refuse the run."""
    config = run.config
    settings = config.training
    with group.main_process_first():
        if download and settings.data == "drawn":
            raise UserError("expected --data FOLDER to download CelebA into, got none")
        if download:
            download_celeba(settings.data)
        open_table = reopen_data if resume else open_data
        table = open_table(config) if given is None else None
    check_stage(run, stage)
    allow_tf32(group.device)
    # in a new folder a file of a text tower is what a killed command left
    own = run.folder / TEXT_FILE
    text_file = own if resume and own.is_file() else None
    if config.model.few_steps and text_file is None and (Path(settings.init) / TEXT_FILE).is_file():
        text_file = Path(settings.init) / TEXT_FILE  # the teacher's
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # torch's own function seeds GPUs too
        model = TextToImage(config.model, text_weights.tower_from_file(text_file) if text_file else None)
    begun_with = ""
    if settings.init and run.state is None:
        begun_with = begin_from(model, settings.init, stage)
    elif run.state and (begun := run.state.get(BEGUN_UNET)):
        with run.fitting():
            model.unet.load_state_dict(begun)
    elif settings.init and not run.in_second_stage:  # of a version before they were kept
        say(
            "warning: this checkpoint lacks the UNet of --init, which begins untrained; start anew to have it"
        )
    model.unet.set_gradient_checkpointing(settings.gradient_checkpointing)
    with group.main_process_first():
        remove_leftovers(cache)
        pictures = load_pictures(config, table, cache, progress_bar) if given is None else given
        check_pictures(config, pictures)
        if settings.perceptual_weight and stage != "unet" and not run.in_second_stage:
            perceptual.perceptual_loss(group.device)  # downloads, or refuses, while there is no folder yet
    run.check_data(fingerprint(table, pictures, in_memory=given is not None))
    # a text tower is kept in the run, because its file or its host may go
    is_to_keep = text_file != own if text_file else config.model.text_weights != "random"
    run.create(partial(text_weights.save_tower, model.text) if is_to_keep else None)
    if begun_with and run.writes:
        write_atomically(run.folder / INIT_FILE, f"{begun_with}\n".encode())
    for line in size_warning(config):
        say(line)
    together = f", {group.size} processes" if group.size > 1 else ""
    say(f"run {run.folder}, preset {config.preset}, {precision} on {group.device}{together}")
    what = "drawn faces" if table is None and given is None else "pictures"
    say(f"{len(pictures.rows(TRAIN)):,} {what} to train on, {len(pictures.rows(VALID)):,} to validate")
    model.to(group.device)
    files = None if table is None else table.files
    return Session(run, model, pictures, files, cache, precision, group)


def begin_from(model: TextToImage, source: str, stage: str) -> str:
    r"""Give the networks those weights of another run, or of the package, whose shapes fit; print and return which.

    Raises: UserError where none fit, or not those of the VAE although the UNet alone is to be trained.
    """
    folder = SHIPPED if source == "shipped" else Path(source)
    if not (folder / "config.json").is_file():
        raise UserError(f"expected the folder of a run after --init, {folder} has no config.json")
    refused = {}
    files = {"VAE": (model.vae, "vae.safetensors"), "UNet": (model.unet, "ema.safetensors")}
    for name, (network, file) in files.items():
        try:
            load_weights(folder / file, network)
        except UserError as error:
            refused[name] = f"no {name}: {error}"
    taken = [f"the {name} of {folder}" for name in files if name not in refused]
    if not taken or (stage == "unet" and "VAE" in refused):
        raise UserError(f"--init {source} has nothing that fits; {'; '.join(refused.values())}")
    before = {}
    if "UNet" not in refused:
        before = vars(Config.read(folder / "config.json").model)
    differing = [
        name
        for name, value in vars(model.config).items()
        if before and before[name] != value and name not in MOVABLE
    ]
    if model.config.few_steps:
        if refused or differing != ["few_steps"] or before["few_steps"]:
            other = [f"another {name}" for name in differing if name != "few_steps"]
            got = ", ".join([*refused.values(), *other]) or "a run that was distilled itself"
            raise UserError(f"expected a teacher with the settings of this run, got {got}; name another run")
        model.load_vae(folder)  # with its scale
        differing = []
    begun_with = f"begins with {', '.join([*taken, *refused.values()])}"
    say(begun_with)
    if differing:
        say(f"warning: that UNet has learned with another {', '.join(differing)}")
    return begun_with


def check_stage(run: Run, stage: str):
    r"""Refuse a stage that cannot be trained in this run."""
    vae = run.folder / "vae.safetensors"
    is_given = run.config.training.init and run.state is None
    if stage == "unet" and not (vae.is_file() or run.in_second_stage or is_given):
        raise UserError(
            f"expected {vae} for the second stage; train it with --stage vae first, then --resume"
        )
    if stage == "vae" and run.in_second_stage:
        raise UserError(
            f"expected a run whose first stage goes on, in {run.folder} the second has begun; choose a new --out"
        )


def check_pictures(config: Config, pictures: Pictures):
    r"""UserError unless there are pictures of this size to train on and to validate; say which ones were skipped."""
    size = config.model.image_size
    if pictures.pixels.shape[1:] != (size, size, 3):
        raise UserError(f"expected pictures of {size} x {size} x 3, got {pictures.pixels.shape[1:]}")
    check_counts(len(pictures.rows(TRAIN)), len(pictures.rows(VALID)))
    if pictures.bad:
        few = ", ".join(f"{name} ({reason})" for name, reason in pictures.bad[:3])
        say(f"skipped {len(pictures.bad)} unreadable pictures: {few}")
