r"""Weights in safetensors files: written whole, read strictly."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddpm.tools.errors import UserError
from ddpm.tools.files import digest_of, write_atomically


def save_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None):
    r"""Write tensors as safetensors, atomically; the digest of tensors and metadata is kept as `sha256` among these."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    metadata = {"format": "pt", **(metadata or {})}
    write_atomically(path, save(tensors, {**metadata, "sha256": digest_of([tensors, metadata])}))


def load_weights(path: Path, module: nn.Module) -> dict[str, str]:
    r"""Read safetensors into `module`, strictly: every name and shape must fit, and the checksum where there is one.

    Returns: the file's metadata.
    """
    check_shapes(path, module)
    with _reading(path) as file:
        state, metadata = (
            {name: file.get_tensor(name) for name in module.state_dict()},
            file.metadata() or {},
        )
    stored = metadata.pop("sha256", None)  # other programs' files have none
    if stored is not None and stored != digest_of([state, metadata]):
        raise UserError(f"{path} is damaged: its checksum does not fit; train again or fetch it again")
    module.load_state_dict(state)
    return metadata


def check_shapes(path: Path, module: nn.Module):
    r"""Raise UserError unless the safetensors hold just the names and shapes of `module`, which may be on `meta`.

    Reads the header alone, which has been held against the length of the file by then.
    """
    wanted = module.state_dict()
    with _reading(path) as file:
        names = set(file.keys())
        for name in sorted(names ^ set(wanted)):
            raise UserError(
                f"expected the weights of this configuration in {path}; "
                f"{name} is {'too much' if name in names else 'missing'}"
            )
        for name in names:
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(wanted[name].shape):
                raise UserError(
                    f"expected {name} of shape {tuple(wanted[name].shape)} in {path}, got {shape}"
                )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"could not read the weights in {path}: {error}; if it is damaged, train again or fetch it again"
        ) from None
