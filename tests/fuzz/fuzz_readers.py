r"""Coverage-guided fuzzing of what reads a stranger's file; needs atheris (pip install -e '.[fuzz]').

python tests/fuzz/fuzz_readers.py                      # every target for a share of a minute
python tests/fuzz/fuzz_readers.py csv -runs=100000     # one target; libFuzzer's own flags may follow

The invariant of every target: a reader answers, or raises UserError or BadImage with one printable line; nothing
else, within ten seconds and 2 GB. An input that breaks it is left in the current folder; mend the reader and keep the
input, made small, in corpus/. `tests/test_hostile.py` replays the inputs in corpus/ without atheris.
"""

import atexit
import binascii
import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
SECONDS = 45  # of the command without arguments, all targets together; with their imports about a minute
LIMITS = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=4096"]

with contextlib.ExitStack() as instrumented:
    if __name__ == "__main__":
        import atheris

        instrumented.enter_context(atheris.instrument_imports(include=["ddpm", "PIL", "csv", "json"]))
    from ddpm.celeba.captions import parse
    from ddpm.celeba.images import BadImage, read_image
    from ddpm.celeba.lists import open_table
    from ddpm.config import Config
    from ddpm.export.diffusers_folder import Settings
    from ddpm.tools.errors import UserError
    from ddpm.tools.weights import load_weights

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
NAMES = [f"00000{i}.jpg" for i in range(1, 5)]  # pictures that the lists may name


def fuzz_list(data: bytes):
    r"""list_attr_celeba.txt"""
    _opened("list", {"list_attr_celeba.txt": data})


def fuzz_partition(data: bytes):
    r"""list_eval_partition.txt beside a good list of attributes"""
    from ddpm.celeba.captions import ATTRIBUTES

    rows = "".join(f"{name} {' '.join(['-1'] * 40)}\n" for name in NAMES)
    good = f"{len(NAMES)}\n{' '.join(ATTRIBUTES)}\n{rows}"
    _opened("partition", {"list_attr_celeba.txt": good.encode(), "list_eval_partition.txt": data})


def fuzz_csv(data: bytes):
    r"""captions.csv: captions or attributes, perhaps a split"""
    _opened("csv", {"captions.csv": data})


def fuzz_jsonl(data: bytes):
    r"""metadata.jsonl"""
    _opened("jsonl", {"metadata.jsonl": data})


def fuzz_picture(data: bytes):
    r"""any picture"""
    path = FOLDER / "picture"
    path.write_bytes(data)
    read_image(path, 8)


def fuzz_png(data: bytes):
    r"""a PNG with the chunks that `data` spells, checksums right: text chunks are reached, not only their CRC"""
    fuzz_picture(png(data))


def fuzz_config(data: bytes):
    r"""config.json of a run, and of a diffusers folder"""
    path = FOLDER / "config.json"
    path.write_bytes(data)
    _refused_or(lambda: Config.read(path))
    Settings(path).widths("block_out_channels")


def fuzz_weights(data: bytes):
    r"""*.safetensors of a run: `data` is the header, a few bytes of tensors follow"""
    import torch

    path = FOLDER / "vae.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(24))
    load_weights(path, torch.nn.Linear(2, 2))


def fuzz_prompt(data: bytes):
    r"""a sentence, to `captions.parse`"""
    parse(data.decode("utf-8", "surrogateescape"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    name.removeprefix("fuzz_"): function
    for name, function in list(globals().items())
    if name.startswith("fuzz_")
}


def _opened(name: str, files: dict[str, bytes]):
    folder = FOLDER / name
    if not folder.is_dir():
        (folder / "images").mkdir(parents=True)
        for picture in NAMES:
            (folder / "images" / picture).touch()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    open_table(folder)


KINDS = (
    b"IHDR",
    b"IDAT",
    b"IEND",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"PLTE",
    b"tRNS",
    b"eXIf",
    b"iCCP",
    b"gAMA",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"pHYs",
    b"sRGB",
)
HEADER = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)


def png(data: bytes) -> bytes:
    r"""A PNG of 8 x 8 between whose header and end stand chunks spelled as (kind, length, content)."""
    chunks, rest = [(b"IHDR", HEADER)], data
    while len(rest) >= 2:
        kind, length = KINDS[rest[0] % len(KINDS)], rest[1]
        content, rest = rest[2 : 2 + length], rest[2 + length :]
        if kind in (b"zTXt", b"iCCP"):  # keyword, method 0, and what follows deflated
            keyword, _, text = content.partition(b"\0")
            content = keyword + b"\0\0" + zlib.compress(text * (1 + len(rest)))
        chunks.append((kind, content))
    chunks += [(b"IDAT", zlib.compress(bytes(8 * 25))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", binascii.crc32(kind + c))
        for kind, c in chunks
    )


def _refused_or(action: Callable[[], object]):
    r"""Call `action`; a refusal must be one printable line, and any other exception goes on."""
    try:
        action()
    except (UserError, BadImage) as refusal:
        told = str(refusal)
        if not told.isprintable() or len(told) > 3000:
            raise AssertionError(f"not one printable line: {told!r}") from refusal


def check(target: str, data: bytes):
    r"""Hold the invariant of `target` for one input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, on damaged pictures
        _refused_or(lambda: TARGETS[target](data))


def fuzz(target: str, flags: list[str]):
    r"""Fuzz in this process, which libFuzzer ends without a word to Python."""
    seeds = FOLDER / "seeds"  # what is found is written here, not into the repository
    shutil.copytree(CORPUS / target, seeds)
    artifacts = f"-artifact_prefix={os.getcwd()}/{target}-"
    atheris.Setup([sys.argv[0], *LIMITS, artifacts, *flags, str(seeds)], lambda data: check(target, data))
    atheris.Fuzz()


def main():
    if sys.argv[1:2] == ["--here"]:
        return fuzz(sys.argv[2], sys.argv[3:])
    chosen, flags = (
        sys.argv[1:2] or list(TARGETS),
        sys.argv[2:] or [f"-max_total_time={SECONDS // len(TARGETS)}"],
    )
    for target in chosen:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
            command = [sys.executable, __file__, "--here", target, *flags]
            done = subprocess.run(
                command, env=os.environ | {"TMPDIR": home}, stderr=subprocess.PIPE, text=True
            )
        print(
            target,
            next((line for line in done.stderr.splitlines() if line.startswith("Done")), ""),
            flush=True,
        )
        if done.returncode:
            print(done.stderr[-5000:])
            sys.exit(1)


if __name__ == "__main__":
    main()
