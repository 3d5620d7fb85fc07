"""scikit-learn's 1,797 handwritten digits of 8 by 8 pixels, which come with the package."""

from __future__ import annotations

import torch

from teleport_fast.experiments.datasets.images import Images, Split

TRAIN = 1400


def read_digits() -> Images:
    """1,400 training and 397 test images, dealt by one fixed permutation; ModuleNotFoundError with the remedy without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        remedy = "pip install 'teleport-fast[papers]' (or: pip install scikit-learn)"
        raise ModuleNotFoundError(f"digits come with scikit-learn; {remedy}", name="sklearn") from error
    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    pixels, labels = torch.from_numpy(data).to(torch.uint8)[order], torch.from_numpy(target).long()[order]
    train, test = Split(pixels[:TRAIN], labels[:TRAIN]), Split(pixels[TRAIN:], labels[TRAIN:])
    return Images("digits", train, test, white=16, where="scikit-learn")
