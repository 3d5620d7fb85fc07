"""Every column of the support matrix on two ranks: checks for tests/distributed/ranks.py, which test_distributed.py runs."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

_found = importlib.util.spec_from_file_location("support_matrix", Path(__file__).with_name("conftest.py"))
assert _found is not None and _found.loader is not None
matrix: Any = importlib.util.module_from_spec(_found)
_found.loader.exec_module(matrix)


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def train(run: Any, model: Callable[[Tensor], Tensor], steps: range) -> None:
    """This rank's half of every batch."""
    half = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    for step in steps:
        run.optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step % 4)).double()
        (model(x[half]) - x.roll(1, dims=1)[half]).square().mean().backward()
        run.optimizer.step()


def sharded(arm: Any) -> Any:
    model = matrix.chain()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return arm.run(model=model)


def everything(run: Any) -> dict[str, Tensor]:
    found = {name: whole(parameter) for name, parameter in run.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        state = run.optimizer.state.get(parameter, {})
        found |= {f"{name} {key}": whole(value) for key, value in state.items() if isinstance(value, Tensor)}
    return found


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[key].double(), other[key].double(), rtol=tolerance, atol=tolerance / 1000) for key in one
    )


def same_on_all_ranks(tensors: dict[str, Tensor]) -> bool:
    for tensor in tensors.values():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.contiguous())
        if not torch.equal(*both):
            return False
    return True


def data_parallel(arm: Any) -> None:
    single, run = arm.run().train(5), arm.run()
    train(run, nn.parallel.DistributedDataParallel(run.model), range(5))
    assert close(everything(single), everything(run), 1e-6) and same_on_all_ranks(everything(run))
    assert run.engine is None or run.teleports == single.teleports == [2, 4]


def fully_sharded(arm: Any) -> None:
    # torch's Muon multiplies in bfloat16, and rounds otherwise where the matrix is sharded; from one step to the next the
    # teleports see that. Before its first step there is nothing to see.
    steps, tolerance = (range(5), 1e-6) if arm.name != "Muon" else (range(3), 0.05)
    single, run = arm.run().train(len(steps)), sharded(arm)
    train(run, run.model, steps)
    assert close(everything(single), everything(run), tolerance) and same_on_all_ranks(everything(run))
    assert run.engine is None or run.teleports == single.teleports == [step for step in (2, 4) if step in steps]


def resumed(arm: Any) -> None:
    run = sharded(arm)
    train(run, run.model, range(3))
    path: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)

    def state(of: Any) -> dict[str, Any]:
        return {"model": get_model_state_dict(of.model), "optimizer": get_optimizer_state_dict(of.model, of.optimizer)}

    dcp.save(state(run), checkpoint_id=path[0])
    train(run, run.model, range(3, 6))
    second = sharded(arm)
    if arm.name == "schedulefree":  # its train() leaves empty entries, which torch's loader takes for a state that is there
        second.optimizer.state.clear()
    loaded = state(second)
    dcp.load(loaded, checkpoint_id=path[0])
    set_model_state_dict(second.model, loaded["model"])
    set_optimizer_state_dict(second.model, second.optimizer, loaded["optimizer"])
    train(second, second.model, range(3, 6))
    one, two = everything(run), everything(second)
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one), {key: float((one[key] - two[key]).abs().max()) for key in one}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path[0])


def named(check: Callable[[Any], None], column: str) -> Callable[[], None]:
    def run() -> None:
        check(matrix.Arm(column, lambda *_: None))

    run.__name__ = f"{check.__name__}:{column}"
    return run


for _check in (data_parallel, fully_sharded, resumed):
    for _column in matrix.COLUMNS:
        on(2)(named(_check, _column))
