"""A set of labelled images as rows of bytes, turned into numbers from 0 to 1 only where they are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Pixels (N, n) uint8 and labels (N,) int64; ValueError where they do not fit together."""

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dim() != 2 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(f"labels must hold one class per image, got {tuple(self.labels.shape)} for images {tuple(self.pixels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    """A training and a test split of `classes` classes; pixels run from 0 to `white`; `where` it was read.

    >>> split = Split(torch.tensor([[0, 4], [2, 2]], dtype=torch.uint8), torch.tensor([0, 1]))
    >>> Images("toy", split, split, classes=2, white=4).inputs(split)
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000]])
    """

    name: str
    train: Split
    test: Split
    classes: int = 10
    white: int = 255
    where: str = ""

    def __post_init__(self) -> None:
        for title, split in (("training", self.train), ("test", self.test)):
            if not len(split):
                raise ValueError(f"{self.name} has no {title} images in {self.where}; check its files")
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.classes:
                raise ValueError(f"{self.name}'s {title} labels must lie in 0..{self.classes - 1}, got {low}..{high}; check its files")

    @property
    def width(self) -> int:
        """Pixels of one image."""
        return int(self.train.pixels.shape[1])

    def inputs(self, split: Split, index: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(images, width) of the split's rows `index`, divided by white, as the papers read them."""
        pixels = split.pixels if index is None else split.pixels[index]
        return pixels.to(dtype) / self.white
