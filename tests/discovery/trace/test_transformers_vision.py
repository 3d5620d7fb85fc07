"""The convolutional nets of `transformers`, built from configs: the same joints under other names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from teleport_fast import Symmetries

transformers = pytest.importorskip("transformers")

Check = Callable[..., Symmetries]


def rows(found: Symmetries) -> Counter[str]:
    return Counter(f"{joint.kind} {joint.group}" for joint in found if not joint.kind.startswith("residual"))


def pixels(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_resnet(kind: str, found_exactly: Check) -> None:
    config = transformers.ResNetConfig(
        embedding_size=5, hidden_sizes=[8, 12], depths=[1, 2], layer_type=kind, num_labels=3, downsample_in_first_stage=False
    )
    model = transformers.ResNetForImageClassification(config)
    found = found_exactly(model, pixels(32))
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert sum(joint.kind == "batchnorm-scale" for joint in found) == convolutions
    table = rows(found)
    if kind == "basic":
        assert table["channels permutation(5)"] == table["norm-readers positive diagonal(5)"] == 1
        assert table["channels permutation(8)"] == table["norm-readers positive diagonal(8)"] == 2
        assert table["channels permutation(12)"] == table["norm-readers positive diagonal(12)"] == 3
    else:
        assert {row for row in table if "channels" in row} == {f"channels permutation({n})" for n in (5, 2, 8, 3, 12)}


def test_convnext(found_exactly: Check) -> None:
    config = transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[4, 6], depths=[1, 1], patch_size=2, num_labels=3, layer_scale_init_value=0.3
    )
    found = found_exactly(transformers.ConvNextForImageClassification(config), pixels(16))
    table = rows(found)
    for width in (4, 6):
        assert table[f"layer-scale diagonal({width})"] == 1
        assert table[f"neurons permutation({4 * width})"] == 1
    assert table["norm-readers diagonal(4)"] == 2
    assert table["norm-readers diagonal(6)"] == 2
    assert sum("permutation(4)" in str(joint.group) for joint in found) == 1
    assert sum("permutation(6)" in str(joint.group) for joint in found) == 1
