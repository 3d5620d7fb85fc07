"""How weights meet values: joined, cut, grouped, shared, computed; what is read of it, and why the rest stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries

Table = Callable[[Symmetries], dict[str, str]]


class Wired(nn.Module):
    """Any forward over layers and parameters of these shapes; loose, so that no two entries are alike."""

    def __init__(self, forward: Callable[..., Any], **own: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.wires = forward
        for name, part in own.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(0.5 + torch.rand(part)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wires(self, *args, **kwargs)


def rows() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def lines() -> Tensor:
    return torch.randn(2, 4, 7, dtype=torch.float64)


def found_and_trusted(model: nn.Module, inputs: Any) -> Symmetries:
    """What is found by proof; every joint is refuted by a wrong move, and the record alone claims nothing that fails."""
    model = model.double()
    found = find_symmetries(model, inputs)
    assert all(proof.control > 1e-3 for proof in found.verify(model, inputs))
    trusted = find_symmetries(model, inputs, verify=False)
    assert trusted.verify(model, inputs).ok, trusted.explain()
    return found


def up_down(n: int, group: str = "positive diagonal") -> str:
    return f"up-down, {group}({n}), 1"


def neurons(n: int, kind: str = "neurons") -> str:
    return f"{kind}, permutation({n}), 1"


L, C = nn.Linear, nn.Conv1d
READ: dict[str, tuple[nn.Module, Callable[[], Tensor], dict[str, str]]] = {
    "units behind plain data": (
        Wired(lambda m, x: m.c(torch.cat([x, m.a(x).relu()], -1)), a=L(4, 6), c=L(10, 3)), rows,
        {"c.up-down": up_down(6), "c.neurons": neurons(6)},
    ),
    "units on both sides of plain data": (
        Wired(lambda m, x: m.c(torch.cat([m.a(x).relu(), x, m.b(x).relu()], -1)), a=L(4, 6), b=L(4, 5), c=L(15, 3)), rows,
        {"c.up-down": up_down(6), "c.up-down-2": up_down(5), "c.neurons": neurons(6), "c.neurons-2": neurons(5)},
    ),
    "the plain part of a join": (
        Wired(lambda m, x: m.c(torch.cat([x, m.a(x)], -1)[:, :4]) + m.d(m.a(x).relu()), a=L(4, 6), c=L(4, 3), d=L(6, 3)), rows,
        {"d.up-down": up_down(6), "d.neurons": neurons(6)},
    ),
    "a weight on the left": (
        Wired(lambda m, x: m.w @ m.a(x).relu().T, a=L(4, 6), w=(3, 6)), rows,
        {"a.up-down": up_down(6), "w.neurons": neurons(6)},
    ),
    "one divides another": (
        Wired(lambda m, x: m.c(m.a(x) / m.b(x)), a=L(4, 6), b=L(4, 6), c=L(6, 3)), rows,
        {"c.up-down": up_down(6, "diagonal"), "c.neurons": neurons(6)},
    ),
    "a scaled embedding": (
        Wired(lambda m, x: m.c(F.embedding(x, 2 * m.table)), table=(9, 6), c=L(6, 3)), lambda: torch.arange(10).reshape(2, 5) % 9,
        {"c.up-down": up_down(6, "GL")},
    ),
    "one weight, cut by its rows": (
        Wired(lambda m, x: m.c(F.linear(x, m.w[:6]).relu()) + m.d(F.linear(x, m.w[6:]).relu()), w=(11, 4), c=L(6, 3), d=L(5, 3)), rows,
        {"c.up-down": up_down(6), "d.up-down": up_down(5), "c.neurons": neurons(6), "d.neurons": neurons(5)},
    ),
    "one weight, cut by its columns": (
        Wired(lambda m, x: F.linear(m.a(x).relu(), m.w[:, :6]) + F.linear(m.b(x).relu(), m.w[:, 6:]), w=(3, 11), a=L(4, 6), b=L(4, 5)),
        rows,
        {"w.up-down": up_down(6), "w.up-down-2": up_down(5), "w.neurons": neurons(6), "w.neurons-2": neurons(5)},
    ),
    "one weight, of which two spaces read the second half": (
        Wired(
            lambda m, x: F.linear(m.a(x).relu(), m.w[:3]) + F.linear(m.b(x).relu(), m.w[3:]) + F.linear(m.c(x).relu(), m.w[3:]),
            w=(6, 6), a=L(4, 6), b=L(4, 6), c=L(4, 6),
        ),
        rows,
        {"w.up-down": up_down(6), "w.up-down-2": up_down(6), "w.neurons": neurons(6), "w.neurons-2": neurons(6)},
    ),
    "one weight that reads two spaces with rows of its own": (
        Wired(lambda m, x: F.linear(m.a(x).relu(), m.w[:3]) * F.linear(m.b(x).relu(), m.w[3:]), w=(6, 6), a=L(4, 6), b=L(4, 6)),
        rows,
        {"w.up-down": up_down(6), "w.up-down-2": up_down(6), "w.neurons": neurons(6), "w.neurons-2": neurons(6)},
    ),
    "a lone unit": (
        Wired(lambda m, x: F.linear(torch.addmm(m.b, x, m.a).relu(), m.c), a=(4, 1), b=(1,), c=(3, 1)), rows,
        {"c.up-down": up_down(1)},
    ),
    "a sum that another space weighs": (
        Wired(lambda m, x: m.c((m.a(x)[:, :, None].expand(-1, 6, 6) @ m.b(x)[:, :, None])[..., 0]), a=L(4, 6), b=L(4, 6), c=L(6, 3)),
        rows,
        {"value-output": "value-output, GL(6), 1"},
    ),
    "linear layers in inference mode": (
        Wired(torch.inference_mode()(lambda m, x: m.c(m.a(x).relu())), a=L(4, 6, bias=False), c=L(6, 3)), rows,
        {"c.up-down": up_down(6), "c.neurons": neurons(6)},
    ),
    "a norm of plain data": (
        Wired(lambda m, x: m.c(m.n(x)), n=nn.BatchNorm1d(4), c=L(4, 3)), rows,
        {"n.readers": "norm-readers, diagonal(4), 1"},
    ),
    "a shift of the input": (
        Wired(lambda m, x: m.c(m.a(x + m.shift).relu()), shift=(4,), a=L(4, 6), c=L(6, 3)), rows,
        {"c.up-down": up_down(6), "c.neurons": neurons(6)},
    ),
    "depthwise over units and plain channels": (
        Wired(lambda m, x: m.c(m.d(torch.cat([x, m.a(x)], 1)).relu()), a=C(4, 6, 1), d=C(10, 10, 3, groups=10), c=C(10, 3, 1)), lines,
        {"d.up-down": up_down(6, "diagonal"), "c.up-down": up_down(10), "c.channels": neurons(6, "channels")},
    ),
    "a group of plain channels": (
        Wired(lambda m, x: m.c(m.d(torch.cat([x, m.a(x)], 1)).relu()), a=C(4, 4, 1), d=C(8, 8, 3, groups=2), c=C(8, 3, 1)), lines,
        {"c.up-down": up_down(8), "c.channels": "channels, permutation(4), 2"},
    ),
    "a space that two of three groups read": (
        Wired(
            lambda m, x: m.c(m.d(torch.cat([m.a(x), m.a(x), m.b(x)], 1)).relu()),
            a=C(4, 4, 1), b=C(4, 4, 1), d=C(12, 12, 3, groups=3), c=C(12, 3, 1),
        ),
        lines,
        {"d.up-down": up_down(4, "GL"), "c.up-down": up_down(12), "c.channels": "channels, permutation(4), 3"},  # of b alone
    ),
    "a convolution whose bias is a constant": (
        Wired(lambda m, x: m.c(F.conv1d(x, m.w, torch.ones_like(m.w[:, 0, 0]))), w=(6, 4, 1), c=C(6, 3, 1)), lines,
        {"c.channels": neurons(6, "channels")},
    ),
    "a convolution whose bias is a product": (
        Wired(lambda m, x: m.c(F.conv1d(x, m.w, m.a * m.b)), w=(6, 4, 1), a=(6,), b=(6,), c=C(6, 3, 1)), lines,
        {"c.up-down": up_down(6, "diagonal"), "a.readers": "norm-readers, diagonal(6), 1", "c.channels": neurons(6, "channels")},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "inputs", "expected"), READ.values(), ids=READ.keys())
def test_what_is_read(model: nn.Module, inputs: Callable[[], Tensor], expected: dict[str, str], table: Table) -> None:
    assert table(found_and_trusted(model, inputs())) == expected


def fixed_norm(m: Any, x: Tensor) -> Tensor:
    return m.c(F.linear(x, torch._weight_norm(m.w.exp(), m.size, 0)).relu())  # type: ignore[no-any-return]


NO_RULE = "it goes through operator {}, which has no rule"
STAYS: dict[str, tuple[nn.Module, Callable[[], Tensor], str, str]] = {  # which finding says why
    "a weight reshaped across its axes": (
        Wired(lambda m, x: F.linear(m.a(x).relu(), m.w.view(8, 6)), a=L(4, 6), w=(4, 12)), rows,
        "a", "'w': it is reshaped across its axes",
    ),
    "a grouped weight reshaped across its axes": (
        Wired(lambda m, x: F.conv1d(F.conv1d(x, m.a), m.w.view(8, 3, 2), groups=2), a=(6, 4, 1), w=(4, 2, 3, 2)), lines,
        "Wired", "'w' is reshaped across its axes",
    ),
    "a weight for each item of a batch": (
        Wired(lambda m, x: m.c(torch.bmm(x, m.w)), w=(2, 7, 6), c=L(6, 3)), lines, "Wired", NO_RULE.format("bmm"),
    ),
    "a bias of a constant product": (
        Wired(lambda m, x: m.c(torch.addmm(m.b, x, torch.ones_like(x[0])[:, None].expand(4, 6))), b=(6,), c=L(6, 3)), rows,
        "Wired", NO_RULE.format("addmm"),
    ),
    "a bias taken twice": (
        Wired(lambda m, x: m.c(torch.addmm(m.b, x, m.w, beta=2)), b=(6,), w=(4, 6), c=L(6, 3)), rows,
        "Wired", NO_RULE.format("addmm"),
    ),
    "a shifted embedding": (
        Wired(lambda m, x: m.c(F.embedding(x, m.table + 1)), table=(9, 6), c=L(6, 3)), lambda: torch.arange(10).reshape(2, 5) % 9,
        "Wired", NO_RULE.format("embedding"),
    ),
    "a convolution with a computed weight": (
        Wired(lambda m, x: m.c(F.conv1d(x, m.w.exp())), w=(6, 4, 1), c=C(6, 3, 1)), lines, "Wired", NO_RULE.format("exp"),
    ),
    "a transposed convolution in groups": (
        Wired(lambda m, x: m.c(m.t(m.a(x))), a=C(4, 6, 1), t=nn.ConvTranspose1d(6, 8, 2, groups=2), c=C(8, 3, 1)), lines,
        "t", NO_RULE.format("convolution"),
    ),
    "a convolution whose bias is computed": (
        Wired(lambda m, x: m.c(F.conv1d(x, m.w, m.b.exp()).relu()), w=(6, 4, 1), b=(6,), c=C(6, 3, 1)), lines,
        "Wired", NO_RULE.format("exp"),
    ),
    "a norm of plain data whose gain is computed": (
        Wired(lambda m, x: m.c(F.layer_norm(x, (4,), m.w.exp(), m.b)), w=(4,), b=(4,), c=L(4, 3)), rows,
        "Wired", NO_RULE.format("native_layer_norm"),
    ),
    "a weight norm of what is computed": (
        Wired(fixed_norm, w=(6, 4), size=(6, 1), c=L(6, 3)), rows, "Wired", NO_RULE.format("_weight_norm_interface"),
    ),
    "positions stretched to the input": (
        Wired(lambda m, x: m.c((m.a(x) + F.interpolate(m.p, 7)).relu()), p=(1, 6, 3), a=C(4, 6, 1), c=C(6, 3, 1)), lines,
        "Wired", NO_RULE.format("upsample_nearest1d"),
    ),
    "a parameter that the model returns": (
        Wired(lambda m, x: (m.c(m.a(x) * m.w), m.w), a=L(4, 6), w=(6,), c=L(6, 3)), rows, "Wired", "it is an output of the model",
    ),
    "two spaces of which each row takes one": (
        Wired(lambda m, x: m.c(torch.where(x[:, :1] > 0, m.a(x), m.b(x))), a=L(4, 6), b=L(4, 6), c=L(6, 3)), rows,
        "b", "operator where has no rule",
    ),
    "groups met in reverse": (
        Wired(lambda m, x: m.c(m.d(x).unflatten(1, (2, 4)).flip(1).flatten(1, 2).relu()), d=C(4, 8, 3, groups=2), c=C(8, 3, 1)),
        lines, "c.up-down", "follow no common stride",
    ),
    "one weight that reads two spaces with two rows in common": (
        Wired(lambda m, x: F.linear(m.a(x).relu(), m.w[:4]) + F.linear(m.b(x).relu(), m.w[2:6]), w=(9, 6), a=L(4, 6), b=L(4, 6)),
        rows, "a", "'w' is used twice, in different ways",
    ),
    "one weight whose rows read what its columns write": (
        Wired(lambda m, x: F.linear(m.a(x), m.w[:2]) + m.c(x @ m.w), w=(4, 6), a=L(4, 6), c=L(6, 2)), rows,
        "a", "'w' is used twice, in different ways",
    ),
    "units met in reverse": (
        Wired(lambda m, x: m.c((m.a(x).flip(-1) + m.b(x)).relu()), a=L(4, 6), b=L(4, 6), c=L(6, 3)), rows,
        "a.up-down", "follow no common stride",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "inputs", "where", "why"), STAYS.values(), ids=STAYS.keys())
def test_what_stays_and_why(model: nn.Module, inputs: Callable[[], Tensor], where: str, why: str) -> None:
    found = found_and_trusted(model, inputs())
    assert len(found) == 0
    assert why in {finding.name: finding.reason for finding in found.findings}[where]


def test_a_call_recorded_without_numbers_takes_flags_beside_tensors(table: Table) -> None:
    def forward(m: Any, x: Tensor, bent: bool) -> Tensor:
        return m.c(m.a(x).tanh() if bent else m.a(x).relu())  # type: ignore[no-any-return]

    model = Wired(forward, a=L(4, 6), c=L(6, 3)).double()
    for bent, expected in ((True, {}), (False, {"c.up-down": up_down(6)})):
        found = find_symmetries(model, {"x": rows(), "bent": bent}, verify=False)
        assert table(found) == {**expected, "c.neurons": neurons(6)}
        assert found.verify(model, {"x": rows(), "bent": bent}).ok
        assert bent or not found.verify(model, {"x": rows(), "bent": True}).ok
