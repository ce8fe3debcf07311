r"""CelebA's download, or where else to get it."""

import shutil
import tempfile
from pathlib import Path

from ddpm.celeba.lists import open_table
from ddpm.celeba.refusals import _short, _wrong

# ----------------------------------------------------------------------------------------------- download


def download_celeba(folder) -> Path:
    r"""Downloads CelebA (1.4 GB) by torchvision, which needs the package gdown, or says where else to get it.

    The host often refuses. Whatever fails, nothing is left behind: the files arrive in a temporary folder
    beside `folder`, which takes its name once complete. What `open_table` opens already is left as it is.

    Args:
        folder: new or empty; afterwards what `open_table` opens.
    Returns:
        The folder.
    Raises:
        DataError: the download failed, or the folder holds something else.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        open_table(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".unfinished", dir=folder.parent))
    except OSError as error:
        raise _wrong(folder, "a place to write to", _short(str(error)), "choose another") from error
    try:
        from torchvision.datasets import CelebA

        CelebA(str(unfinished), split="all", download=True)
        (unfinished / "celeba" / "img_align_celeba.zip").unlink(missing_ok=True)  # unpacked by now
        if folder.exists():
            folder.rmdir()
        unfinished.chmod(0o755)  # mkdtemp's is for the owner alone
        unfinished.rename(folder)
    except Exception as error:  # no gdown, no network, quota, 403, checksum, a full disk: the same advice
        got = f"{type(error).__name__} {_short(str(error))}"
        raise _wrong(folder, "to download CelebA", got, ELSEWHERE) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


ELSEWHERE = (
    "get it from Kaggle (jessicali9530/celeba-dataset), the project page of MMLAB CUHK or a copy on Hugging "
    "Face, and put img_align_celeba/ and list_attr_celeba.txt (or .csv) into this folder"
)
