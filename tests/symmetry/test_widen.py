"""Under WideCasts a model that casts to float32 computes in float64, and the casts are counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from teleport_fast import find_symmetries
from teleport_fast.symmetry.widen import WideCasts


def test_requests_for_float32_give_float64_and_only_narrowings_are_counted() -> None:
    x = torch.full((3,), 1 / 3, dtype=torch.float64)
    with WideCasts() as mode:
        wide = [x.float(), x.to(torch.float32), x.to(dtype=torch.float32), x.softmax(-1, dtype=torch.float32)]
        made = torch.ones(2, dtype=torch.float32)
        ids = torch.arange(3).float()
    assert all(y.dtype == torch.float64 for y in (*wide, made, ids))
    assert torch.equal(wide[0], x)
    assert mode.casts == 4
    assert not torch.equal(x.float().double(), x)


def test_other_types_are_left_alone() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with WideCasts() as mode:
        assert x.half().dtype == torch.float16
        assert x.to(torch.int64).dtype == torch.int64
    assert mode.casts == 0


class Narrow(nn.Module):
    """Two linear layers, the hidden units cast to float32 on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x).float()).to(x.dtype))


def test_a_model_that_casts_is_proven_to_float64_and_says_so() -> None:
    found = find_symmetries(Narrow(), torch.randn(5, 4))
    assert {joint.kind for joint in found} == {"up-down", "neurons"}
    assert all(finding.deviation < 1e-14 for finding in found.findings if finding.status == "found")
    (note,) = [finding for finding in found.findings if finding.status == "noted"]
    assert note.reason == "its forward casts to float32 1 times, proven with these in float64"
