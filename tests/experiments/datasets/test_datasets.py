"""Data sets are read from files in their standard formats; what is missing or damaged is named with its folder."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teleport_fast.experiments.datasets import cifar, found, idx, load
from teleport_fast.experiments.datasets.images import Images, Split


def idx_bytes(values: Tensor) -> bytes:
    return bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()


def write_idx(folder: Path, zipped: bool = False) -> dict[str, Tensor]:
    folder.mkdir(parents=True)
    written = {}
    for (images, labels), count in zip(idx.FILES.values(), (7, 3), strict=True):
        written[images] = torch.randint(0, 256, (count, 4, 5), dtype=torch.uint8)
        written[labels] = torch.randint(0, 10, (count,), dtype=torch.uint8)
    for file, values in written.items():
        content = idx_bytes(values)
        (folder / (f"{file}.gz" if zipped else file)).write_bytes(gzip.compress(content) if zipped else content)
    return written


def write_cifar(folder: Path) -> dict[str, Tensor]:
    folder.mkdir(parents=True)
    written = {}
    for file in cifar.TRAIN + cifar.TEST:
        written[file] = torch.randint(0, 256, (2, cifar.RECORD), dtype=torch.uint8)
        written[file][:, 0] %= 10
        (folder / file).write_bytes(written[file].numpy().tobytes())
    return written


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "mnist"), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")])
def test_idx_files_are_read_as_they_were_written(name: str, folder: str, zipped: bool, tmp_path: Path) -> None:
    written = write_idx(tmp_path / folder, zipped)
    images = load(name, tmp_path)
    for split, (pixels, labels) in zip((images.train, images.test), idx.FILES.values(), strict=True):
        assert torch.equal(split.pixels, written[pixels].flatten(1))
        assert torch.equal(split.labels, written[labels].long())
    assert (images.width, found(tmp_path)) == (20, [name])


def test_cifar_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = write_cifar(tmp_path / "cifar-10-batches-bin")
    images = load("cifar10", tmp_path)
    assert torch.equal(images.train.pixels, torch.cat([written[file][:, 1:] for file in cifar.TRAIN]))
    assert torch.equal(images.train.labels, torch.cat([written[file][:, 0] for file in cifar.TRAIN]).long())
    assert torch.equal(images.test.pixels, written[cifar.TEST[0]][:, 1:])


def test_pickles_are_named_and_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "run",))

    for index in range(1, 6):
        (folder / f"data_batch_{index}").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"data_batch_1\.bin, .* a pickle, which can run any code .*cifar-10-binary\.tar\.gz"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "run").exists()


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no data set in {tmp_path}; make one of {tmp_path}/mnist"):
        found(tmp_path)
    with pytest.raises(ValueError, match=f"no folder of cifar10 in {tmp_path}; make {tmp_path}/cifar10"):
        load("cifar10", tmp_path)
    with pytest.raises(ValueError, match="mnist is read from local files; pass data"):
        load("mnist")
    with pytest.raises(ValueError, match=r"data set must be one of digits, mnist, .*, got 'imagenet'"):
        load("imagenet", tmp_path)
    write_idx(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=rf"mnist needs t10k-labels-idx1-ubyte \(or each with .gz\) in {tmp_path}/mnist"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "must hold 140 bytes of 7 x 4 x 5, got 139; fetch it again"),
        (lambda content: b"\x80\x04" + content, "must be an IDX file of 3 dimensions of bytes, but begins with '80 04 00 00'"),
        (lambda content: b"", "must be an IDX file of 3 dimensions"),
        (lambda content: idx_bytes(torch.zeros(6, 4, 5, dtype=torch.uint8)), "holds 6 images and .* 7 labels"),
    ],
)
def test_damaged_idx_files_are_refused(damage: object, message: str, tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path)


def test_other_damage_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", zipped=True)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read: .*; fetch it again"):
        load("mnist", tmp_path)
    write_cifar(tmp_path / "cifar10")
    path = tmp_path / "cifar10" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch\.bin must hold records of 3073 bytes, got 6145"):
        load("cifar10", tmp_path)
    path.write_bytes(b"\x0a" + bytes(cifar.RECORD - 1))
    with pytest.raises(ValueError, match=r"cifar10's test labels must lie in 0\.\.9, got 10\.\.10"):
        load("cifar10", tmp_path)


def test_inputs_run_from_0_to_1() -> None:
    train = Split(torch.tensor([[0, 255], [51, 102], [7, 9]], dtype=torch.uint8), torch.arange(3))
    images = Images("toy", train, train)
    assert torch.allclose(images.inputs(train)[:2], torch.tensor([[0.0, 1.0], [0.2, 0.4]]))
    index = torch.tensor([2, 1, 2])
    assert torch.equal(images.inputs(train, index, torch.float64), images.inputs(train, dtype=torch.float64)[index])
    with pytest.raises(ValueError, match="labels must hold one class per image"):
        Split(train.pixels, train.labels[:-1])


def test_digits_are_dealt_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="digits come with scikit-learn: pip install scikit-learn")
    images = load("digits")
    assert (len(images.train), len(images.test), images.width, int(images.train.pixels.max())) == (1400, 397, 64, 16)
    torch.manual_seed(5)
    assert torch.equal(load("digits").train.pixels, images.train.pixels)
    rows = {bytes(row.tolist()) for row in images.train.pixels}
    assert not any(bytes(row.tolist()) in rows for row in images.test.pixels[:20])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'teleport-fast\[papers\]'"):
        load("digits")
