r"""Coverage-guided fuzzing of what reads a stranger's file; needs atheris (pip install -e '.[fuzz]').

python tests/fuzz/fuzz_readers.py                      # every target for a part of a minute
python tests/fuzz/fuzz_readers.py csv -runs=100000     # one target; libFuzzer's own flags may follow

The invariant of every target: a reader answers, or raises UserError or BadImage with one printable line; nothing
else, within ten seconds and 2 GB. An input that breaks it is left in the current folder; mend the reader and keep the
input, made small, in corpus/. `tests/test_hostile.py` replays the inputs in corpus/ without atheris.
"""

import atexit
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

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 45  # of the command without arguments, all targets together; with their imports about a minute
LIMITS = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=4096"]

with contextlib.ExitStack() as instrumented:
    if __name__ == "__main__":
        import atheris

        instrumented.enter_context(atheris.instrument_imports(include=["ddpm", "PIL", "csv", "json"]))
    from torch import nn

    from ddpm.celeba.captions import ATTRIBUTES, parse
    from ddpm.celeba.images import BadImage, read_image
    from ddpm.celeba.lists import open_table
    from ddpm.config import Config
    from ddpm.export.diffusers_folder import Settings
    from ddpm.tools.errors import UserError
    from ddpm.tools.weights import load_weights

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
NAMES = [f"00000{i}.jpg" for i in range(1, 5)]  # pictures that the lists may name
ROWS = "".join(f"{name} {' '.join(['-1'] * 40)}\n" for name in NAMES)
GOOD = f"{len(NAMES)}\n{' '.join(ATTRIBUTES)}\n{ROWS}".encode()
CHUNKS = b"IHDR IDAT IEND tEXt zTXt iTXt PLTE tRNS eXIf iCCP gAMA acTL fcTL fdAT pHYs sRGB".split()
HEADER = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)


def reads_list(data: bytes, name: str = "list_attr_celeba.txt", attributes: bytes = b""):
    r"""The list `name`, in a folder of its own with pictures, and perhaps beside a good list of attributes."""
    folder = FOLDER / name
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for picture in NAMES:
        (folder / "images" / picture).touch()
    if attributes:
        (folder / "list_attr_celeba.txt").write_bytes(attributes)
    (folder / name).write_bytes(data)
    open_table(folder)


def reads_picture(data: bytes):
    path = FOLDER / "picture"
    path.write_bytes(data)
    read_image(path, 8)


def reads_config(data: bytes):
    r"""config.json of a run, and of a diffusers folder."""
    path = FOLDER / "config.json"
    path.write_bytes(data)
    refused_or(lambda: Config.read(path))
    Settings(path).widths("block_out_channels")


def reads_weights(data: bytes):
    r"""*.safetensors of a run: `data` is the header, a few bytes of tensors follow."""
    path = FOLDER / "vae.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(24))
    load_weights(path, nn.Linear(2, 2))


TARGETS: dict[str, Callable[[bytes], object]] = {
    "list": reads_list,
    "partition": lambda data: reads_list(data, "list_eval_partition.txt", GOOD),
    "csv": lambda data: reads_list(data, "captions.csv"),
    "jsonl": lambda data: reads_list(data, "metadata.jsonl"),
    "picture": reads_picture,
    "png": lambda data: reads_picture(png(data)),
    "config": reads_config,
    "weights": reads_weights,
    "prompt": lambda data: parse(data.decode("utf-8", "surrogateescape")),
}


def png(data: bytes) -> bytes:
    r"""A PNG of 8 x 8 between whose header and end stand chunks spelled as (kind, length, content).

    Their checksums are right, so that the fuzzer reaches what is inside them.
    """
    chunks = [(b"IHDR", HEADER)]
    while len(data) >= 2:
        kind = CHUNKS[data[0] % len(CHUNKS)]
        content = data[2 : 2 + data[1]]
        data = data[2 + data[1] :]
        if kind in (b"zTXt", b"iCCP"):  # keyword, method 0, and what follows deflated
            keyword, _, text = content.partition(b"\0")
            content = keyword + b"\0\0" + zlib.compress(text * (1 + len(data)))
        chunks.append((kind, content))
    chunks += [(b"IDAT", zlib.compress(bytes(8 * 25))), (b"IEND", b"")]
    framed = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def refused_or(action: Callable[[], object]):
    r"""Call `action`; a refusal must be one printable line, and any other exception goes on."""
    try:
        action()
    except (UserError, BadImage) as refusal:
        message = str(refusal)
        if not message.isprintable() or len(message) > 3000:
            raise AssertionError(f"not one printable line: {message!r}") from refusal


def check(target: str, data: bytes):
    r"""Hold the invariant of `target` for one input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, on damaged pictures
        refused_or(lambda: TARGETS[target](data))


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
    flags = sys.argv[2:] or [f"-max_total_time={SECONDS // len(TARGETS)}"]
    for target in sys.argv[1:2] or list(TARGETS):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as home:
            command = [sys.executable, __file__, "--here", target, *flags]
            done = subprocess.run(
                command, env=os.environ | {"TMPDIR": home}, stderr=subprocess.PIPE, text=True
            )
        summary = next((line for line in done.stderr.splitlines() if line.startswith("Done")), "")
        print(target, summary, flush=True)
        if done.returncode:
            print(done.stderr[-5000:])
            sys.exit(1)


if __name__ == "__main__":
    main()
