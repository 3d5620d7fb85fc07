"""One operator between two layers: what the record makes of it, beside what the probe says to a scale and an order.

`holds` is the truth, by the probe: which moves of the six units alone keep the outputs. `found` is what is understood; a
parameter in between may move along, so that more is found than holds without it, and a rule may know less than is true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries
from teleport_fast.symmetry.diagonal_groups import Permutation, PositiveDiagonal
from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.verify import Prover
from teleport_fast.symmetry.view import View

Own = Mapping[str, Tensor]
Between = Callable[[Tensor, Own], Tensor]


class Odd(nn.Module):
    """Six units that alpha writes and omega reads, and between them any function, with parameters of its own."""

    def __init__(self, between: Between, own: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.alpha, self.omega, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between
        self.own = nn.ParameterDict({name: nn.Parameter(0.5 + torch.rand(shape)) for name, shape in own.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.omega(self.between(self.alpha(x), self.own))


def alone(model: nn.Module, x: Tensor) -> set[str]:
    """Of a positive scale and an order of alpha's and omega's units, with nothing else, those that keep the outputs."""
    plus, minus = (View("alpha.weight", 0, 1, 6), View("alpha.bias", 0, 1, 6)), (View("omega.weight", 1, 1, 6),)
    prover = Prover(model, x)
    moves = {"scale": PositiveDiagonal(6), "order": Permutation(6)}
    joints = {name: Joint(name, "up-down", group, 1, 6, plus, minus) for name, group in moves.items()}
    return {name for name, joint in joints.items() if prover.prove(joint, 1e-10).ok}


def read(found: Symmetries) -> dict[str, Joint]:
    """The joints that move alpha's units: a dense one is a scale and an order."""
    named = {"diagonal": ["scale"], "permutation": ["order"], "dense": ["scale", "order"]}
    ours = [joint for joint in found if "alpha.weight" in joint.parameters() and joint.width * joint.heads == 6]
    return {name: joint for joint in ours for name in named[joint.group.form]}


def each(y: Tensor) -> Tensor:
    """A constant that differs from unit to unit."""
    return torch.linspace(-0.5, 0.5, 6, dtype=y.dtype, device=y.device)


def some(y: Tensor) -> Tensor:
    """A mask of every other row."""
    return (torch.arange(len(y), device=y.device) % 2 == 0)[:, None]


def rectified_in_part(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, :3].relu_()
    return z


def written_over(y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.mul(each(y).expand_as(y), 2, out=y.detach())


def in_inference(between: Callable[[Tensor], Tensor]) -> Between:
    def inside(y: Tensor, _: Own) -> Tensor:
        with torch.inference_mode():
            return between(y)

    return inside


BOTH, SCALE, ORDER, NONE = {"scale", "order"}, {"scale"}, {"order"}, set[str]()
PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], set[str], set[str]]] = {  # between, found, holds
    "clamped on both sides": (lambda y: y.clamp(-0.3, 0.3), ORDER, ORDER),
    "an upper bound for each unit": (lambda y: y.clamp(max=each(y)), NONE, NONE),
    "a lower bound for each unit": (lambda y: y.clamp(min=each(y)), NONE, NONE),
    "summed up over the units": (lambda y: y.cumsum(-1), NONE, NONE),
    "summed up over the rows": (lambda y: y.cumsum(0), ORDER, BOTH),
    "rounded to whole numbers": (lambda y: (4 * y).to(torch.int64).to(y.dtype), ORDER, ORDER),
    "an inverse power": (lambda y: y**-1, NONE, ORDER),
    "as an exponent": (lambda y: 2**y, NONE, ORDER),
    "a power given as a tensor": (lambda y: y.abs() ** torch.full_like(y, 2), NONE, ORDER),
    "divided by a bent copy": (lambda y: y / (2 * y).exp(), ORDER, ORDER),
    "one by it": (lambda y: 1 / y, ORDER, ORDER),
    "times the largest of all": (lambda y: y * y.max(), ORDER, ORDER),
    "the largest of each unit": (lambda y: y.max(0, keepdim=True).values, BOTH, BOTH),
    "the variance of each unit": (lambda y: y.var(0, keepdim=True), ORDER, ORDER),
    "the norm of each unit": (lambda y: torch.linalg.vector_norm(y, 3, 0, True), BOTH, BOTH),
    "the larger of two": (lambda y: torch.maximum(y, 2 * y), NONE, BOTH),
    "where the largest stands": (lambda y: y * each(y)[y.argmax(0)], NONE, BOTH),
    "pooled over neighbouring units": (lambda y: F.max_pool1d(y[:, None], 3, 1, 1)[:, 0], NONE, NONE),
    "pooled over the rows": (lambda y: F.max_pool1d(y.T[None], 3)[0].T, BOTH, BOTH),
    "padded with ones": (lambda y: F.pad(y[..., None], (1, 1), value=1.0).sum(-1), NONE, ORDER),
    "padded with rows of zeros": (lambda y: F.pad(y, (0, 0, 1, 1)), BOTH, BOTH),
    "padded in place of units": (lambda y: F.pad(y[:, 1:5], (1, 1)), NONE, SCALE),
    "rows masked": (lambda y: y.masked_fill(some(y), 0), BOTH, BOTH),
    "units masked": (lambda y: y.masked_fill(torch.arange(6, device=y.device) % 2 == 0, 0), SCALE, SCALE),
    "rows filled with one": (lambda y: y.masked_fill(some(y), 1), ORDER, ORDER),
    "zero for some rows": (lambda y: torch.where(some(y), y, 0.0), BOTH, BOTH),
    "a constant of each unit for some rows": (lambda y: torch.where(some(y), y, each(y)), NONE, NONE),
    "for some rows a constant": (lambda y: torch.where(some(y), each(y), y), NONE, NONE),
    "one of two": (lambda y: torch.where(some(y), y, 2 * y), NONE, BOTH),
    "a part rectified in place": (rectified_in_part, NONE, SCALE),
    "by a number that Python reads": (lambda y: y * float(y.abs().max()), ORDER, ORDER),
    "by a unit that Python reads": (lambda y: y * float(y[0, 0]), NONE, NONE),
    "through a constant matrix": (lambda y: y @ torch.outer(each(y), each(y)).add(1), NONE, NONE),
    "behind plain data, cut off again": (lambda y: torch.cat([each(y).expand_as(y), y], -1)[:, 6:], BOTH, BOTH),
    "written over": (written_over, NONE, NONE),
    "a norm whose gain is a constant": (lambda y: F.layer_norm(y, (6,), each(y)), NONE, NONE),
}  # fmt: skip
LEARNED: dict[str, tuple[Between, dict[str, tuple[int, ...]], set[str], set[str]]] = {  # between, own, found, holds
    "a gain stored as 1 + w": (lambda y, own: y * (1 + own["w"]), {"w": (6,)}, BOTH, SCALE),
    "a gain stored as w and three halves": (lambda y, own: y * torch.add(own["w"], 0.5, alpha=3), {"w": (6,)}, BOTH, SCALE),
    "a gain stored as 1 - w": (lambda y, own: y * (1 - own["w"]), {"w": (6,)}, SCALE, SCALE),
    "a gain bent first": (lambda y, own: y * own["w"].relu(), {"w": (6,)}, SCALE, SCALE),
    "a gain and a constant of each unit": (lambda y, own: y * (own["w"] + each(y)), {"w": (6,)}, SCALE, SCALE),
    "a gain times a constant of each unit": (lambda y, own: y * (own["w"] * each(y)), {"w": (6,)}, SCALE, SCALE),
    "beside itself with a gain": (lambda y, own: y + y * own["w"], {"w": (6,)}, BOTH, SCALE),
    "the sum of two gains": (lambda y, own: y * (own["a"] + own["b"]), {"a": (6,), "b": (6,)}, BOTH, SCALE),
    "the product of two gains": (lambda y, own: y * (own["a"] * own["b"]), {"a": (6,), "b": (6,)}, BOTH, SCALE),
    "divided by a parameter": (lambda y, own: y / own["w"], {"w": (6,)}, NONE, SCALE),
    "by the sum of a gain": (lambda y, own: y * own["w"].sum(), {"w": (6,)}, BOTH, BOTH),
    "a learned size": (lambda y, own: y * own["size"], {"size": ()}, BOTH, BOTH),
    "a learned size, repeated": (lambda y, own: y * own["size"].repeat(6), {"size": ()}, BOTH, BOTH),
    "a learned size of a constant": (lambda y, own: y * (own["size"] * each(y)), {"size": ()}, SCALE, SCALE),
    "a learned shift of all": (lambda y, own: y + own["shift"], {"shift": ()}, NONE, ORDER),
    "a grid of gains": (lambda y, own: (y.view(-1, 2, 3) * own["w"]).flatten(1), {"w": (2, 3)}, NONE, SCALE),
    "a grid of shifts": (lambda y, own: (y.view(-1, 2, 3) + own["w"]).flatten(1), {"w": (2, 3)}, NONE, NONE),
    "a slope bent first": (lambda y, own: F.prelu(y, own["slope"].abs()), {"slope": (1,)}, NONE, BOTH),
    "a norm whose gain is bent": (lambda y, own: F.layer_norm(y, (6,), own["w"].exp()), {"w": (6,)}, NONE, NONE),
}
CASES: dict[str, tuple[Between, dict[str, tuple[int, ...]], set[str], set[str]]] = {
    **{name: (lambda y, _, f=f: f(y), {}, found, holds) for name, (f, found, holds) in PLAIN.items()},
    **LEARNED,
    "relu in inference mode": (in_inference(F.relu), {}, BOTH, BOTH),
    "the larger of two in inference mode": (in_inference(lambda y: torch.max(y, 2 * y)), {}, NONE, BOTH),
}


@pytest.mark.parametrize(("between", "own", "found", "holds"), CASES.values(), ids=CASES.keys())
def test_an_operator_between_two_layers(
    between: Between, own: dict[str, tuple[int, ...]], found: set[str], holds: set[str]
) -> None:
    model, x = Odd(between, own).double(), torch.randn(5, 4, dtype=torch.float64)
    assert alone(model, x) == holds
    joints = read(find_symmetries(model, x))
    assert set(joints) == found
    assert all(any(name.startswith("own.") for name in joints[move].parameters()) for move in found - holds)
    trusted = find_symmetries(model, x, verify=False)  # the record alone claims nothing that the probe refutes
    assert set(read(trusted)) <= found
    assert trusted.verify(model, x).max_deviation <= 1e-10
