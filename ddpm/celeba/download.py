r"""CelebA's download, or where else to get it."""

from pathlib import Path

from torchvision import datasets

from ddpm.celeba.lists import open_table
from ddpm.celeba.refusals import DataError, quoted
from ddpm.tools.errors import UserError
from ddpm.tools.files import check_new_folder, new_folder

ELSEWHERE = (
    "get it from Kaggle (jessicali9530/celeba-dataset), the project page of MMLAB CUHK or a copy on Hugging "
    "Face, and put img_align_celeba/ and list_attr_celeba.txt (or .csv), or its parquet files, into this folder"
)


def download_celeba(folder) -> Path:
    r"""Download CelebA (1.4 GB) by torchvision, which needs the package gdown, or say where else to get it.

    The host often refuses. Whatever fails, nothing is left behind, because the files arrive in a temporary folder that
    takes the name of `folder` once it is complete. A folder that `open_table` can open is left as it is.

    Args:
        folder: new or empty, or one that `open_table` opens.
    Returns:
        The folder, which `open_table` opens.
    Raises:
        DataError: the download failed, or the folder holds something else.
        OSError: there is no place to write to.
    """
    folder = Path(folder).expanduser()
    try:
        check_new_folder(folder)
    except UserError:
        open_table(folder)
        return folder
    with new_folder(folder) as unfinished:
        try:
            datasets.CelebA(str(unfinished), split="all", download=True)
        except Exception as error:  # no gdown, no network, quota, 403, checksum, a full disk: the same advice
            got = f"{type(error).__name__} {quoted(error)}"
            raise DataError(folder, "to download CelebA", got, ELSEWHERE) from error
        (unfinished / "celeba" / "img_align_celeba.zip").unlink(missing_ok=True)  # unpacked by now
    return folder
