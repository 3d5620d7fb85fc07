"""Models of the families that no role builder knows by name, in float64, and the bars that every family must meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from teleport_fast import Symmetries, find_symmetries
from teleport_fast.symmetry.bucket import COVECTOR, Bucket, Element


def loosen(model: nn.Module) -> nn.Module:
    """Away from the initialisation, running statistics included: equal entries would hide what a move does wrong."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def deviation(after: list[Tensor], before: list[Tensor]) -> float:
    change = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    return (change / sum(float(b.square().sum()) for b in before)) ** 0.5


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    found = outputs(model, inputs)
    weights = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) for y in found]
    loss = sum((w * y.square() + y).sum() for w, y in zip(weights, found, strict=True))
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, got, strict=True)}


@pytest.fixture
def found_exactly() -> Callable[[nn.Module, Any], Symmetries]:
    """Finds the symmetries on one batch and holds every joint, and all together, to the bars on another.

    Deviation at most 1e-10, gradients covariant to 1e-9, and for each joint a wrong element is refuted.
    """

    def check(model: nn.Module, inputs: Any, fresh: Any = None) -> Symmetries:
        model = loosen(model.double()).eval()
        found = find_symmetries(model, inputs)
        fresh = inputs if fresh is None else fresh
        assert len(found), found.explain()
        report = found.verify(model, fresh)
        assert report.ok, [proof for proof in report if not proof.ok]
        assert report.max_deviation <= 1e-10
        assert all(proof.control > 1e-3 for proof in report)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        before, old = [y.detach() for y in outputs(model, fresh)], gradients(model, fresh)
        elements = found.random()
        for names in ([joint.name] for joint in found), [[joint.name for joint in found]]:
            for chosen in names:
                expected = {name: gradient.clone() for name, gradient in old.items()}
                for name in chosen:
                    joint = found[name]
                    move = Element.of(joint.group, joint.group.check(elements[name], joint.heads, name))
                    Bucket((joint,)).move_(move, [(COVECTOR, expected)])
                found.apply_(model, {name: elements[name] for name in chosen})
                assert deviation([y.detach() for y in outputs(model, fresh)], before) <= 1e-10, chosen
                new = gradients(model, fresh)
                size = max(float(gradient.abs().max()) for gradient in new.values())
                errors = {name: float((new[name] - expected[name]).abs().max()) / size for name in new}
                assert max(errors.values()) <= 1e-9, (chosen, max(errors, key=errors.__getitem__))
                model.load_state_dict(start)
        return found

    return check


@pytest.fixture
def table() -> Callable[[Symmetries], dict[str, str]]:
    """Joint → "kind, group, heads"."""
    return lambda found: {j.name: f"{j.kind}, {j.group}, {j.heads}" for j in found}
