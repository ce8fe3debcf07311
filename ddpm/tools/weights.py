r"""Weights in safetensors files: written whole, read strictly, by one reader."""

import contextlib
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddpm.tools.errors import UserError
from ddpm.tools.files import check_not_packed, digest_of, write_atomically

Shapes = dict[str, tuple[int, ...]]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
TORCHSCRIPT = (
    "write its tensors to a file once, torch.save(torch.jit.load('FILE', 'cpu').state_dict(), 'clip.pt'), "
    "and pass --text-weights ./clip.pt --text-quick-gelu"
)


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None):
    r"""Write tensors as safetensors, atomically; the digest of tensors and metadata is kept as `sha256` among these."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", **(metadata or {})}
    write_atomically(path, save(tensors, {**metadata, "sha256": digest_of([tensors, metadata])}))


def load_weights(path: Path, module: nn.Module) -> dict[str, str]:
    r"""Read safetensors into `module`, as `read_tensors` does; returns the file's metadata."""
    tensors, metadata = read_tensors(path, shapes_of(module.state_dict()))
    module.load_state_dict(tensors)
    return metadata


def check_shapes(path: Path, module: nn.Module):
    r"""Raise UserError unless the safetensors hold just the names and shapes of `module`, which may be on `meta`."""
    with _reading(path) as file:
        match(path, _shapes_in(file), shapes_of(module.state_dict()))


def read_metadata(path: Path) -> dict[str, str]:
    r"""The metadata of safetensors."""
    with _reading(path) as file:
        return file.metadata() or {}


def read_tensors(
    path: Path, shapes: Shapes, known_as: Callable[[str], str | None] = str, what: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    r"""The tensors named in `shapes`, each of its shape and of floating-point numbers, and the metadata of safetensors.

    Of .safetensors memory is taken last: the header is held against the length of the file when it is opened, and then
    against `shapes`. The checksum is held against the content where there is one; other programs' files have none.
    Any other file is read as what torch.save wrote, from which nothing is executed.

    Args: known_as, what: as for `match`.
    """
    if path.suffix != ".safetensors":
        stored = _read_pickle(path)
        places = match(path, shapes_of(stored), shapes, known_as, what)
        tensors = {name: stored[place] for name, place in places.items()}
        _check_plain(path, tensors)
        return tensors, {}
    with _reading(path) as file:
        places = match(path, _shapes_in(file), shapes, known_as, what)
        tensors = {name: file.get_tensor(place) for name, place in places.items()}
        metadata = file.metadata() or {}
    _check_plain(path, tensors)
    checksum = metadata.pop("sha256", None)
    stored = {places[name]: tensor for name, tensor in tensors.items()}
    if checksum is not None and checksum != digest_of([stored, metadata]):
        raise UserError(f"{path} is damaged: its checksum does not fit; train again or fetch it again")
    return tensors, metadata


def match(
    path: Path, stored: Shapes, wanted: Shapes, known_as: Callable[[str], str | None] = str, what: str = ""
) -> dict[str, str]:
    r"""Wanted name -> stored name; UserError unless just the wanted tensors are stored, in their shapes.

    Args:
        known_as: stored name -> wanted name, or None for a tensor that may be left out.
        what: whose weights are wanted, for the message.
    """
    places, wrong = {}, []
    for place in sorted(stored):
        name = known_as(place)
        if name in places or name is not None and name not in wanted:
            wrong.append(f"{place} is too much")
        elif name is not None:
            places[name] = place
    for name, shape in wanted.items():
        if name not in places:
            wrong.append(f"{name} is missing")
        elif stored[places[name]] != shape:
            wrong.append(f"{name} should have shape {shape}, got {stored[places[name]]}")
    if wrong:
        raise UserError(f"expected the weights of {what or 'this configuration'} in {path}; {wrong[0]}")
    return places


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    r"""Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _shapes_in(file: safe_open) -> Shapes:
    names = file.keys()
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[safe_open]:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"could not read the weights in {path}: {error}; if it is damaged, train again or fetch it again"
        ) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    r"""The dictionary of tensors that torch.save wrote, by torch's reader of plain weights."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        if is_torchscript(path):
            raise ValueError(f"it is a TorchScript archive, as OpenAI publishes CLIP; {TORCHSCRIPT}")
        check_not_packed(path)
        with warnings.catch_warnings():  # torch warns of some files that are refused below
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"could not read the weights in {path}: {reason}; expected a file of tensors (.safetensors, .bin or .pt)"
        ) from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"expected a dictionary of tensors in {path}, got something else")
    return {str(name): tensor for name, tensor in state.items()}


def is_torchscript(path: Path) -> bool:
    r"""Whether torch.jit.save wrote the file: a zip with compiled code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def _check_plain(path: Path, tensors: dict[str, Tensor]):
    r"""UserError for whole numbers, booleans and complex numbers, and for what is sparse, nested or without content."""
    for name, tensor in tensors.items():
        is_whole = tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
        is_counter = tensor.dtype is torch.int64 and not tensor.ndim  # of a BatchNorm's batches
        if not (tensor.dtype in FLOATS or is_counter) or not is_whole:
            got = f"{name} of {tensor.dtype}, {tensor.layout} on {tensor.device}"
            raise UserError(f"expected weights as plain floating-point numbers in {path}, got {got}")
