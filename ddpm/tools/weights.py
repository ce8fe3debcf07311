r"""Weights in safetensors files: written whole, read strictly, by one reader."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddpm.tools.errors import UserError
from ddpm.tools.files import digest_of, write_atomically

Shapes = dict[str, tuple[int, ...]]


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None):
    r"""Write tensors as safetensors, atomically; the digest of tensors and metadata is kept as `sha256` among these."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", **(metadata or {})}
    write_atomically(path, save(tensors, {**metadata, "sha256": digest_of([tensors, metadata])}))


def load_weights(path: Path, module: nn.Module) -> dict[str, str]:
    r"""Read safetensors into `module`, as `read_tensors` does; returns the file's metadata."""
    tensors, metadata = read_tensors(path, shapes_of(module.state_dict()))
    check_kinds(path, tensors, module)
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
    r"""The tensors named in `shapes`, each of its shape, and the metadata of safetensors.

    Memory is taken last: the header is held against the length of the file when it is opened, and then against
    `shapes`. The checksum is held against the content where there is one; other programs' files have none.

    Args: known_as, what: as for `match`.
    """
    with _reading(path) as file:
        places = match(path, _shapes_in(file), shapes, known_as, what)
        tensors = {name: file.get_tensor(place) for name, place in places.items()}
        metadata = file.metadata() or {}
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


def check_kinds(path: Path, tensors: dict[str, Tensor], module: nn.Module):
    r"""UserError where integers, booleans or complex numbers are stored for weights of `module`."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensors[name].is_floating_point():
            expected = f"expected weights of floating-point numbers in {path}"
            raise UserError(f"{expected}, got {name} of {tensors[name].dtype}")


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    r"""Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _shapes_in(file: safe_open) -> Shapes:
    names = file.keys()
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"could not read the weights in {path}: {error}; if it is damaged, train again or fetch it again"
        ) from None
