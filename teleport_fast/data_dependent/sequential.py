"""A torch.nn.Sequential of Linear and activation as a list of weights, a bias being one more input row of ones, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from teleport_fast.data_dependent.activation import Activation, activation_of


def read_sequential(model: nn.Sequential) -> tuple[list[Tensor], Activation, bool]:
    """(weights, σ, bias): [W b] per Linear if any has a bias (0 where one lacks it); ValueError unless Linear and σ alternate."""
    modules = list(model)
    linears, between = [module for module in modules[0::2] if isinstance(module, nn.Linear)], modules[1::2]
    if len(modules) < 3 or len(modules) % 2 == 0 or len(linears) <= len(between):
        raise ValueError(f"model must alternate Linear and activation and end in Linear, got {[type(m).__name__ for m in modules]}")
    activations = [activation_of(module) for module in between]
    if len({activation.name for activation in activations}) > 1:
        raise ValueError(f"model must use one activation throughout, got {[activation.name for activation in activations]}")
    bias = any(has_bias(linear) for linear in linears)
    weights = []
    for linear in linears:
        W = linear.weight.detach()
        column = linear.bias.detach() if has_bias(linear) else W.new_zeros(len(W))
        weights.append(torch.cat([W, column.unsqueeze(1)], 1) if bias else W)
    return weights, activations[0], bias


@torch.no_grad()
def write_sequential(model: nn.Sequential, weights: Sequence[Tensor]) -> None:
    """Copies weights as read_sequential gave them into the Linear layers; ValueError where a layer without bias would need one."""
    for linear, weight in zip(list(model)[0::2], weights, strict=True):
        assert isinstance(linear, nn.Linear)
        wide = weight.shape[1] > linear.in_features
        if wide and not has_bias(linear) and bool((weight[:, -1] != 0).any()):
            raise ValueError("a Linear without bias must stay so, but the move gives it one; build it with bias=True")
        linear.weight.copy_(weight[:, : linear.in_features])
        if wide and has_bias(linear):
            linear.bias.copy_(weight[:, -1])


def has_bias(linear: nn.Linear) -> bool:
    """Whether the layer has a bias (torch's annotation says always)."""
    return isinstance(linear._parameters.get("bias"), nn.Parameter)
