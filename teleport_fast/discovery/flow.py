"""Who reads whose output, and which tensors share a basis: one call of the model, watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from teleport_fast.discovery.gains import is_norm
from teleport_fast.discovery.slots import layer_of

# Functions whose result holds the operand's own vectors (selected, copied, averaged): whatever reads it reads the operand.
_SELECTS = frozenset(
    ("dropout", "clone", "contiguous", "reshape", "flatten", "to", "double", "float", "__getitem__", "index_select",
     "masked_fill", "expand", "repeat", "mean", "sum", "type_as", "view", "squeeze", "unsqueeze")
)  # fmt: skip
# Functions whose result lies in the space of all their operands: a rotation of one is a rotation of all.
_SUMS = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "iadd"))
_JOINS = frozenset(("cat", "concat", "where"))
# Functions entry by entry: an order of units survives them, a rotation does not.
_POINTWISE = frozenset(
    ("relu", "relu_", "relu6", "gelu", "silu", "tanh", "sigmoid", "softplus", "leaky_relu", "elu", "selu", "mish", "prelu",
     "hardswish", "hardtanh", "pow", "__pow__", "square", "exp", "clamp", "abs")
)  # fmt: skip
_SCALES = frozenset(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "div", "__truediv__"))


class _Classes:
    """Union-find over memory."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def root(self, memory: int) -> int:
        while (parent := self._parents.get(memory, memory)) != memory:
            memory = parent
        return memory

    def unite(self, memories: Iterable[int]) -> None:
        first, *rest = [self.root(memory) for memory in memories]
        for root in rest:
            self._parents[self.root(root)] = self.root(first)


class Flow(TorchFunctionMode):
    """The spaces of a model: what is added, joined, scaled, copied or normalised lies in one.

    `feeds(writer, reader)` tells whether a module was given vectors that another returned. `spaces_in`, `spaces_out` and
    `space_of` name the spaces of a module's inputs and outputs and of a parameter used directly; `multiplies` tells
    whether a parameter scales a space entry by entry; `summed` are the spaces in which tensors were added. With `units`
    a space is one of units in an order, which activations and products entry by entry keep too. Works on meta tensors:
    memory is told apart by its storage object, not its address.
    """

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        super().__init__()
        self._inputs: dict[int, list[int]] = {}
        self._outputs: dict[int, list[int]] = {}
        self._vectors, self._spaces, self._units = _Classes(), _Classes(), _Classes()
        self._tied: dict[tuple[int, int], int] = {}
        self._kept: list[Any] = []  # alive until the call ends, so that no memory is used twice
        self._parameters = {_memory(p) for p in model.parameters()}
        self._scaled: set[int] = set()
        self._summed: set[int] = set()
        hooks = [module.register_forward_hook(self._leave, with_kwargs=True) for module in model.modules()]
        try:
            with self:
                call()
        finally:
            for hook in hooks:
                hook.remove()
            self._kept.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not _wide(result):
            return result
        if name in _SELECTS or name in _SUMS or name in _JOINS:
            operands = [x for x in tree_leaves(args) if _wide(x) and x.shape[-1] == result.shape[-1]]
            if operands:
                if name in _SELECTS or (name in _JOINS and len(operands) == 1):  # joined to an empty cache
                    self._vectors.unite(self._hold([result, *operands[:1]]))
                self._unite(self._hold([result, *operands]))
            if name in _SUMS and len(operands) > 1:
                self._summed.add(_memory(result))
        elif name in _SCALES:
            self._scale(result, [x for x in args if isinstance(x, Tensor)])
        elif name in _POINTWISE:
            self._units.unite(self._hold([result, *(x for x in args[:1] if _wide(x))]))
        return result

    def _unite(self, memories: list[int]) -> None:
        self._spaces.unite(memories)
        self._units.unite(memories)

    def _scale(self, result: Tensor, operands: list[Tensor]) -> None:
        """x · number (one, or one per vector) and x · parameter stay in x's space; the latter is a gain of it."""
        wide = [x for x in operands if x.shape == result.shape and _memory(x) not in self._parameters]
        gains = [x for x in operands if _memory(x) in self._parameters and _wide(x)]
        numbers = [x for x in operands if not x.ndim or x.shape[-1] == 1]
        if len(wide) > 1:  # a gate
            self._units.unite(self._hold([result, *wide]))
        if len(wide) != 1 or len(wide) + len(gains) + len(numbers) < len(operands):
            return
        if not gains:
            self._vectors.unite(self._hold([result, *wide]))
        self._unite(self._hold([result, *wide, *gains]))
        self._scaled.update(_memory(x) for x in gains)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, returned = list(_floating((args, kwargs))), list(_floating(output))
        inputs, outputs = self._hold(given), self._hold(returned)
        self._inputs.setdefault(id(module), []).extend(inputs)
        self._outputs.setdefault(id(module), []).extend(outputs)
        if is_norm(module) and inputs and outputs:
            self._unite([inputs[0], outputs[0]])
        layer = layer_of(module)
        if layer is not None and inputs and outputs:
            for tensor, axis in layer.columns[:1]:
                self._tie((id(tensor), axis), inputs[0])
            for tensor, axis in layer.rows[:1]:
                self._tie((id(tensor), axis), outputs[0])
        elif isinstance(module, nn.Embedding) and outputs:
            self._tie((id(module.weight), 1), outputs[0])

    def _tie(self, key: tuple[int, int], memory: int) -> None:
        """What one axis of one weight serves shares a basis, in every call and under every name of the weight."""
        self._unite([self._tied.setdefault(key, memory), memory])

    def _hold(self, tensors: list[Tensor]) -> list[int]:
        with torch._C.DisableTorchFunction():
            self._kept += [x.untyped_storage() for x in tensors]
        return [_memory(x) for x in tensors]

    def feeds(self, writer: nn.Module, reader: nn.Module) -> bool:
        written = {self._vectors.root(memory) for memory in self._outputs.get(id(writer), ())}
        return any(self._vectors.root(memory) in written for memory in self._inputs.get(id(reader), ()))

    def _classes(self, units: bool) -> _Classes:
        return self._units if units else self._spaces

    def spaces_in(self, module: nn.Module, units: bool = False) -> set[int]:
        return {self._classes(units).root(memory) for memory in self._inputs.get(id(module), ())}

    def spaces_out(self, module: nn.Module, units: bool = False) -> set[int]:
        return {self._classes(units).root(memory) for memory in self._outputs.get(id(module), ())}

    def space_of(self, parameter: Tensor, units: bool = False) -> int:
        return self._classes(units).root(_memory(parameter))

    def coarser(self, space: int) -> int:
        """The space of units that holds a space."""
        return self._units.root(space)

    def multiplies(self, parameter: Tensor) -> bool:
        return _memory(parameter) in self._scaled

    def summed(self) -> set[int]:
        return {self._spaces.root(memory) for memory in self._summed}


def _memory(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return int(tensor.untyped_storage()._cdata)


def _wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0 and value.shape[-1] > 1


def _floating(values: Any) -> Iterator[Tensor]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif hasattr(value, "to_tuple"):
            yield from (x for x in value.to_tuple() if isinstance(x, Tensor) and x.is_floating_point())
