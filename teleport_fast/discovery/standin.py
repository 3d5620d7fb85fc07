"""A stand-in: one block of each kind of a large (or meta) model, on which its joints are proven for all blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from teleport_fast.symmetry.joint import Joint
from teleport_fast.symmetry.symmetries import Finding
from teleport_fast.symmetry.view import View

# Rows kept of the vocabulary: joints act on its other axis.
ROWS = 64


@dataclass(frozen=True)
class StandIn:
    """A float64 copy on the CPU with one block of each kind; `blocks` maps a block's prefix to those it stands for."""

    model: nn.Module
    blocks: dict[str, list[str]]

    def inputs(self, inputs: Any, tokens: int | None = None) -> Any:
        """The same inputs with every id among the rows kept, on the CPU; `tokens` cuts sequences of ids to that length."""

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.cpu()[..., :tokens] % ROWS if value.dtype == torch.int64 else value.cpu()

        return tree_map(keep, inputs)

    def crosses(self, joint: Joint) -> bool:
        """Whether the joint ties a block that stands for several to something outside it."""
        homes = {self._block(view.parameter) for view in (*joint.views(), *joint.carried)}
        return len(homes) > 1 and any(home is not None and len(self.blocks[home]) > 1 for home in homes)

    def chain_(self) -> None:
        """Let every block that stands for several be called twice, one after the other, as in the model."""
        for prefix in {home.rsplit(".", 2)[0] if home.count(".") > 1 else "" for home in self.blocks}:
            blocks = self.model.get_submodule(prefix)
            start = f"{prefix}." if prefix else ""
            twice = [b for i, b in blocks._modules.items() for _ in self.blocks[f"{start}{i}."][:2]]
            blocks._modules = {str(i): block for i, block in enumerate(twice)}
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", None) is True:
                config.use_cache = False  # a cache tells layers apart by a number that the two calls share

    def _block(self, name: str) -> str | None:
        return next((prefix for prefix in self.blocks if name.startswith(prefix)), None)

    def joints(self, joint: Joint) -> Iterator[Joint]:
        """The joint on every block that this one stands for; a joint across blocks takes in the views of all."""
        homes = {self._block(view.parameter) for view in (*joint.views(), *joint.carried)}
        (home,) = homes if len(homes) == 1 else (None,)
        if home is None:
            plus, minus, carried = (tuple(self._views(side)) for side in (joint.plus, joint.minus, joint.carried))
            yield replace(joint, plus=plus, minus=minus, carried=carried)
            return
        for prefix in self.blocks[home]:
            sides = (joint.plus, joint.minus, joint.carried)
            plus, minus, carried = (tuple(_moved(view, home, prefix) for view in side) for side in sides)
            name = _renamed(joint.name, home, prefix)
            yield replace(joint, name=name, plus=plus, minus=minus, carried=carried)

    def _views(self, views: Iterable[View]) -> Iterator[View]:
        for view in views:
            home = self._block(view.parameter)
            if home is None:
                yield view
            else:
                yield from (_moved(view, home, prefix) for prefix in self.blocks[home])

    def findings(self, finding: Finding) -> Iterator[Finding]:
        """The finding for every block that this one stands for; the others say where it was proven."""
        home = self._block(finding.name + ".")
        if home is None:
            yield finding
            return
        first, *rest = self.blocks[home]
        yield replace(finding, name=_renamed(finding.name, home, first))
        for prefix in rest:
            reason = f"as in {first[:-1]}" if finding.status == "found" else finding.reason
            yield replace(finding, name=_renamed(finding.name, home, prefix), reason=reason)


def _renamed(name: str, home: str, prefix: str) -> str:
    return (prefix + (name + ".").removeprefix(home)).removesuffix(".")


def _moved(view: View, home: str, prefix: str) -> View:
    return replace(view, parameter=prefix + view.parameter.removeprefix(home))


def is_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def stand_in(model: nn.Module) -> StandIn:
    """Copy one block of each kind and everything outside the lists of blocks; meta tensors are drawn at random.

    Blocks are of one kind when class, parameters, buffers and plain attributes agree (but for numbers of layers). Of the
    largest embedding table, and of what has its rows outside the blocks, 64 rows are kept. The model is not changed.
    Source: own derivation, checked by tests/discovery/test_standin.py.
    """
    lists = {name: module for name, module in _outermost_lists(model)}
    kinds = {name: _kinds(blocks) for name, blocks in lists.items()}
    dropped = {
        id(blocks[index]): nn.Identity() for name, blocks in lists.items() for same in kinds[name] for index in same[1:]
    }
    memo: dict[int, Any] = dict(dropped)
    generator = torch.Generator().manual_seed(11)
    rows = _vocabulary(model)
    inside = {id(p) for blocks in lists.values() for p in blocks.parameters()}
    for name, tensor in _kept(model, dropped):
        if id(tensor) not in memo:
            sliced = tensor[:ROWS] if rows and tensor.shape[:1] == (rows,) and id(tensor) not in inside else tensor
            memo[id(tensor)] = _wide(name, sliced, tensor, generator)
    twin = copy.deepcopy(model, memo)
    blocks_of: dict[str, list[str]] = {}
    for name, old in lists.items():
        new = twin.get_submodule(name)
        prefix = f"{name}." if name else ""
        firsts = [same[0] for same in kinds[name]]
        kept = [new._modules[list(old._modules)[index]] for index in firsts]
        new._modules = {str(i): block for i, block in enumerate(kept)}
        for i, same in enumerate(kinds[name]):
            blocks_of[f"{prefix}{i}."] = [f"{prefix}{index}." for index in same]
    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            module.num_embeddings = module.weight.shape[0]
            if module.padding_idx is not None and module.padding_idx >= module.num_embeddings:
                module.padding_idx = None
        elif isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
    return StandIn(twin, blocks_of)


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of blocks (modules with modules of their own), none inside another."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if len(module) > 1 and all(any(True for _ in block.children()) for block in module):
            found.append(name)
            yield name, module


def _kinds(blocks: nn.ModuleList) -> list[list[int]]:
    """Indices of equal blocks, in the order of their first ones."""
    kinds: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(_kind(block), []).append(index)
    return list(kinds.values())


def _kind(block: nn.Module) -> tuple[Any, ...]:
    described: list[Any] = []
    for name, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str)) and key not in ("layer_idx", "layer_id", "idx", "index", "training")
        }
        described.append((name, type(module), tuple(sorted(plain.items()))))
    tensors = (*block.named_parameters(), *block.named_buffers())
    return (*described, *((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors))


def _vocabulary(model: nn.Module) -> int:
    """Rows of the largest embedding table, 0 where they are few."""
    rows = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
    return rows if rows > ROWS else 0


def _kept(model: nn.Module, dropped: Mapping[int, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the modules that stay."""
    stack = [("", model)]
    while stack:
        prefix, module = stack.pop()
        if id(module) in dropped:
            continue
        for own in (module._parameters, module._buffers):
            yield from ((prefix + name, tensor) for name, tensor in own.items() if tensor is not None)
        stack += [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]


def _wide(name: str, tensor: Tensor, original: Tensor, generator: torch.Generator) -> Tensor:
    """A float64 (or whole, or complex) copy on the CPU; what is on meta gets values of a usual size."""
    shape = tensor.shape
    if not tensor.is_meta:
        wide = tensor.detach().to("cpu", torch.float64) if tensor.is_floating_point() else tensor.detach().cpu()
        values = wide.clone() if wide.data_ptr() == tensor.data_ptr() else wide
    elif tensor.dtype == torch.bool:
        values = torch.ones(shape, dtype=torch.bool).tril() if len(shape) > 1 else torch.ones(shape, dtype=torch.bool)
    elif not tensor.is_floating_point():
        counted = torch.arange(shape[-1] if shape else 1) if "position" in name else torch.zeros(1, dtype=torch.int64)
        values = counted.expand(shape or (1,)).clone().to(tensor.dtype).reshape(shape)
    elif not isinstance(original, nn.Parameter):
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    else:
        usual = 0.0 if len(shape) > 1 or name.endswith("bias") else 1.0  # else a gain
        size = max(shape[-1], 1) ** -0.5 if len(shape) > 1 else 0.1
        values = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(size).add_(usual)
    if isinstance(original, nn.Parameter):
        return nn.Parameter(values, requires_grad=original.requires_grad)
    return values
