"""Image data sets of the papers as rows of pixels: digits from scikit-learn, MNIST, Fashion-MNIST and CIFAR-10 from local files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from teleport_fast.experiments.datasets.cifar import read_cifar10
from teleport_fast.experiments.datasets.digits import read_digits
from teleport_fast.experiments.datasets.idx import read_idx_pairs
from teleport_fast.experiments.datasets.images import Images, Split

# Where each set is looked for under the folder given: its own name first, then torchvision's and the archive's.
FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "fashion"),
    "cifar10": ("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
}
READERS: dict[str, Callable[[str, Path], Images]] = {
    "mnist": read_idx_pairs,
    "fashion-mnist": read_idx_pairs,
    "cifar10": read_cifar10,
}
NAMES = ("digits", *FOLDERS)


def load(name: str, data: Path | None = None) -> Images:
    """A data set by name; all but digits are read from `data`/NAME.

    ValueError for an unknown name, a missing folder or file (both named), and files that are not what their names say.
    """
    if name == "digits":
        return read_digits()
    if name not in FOLDERS:
        raise ValueError(f"data set must be one of {', '.join(NAMES)}, got {name!r}; pass one of these names")
    if data is None:
        raise ValueError(f"{name} is read from local files; pass data, a folder with a folder {name} in it")
    folder = _folder(name, data)
    if folder is None:
        raise ValueError(f"no folder of {name} in {data}; make {data / name} and put its files there (looked for {', '.join(FOLDERS[name])})")
    return READERS[name](name, folder)


def found(data: Path) -> list[str]:
    """The data sets that have a folder under `data`; ValueError where there is none."""
    names = [name for name in FOLDERS if _folder(name, data) is not None]
    if not names:
        raise ValueError(f"no data set in {data}; make one of {', '.join(str(data / name) for name in FOLDERS)} and put its files there")
    return names


def _folder(name: str, data: Path) -> Path | None:
    return next((data / folder for folder in FOLDERS[name] if (data / folder).is_dir()), None)


__all__ = ["FOLDERS", "NAMES", "Images", "Split", "found", "load"]
