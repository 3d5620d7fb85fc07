"""A float64 copy of a model on which a proof runs, whatever its own weights are stored in."""

from __future__ import annotations

import copy

from torch import nn


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy in float64 and eval mode; dynamically quantized linear layers become plain ones that do not train.

    Errors: ValueError for a model that cannot be copied (weights computed by a hook) or that computes in integers.
    Source: own derivation, checked by tests/discovery/test_guards.py.
    """
    try:
        whole = copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"model cannot be copied for the proof ({str(error).splitlines()[0]}); build it with "
            f"torch.nn.utils.parametrizations instead of the older weight_norm and spectral_norm hooks"
        ) from None
    for name, module in list(whole.named_modules()):
        if is_quantized(module):
            parent, _, child = name.rpartition(".")
            setattr(whole.get_submodule(parent), child, _dequantized(name, module))
    return whole.double().eval()  # .to(float64) would drop imaginary parts


def is_quantized(module: nn.Module) -> bool:
    """A layer of torch.ao.nn whose weight is packed into integers, so that no parameter holds it."""
    return ".quantized." in f"{type(module).__module__}." and callable(getattr(module, "weight", None))


def _dequantized(name: str, module: nn.Module) -> nn.Module:
    weight, bias = module.weight(), module.bias()  # type: ignore[operator]
    if weight.ndim != 2 or ".dynamic." not in f"{type(module).__module__}.":
        raise ValueError(
            f"{name!r} ({type(module).__name__}) computes in integers, where no proof in float64 runs; "
            f"find symmetries before quantizing"
        )
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    plain.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain
