"""What the checks stand on: small models with known symmetries, one training loop, and what must be equal after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.distributed import as_dtensor
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.symmetry.symmetries import Symmetries

KINDS = {
    # 3 heads of 4: two ranks cut the middle head, and 19 rows divide by neither 2 nor 4
    "gpt": GPTConfig(vocab=19, context=6, d_model=12, layers=2, heads=3, mlp="swiglu", hidden=16),
    # nothing divides evenly; gains that joints move
    "uneven": GPTConfig(vocab=11, context=5, d_model=10, layers=1, heads=2, mlp="swiglu", hidden=14, gains=True, bias=True),
    # enough columns for parts of them
    "wide": GPTConfig(vocab=9, context=4, d_model=8, layers=1, heads=2, mlp="swiglu", hidden=131),
    # four heads of 4, as tensor parallelism wants them
    "even": GPTConfig(vocab=16, context=6, d_model=16, layers=2, heads=4, mlp="swiglu", hidden=24),
    # whole heads for two ranks, and nothing even after them
    "odd": GPTConfig(vocab=13, context=5, d_model=12, layers=1, heads=2, mlp="swiglu", hidden=10),
    # one tensor that the stream is written from and read by
    "tied": GPTConfig(vocab=11, context=5, d_model=10, layers=1, heads=2, mlp="relu2", hidden=13, tied=True),
    # a permutation between its layers, queries that share keys
    "gelu": GPTConfig(vocab=13, context=5, d_model=12, layers=1, heads=4, kv_heads=2, mlp="gelu", hidden=10),
}


def built(kind: str) -> GPT:
    """A model whose every gradient is there from the first step on (fresh ones have layers that start at zero)."""
    torch.manual_seed(7)
    model = GPT(KINDS[kind]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@cache
def joints_of(kind: str) -> tuple[Any, ...]:
    return tf.find_symmetries(built(kind)).joints


def prepare() -> None:
    """Found once, before the ranks are forked."""
    for kind in KINDS:
        joints_of(kind)


def symmetries_of(kind: str, model: nn.Module | None = None) -> Symmetries:
    return Symmetries(joints_of(kind), model=model)


def batches(kind: str, steps: int, world: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch that `world` ranks can share, row by row."""
    config, generator = KINDS[kind], torch.Generator().manual_seed(11)
    for _ in range(steps):
        tokens = torch.randint(config.vocab, (2 * world, config.context + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, steps: int = 4, share: bool = False
) -> list[float]:
    """Losses of so many steps; with `share` every rank takes its own rows of the batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for tokens, targets in batches(kind, steps, world):
        rows = slice(2 * rank, 2 * rank + 2) if share else slice(None)
        loss = loss_of(model, tokens[rows], targets[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def full(tensor: Tensor) -> Tensor:
    dtensor = as_dtensor(tensor.detach())
    return tensor.detach().clone() if dtensor is None else dtensor.full_tensor()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.dim():
                found[f"{name.removeprefix('module.')}.{key}"] = full(value)
    return found


def far(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    return max((float((first[name] - second[name]).abs().max()) for name in first), default=0.0)


def moved_by(teleporter: Any) -> list[Tensor]:
    """Every element that the engine applies from now on."""
    seen: list[Tensor] = []
    place = teleporter.plan.place
    original = place.writes

    def writes(bucket: Any, element: Any, sources: Any) -> Any:
        seen.append(element.g.clone() if hasattr(element, "g") else torch.cat((element.plus.g, element.minus.g)).clone())
        return original(bucket, element, sources)

    place.writes = writes
    return seen


def same_everywhere(tensors: list[Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [(tuple(t.shape), t.numpy().tobytes()) for t in tensors])
    return all(other == gathered[0] for other in gathered)


def compared(
    kind: str,
    wrap: Callable[[nn.Module], Any],
    base: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-2),
    share: bool = True,
    steps: int = 4,
    keep: Callable[[Any], bool] = lambda joint: True,
    tolerance: float = 1e-9,
    **arguments: Any,
) -> tuple[Any, Any]:
    """Train the plain model and the wrapped one; the wrapped one's weights, state, records and elements must be those of one process."""
    runs = []
    for wrapper in (None, wrap):
        model = built(kind)
        symmetries = Symmetries(tuple(j for j in joints_of(kind) if keep(j)), model=model)
        wrapped = model if wrapper is None else (wrapper(model) or model)
        optimizer = base(wrapped.parameters())
        fresh = {name: value for name, value in arguments.items() if name != "objective"}
        objective = arguments.get("objective", "grad_norm")
        teleporter = tf.attach(optimizer, symmetries, objective=objective() if callable(objective) else objective, **fresh)
        seen = moved_by(teleporter)
        trained(wrapped, optimizer, kind, steps, share=share and wrapper is not None)
        runs.append((wrapped, optimizer, teleporter, seen))
    (plain, plain_optimizer, single, _), (model, optimizer, teleporter, seen) = runs
    assert single.history and seen, "nothing was teleported"
    assert far(weights(plain), weights(model)) < tolerance, far(weights(plain), weights(model))
    assert far(states(plain, plain_optimizer), states(model, optimizer)) < tolerance
    assert same_everywhere(seen), "the ranks moved by different bits"
    for one, other in zip(single.history, teleporter.history, strict=True):
        assert (one.step, one.joints) == (other.step, other.joints)
        for key in ("objective_before", "objective_after", "radius_used"):
            a, b = getattr(one, key), getattr(other, key)
            assert abs(a - b) <= 1e-6 * max(1.0, abs(a)) or (a != a and b != b), (key, a, b)
    untouched = built(kind)
    assert far(weights(untouched), weights(plain)) > 1e-3, "the control: training and teleports change the weights"
    return runs[0], runs[1]
