"""A move is whole or was not begun: whatever raises, at any op, with parameters, gradients and state compared bit by bit."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import teleport_fast as tf
from teleport_fast.symmetry import Diagonal, GeneralLinear, bucket
from teleport_fast.writes import Writes, deliver, signals_held

Situation = dict[str, Tensor]
LAST = 2  # the step at which a teleport is due
SGD = (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9})
ADAM = (torch.optim.AdamW, {"lr": 1e-2})
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "grad_norm": (SGD, {}),
    "grad_norm, reset": (ADAM, {"second_moments": "reset"}),
    "grad_norm, project and clip": (ADAM, {"second_moments": "project", "max_norm": 0.1}),
    "balance": (ADAM, {"objective": "balance"}),
    "balance, return": (SGD, {"objective": "balance", "frame": "return"}),
    "eigenbasis": (ADAM, {"objective": lambda: tf.objectives.Eigenbasis(takes="turns")}),
    "eigenbasis, return": (ADAM, {"objective": lambda: tf.objectives.Eigenbasis(takes="turns"), "frame": "return"}),
    "scaled": (SGD, {"objective": "scaled", "frame": "return"}),
    "tf.optim.AdamW": ((tf.optim.AdamW, {"lr": 1e-2}), {}),
}


ALL_FAULTS = bool(os.environ.get("TELEPORT_FAST_ALL_FAULTS"))


def faults(count: int, closely: bool) -> list[int]:
    """Where to raise: at every one of so many calls with TELEPORT_FAST_ALL_FAULTS=1, else at the last 30 (the writes) and at 40 before."""
    first = max(1, count - (30 if closely else 10))
    step = 1 if ALL_FAULTS else max(1, first // (40 if closely else 20))
    return [*range(1, first, step), *range(first, count + 1, 1 if closely or ALL_FAULTS else 2)]


class Stop(Exception):
    """Raised between the move and the base's step, where the tests look."""


class Failed(RuntimeError):
    """What is injected."""


def joint(i: int, group: tf.symmetry.Group, heads: int) -> tf.Joint:
    width = group.width
    views = (tf.View(f"{i}.weight", 0, heads, width),), (tf.View(f"{i + 1}.weight", 1, heads, width),)
    return tf.Joint(f"{i}", f"{i}", group, heads, width, *views)


class Run:
    """Six layers with three joints, two of them dense; LAST steps taken, the gradient of the next one there."""

    def __init__(self, case: str, backend: str = "auto") -> None:
        torch.manual_seed(0)
        (make, options), engine = CASES[case]
        self.model: Any = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6)))
        joints = joint(0, GeneralLinear(4), 1), joint(2, GeneralLinear(2), 2), joint(4, Diagonal(4), 1)
        symmetries = tf.Symmetries(joints, model=self.model)
        engine = {"schedule": tf.At(LAST), **engine}
        if callable(engine.get("objective")):
            engine["objective"] = engine["objective"]()
        if make is tf.optim.AdamW:
            self.optimizer: Any = make(self.model.named_parameters(), symmetries=symmetries, **options, **engine)
            self.teleporter = self.optimizer.teleporter
        else:
            self.optimizer = make(self.model.parameters(), **options)
            self.teleporter = tf.attach(self.optimizer, symmetries, **engine)
        self.moved: Situation | None = None
        for step in range(LAST):
            self.backward(step)
            self.optimizer.step()
        self.backward(LAST)
        self.look = self.optimizer.register_step_pre_hook(self._look)

    def backward(self, step: int) -> None:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()

    def _look(self, *_: object) -> None:
        self.moved = self.situation()
        raise Stop

    def situation(self) -> Situation:
        found = {f"objective {key}": value for key, value in self.teleporter.objective.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            found[name], found[f"{name}.grad"] = parameter.detach().clone(), parameter.grad.clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{key}"] = torch.as_tensor(value if value is not None else 0.0).clone()
        return {key: value.clone() for key, value in found.items()}

    def attempt(self, within: Any) -> BaseException | None:
        """The step up to the base's, with the mode around the move; what came out of it."""
        move = type(self.teleporter)._move

        def moving(*arguments: Any) -> None:
            with within:
                move(self.teleporter, *arguments)

        self.teleporter._move = moving  # type: ignore[method-assign]
        self.moved = None
        try:
            self.optimizer.step()
        except Stop:
            return None
        except BaseException as error:
            return error
        raise AssertionError("the base's step was taken")


class Functions(TorchFunctionMode):
    """Raises at one of the torch functions that Python calls, before it runs."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # neither attributes nor torch's own switches (grad mode, autocast) are ops, and these cannot fail
        if not getattr(func, "__name__", "").startswith(("__get__", "set_", "_set_", "is_", "_is_", "clear_")):
            self.count += 1
            if self.count == self.at:
                raise self.error
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Raises at one of the ops that are dispatched, ours among them, before it runs."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


def same_bits(one: Situation, other: Situation, without: str = " ") -> bool:
    one, other = ({key: value for key, value in each.items() if not key.startswith(without)} for each in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.filterwarnings("ignore:teleport_fast. a write of the move raised:RuntimeWarning")
@pytest.mark.parametrize("mode", [Functions, Dispatched])
@pytest.mark.parametrize("case", CASES)
def test_a_move_that_raises_at_any_op_was_not_begun_or_is_whole(case: str, mode: Any) -> None:
    """A fault of the search raises, and every bit is as before; one of a write is overcome, and every bit is as without it."""
    undisturbed = Run(case)
    before = undisturbed.situation()
    counting = mode(0, Failed())
    assert undisturbed.attempt(counting) is None
    moved = undisturbed.moved
    assert moved is not None and not same_bits(before, moved)
    run, raised, overcome = Run(case), 0, 0
    for at in faults(counting.count, mode is Dispatched):
        error = run.attempt(mode(at, Failed()))
        if error is None:
            assert run.moved is not None and same_bits(run.moved, moved), f"fault {at}"
            overcome += 1
            run = Run(case)
        else:
            assert isinstance(error, Failed)
            assert same_bits(run.situation(), before), f"fault {at}"
            raised += 1
    assert raised > 5
    assert overcome > 0
    # after all these faults, a step like any other
    assert run.attempt(mode(0, Failed())) is None
    assert run.moved is not None and same_bits(run.moved, moved)


@pytest.mark.filterwarnings("ignore:teleport_fast. a write of the move raised:RuntimeWarning")
def test_where_a_basis_is_held_a_fault_leaves_the_weights_to_rounding() -> None:
    """The return frame takes the held basis up before it searches: it is put down again by the inverse. Gradients are then void."""
    CASES["held"] = ADAM, {"objective": "eigenbasis", "frame": "return", "schedule": tf.Every(1)}
    counting = Functions(0, Failed())
    Run("held").attempt(counting)
    run, raised = Run("held"), 0
    before = run.situation()
    for at in range(1, counting.count + 1, 17):
        if run.attempt(Functions(at, Failed())) is None:
            run = Run("held")
            continue
        raised += 1
        for name in dict(run.model.named_parameters()):
            torch.testing.assert_close(run.situation()[name], before[name], rtol=1e-4, atol=1e-5)
    assert raised > 5


def test_the_comparison_notices_a_move_that_is_begun() -> None:
    """The control: a bucket's move that stops half way leaves other bits, which the test above would see."""
    run = Run("grad_norm")
    before = run.situation()
    weight = dict(run.model.named_parameters())["0.weight"]
    with torch.no_grad():
        weight.mul_(1.0 + 2**-22)
    assert not same_bits(before, run.situation())


@pytest.mark.filterwarnings("ignore:teleport_fast. a write of the move raised:RuntimeWarning")
@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt(), SystemExit()])
def test_every_kind_of_error_is_taken_alike(error: BaseException) -> None:
    undisturbed = Run("grad_norm")
    before = undisturbed.situation()
    counting = Dispatched(0, error)
    undisturbed.attempt(counting)
    run, outcomes = Run("grad_norm"), set()
    for at in range(1, counting.count + 1):
        came = run.attempt(Dispatched(at, error))
        now = run.moved if came is None else run.situation()
        whole = now is not None and undisturbed.moved is not None and same_bits(now, undisturbed.moved)
        assert whole or (came is error and now is not None and same_bits(now, before))
        outcomes.add((whole, came is error))
        if whole:
            run = Run("grad_norm")
    # what only says that the process should end is raised again once the move is whole
    assert outcomes == ({(False, True), (True, True)} if not isinstance(error, Exception) else {(False, True), (True, False)})


@pytest.mark.parametrize("op", ["group_action_", "diagonal_action_"])
def test_a_write_that_goes_on_raising_is_finished_by_the_next_step(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are between two points only where a write fails three times; it is said, and the next touch finishes it."""
    undisturbed = Run("grad_norm")
    undisturbed.attempt(Dispatched(0, Failed()))
    run = Run("grad_norm")
    before = run.situation()
    works, calls = getattr(bucket, op), [0]

    def broken(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] < 4:
            raise Failed
        works(*arguments, **options)

    monkeypatch.setattr(bucket, op, broken)
    if op == "group_action_":  # the first write of all: nothing was begun
        assert isinstance(run.attempt(Dispatched(0, Failed())), Failed)
        assert same_bits(run.situation(), before)
        return
    with pytest.warns(RuntimeWarning, match="a move could not be finished, the network is between two points"):
        assert isinstance(run.attempt(Dispatched(0, Failed())), Failed)
    run.optimizer.state_dict()
    assert undisturbed.moved is not None and same_bits(run.situation(), undisturbed.moved)


@pytest.mark.filterwarnings("ignore:teleport_fast. a write of the move raised:RuntimeWarning")
@pytest.mark.parametrize("case", ["grad_norm", "balance"])
def test_plain_torch_goes_on_at_the_tensor_where_it_stopped(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the reference backend an op is many: a copy_ that raises leaves tensors before it written, which must not move twice."""
    with tf.set_backend("reference"):
        undisturbed = Run(case)
        undisturbed.attempt(Functions(0, Failed()))
        copy_, calls = Tensor.copy_, [0, 0]

        def broken(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
            calls[0] += 1
            if calls[0] == calls[1]:
                raise Failed
            return copy_(self, *arguments, **options)

        monkeypatch.setattr(Tensor, "copy_", broken)
        for at in range(1, 13):
            run = Run(case)
            calls[:] = 0, at
            assert run.attempt(Functions(0, Failed())) is None
            assert calls[0] > at
            calls[1] = 0
            assert run.moved is not None and undisturbed.moved is not None and same_bits(run.moved, undisturbed.moved)


@pytest.mark.parametrize("case", ["balance, return", "eigenbasis, return", "scaled"])
def test_a_way_back_that_raises_is_taken_by_the_next_touch(case: str) -> None:
    undisturbed = Run(case)
    undisturbed.look.remove()
    undisturbed.optimizer.step()
    run = Run(case)
    run.look.remove()
    come_back = type(run.teleporter)._come_back

    def failing(*arguments: Any) -> None:
        with Functions(3, Failed()):
            come_back(run.teleporter, *arguments)

    run.teleporter._come_back = failing  # type: ignore[method-assign]
    with pytest.raises(Failed):
        run.optimizer.step()
    del run.teleporter._come_back
    assert not torch.equal(run.model[0].weight, undisturbed.model[0].weight)
    run.teleporter.detach()
    for one, other in zip(run.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@contextmanager
def handler(number: int, function: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(number, function)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("case", ["grad_norm", "eigenbasis", "scaled", "tf.optim.AdamW"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_op_finds_the_move_whole_or_not_begun(case: str, number: int) -> None:
    """The handler raises, as Python's own for SIGINT does, and looks where the parameters are."""
    undisturbed = Run(case)
    before = undisturbed.situation()
    signalling = Signalling(0, number)
    undisturbed.attempt(signalling)
    moved = undisturbed.moved
    seen: list[Situation] = []
    run = Run(case)

    def interrupt(*_: object) -> None:
        seen.append(run.situation())
        raise KeyboardInterrupt

    outcomes = set()
    with handler(number, interrupt):
        for at in [*random.Random(0).sample(range(1, signalling.count + 1), min(12, signalling.count)), signalling.count]:
            came = run.attempt(Signalling(at, number))
            if came is None:  # in the return frame it waits for the way back
                assert run.teleporter.frame == "return" and not seen
                with pytest.raises(KeyboardInterrupt):
                    run.teleporter.detach()
                outcomes.add("later")
            else:
                assert isinstance(came, KeyboardInterrupt) and len(seen) == 1
                # the objective's memory is put back on the handler's way out
                whole = moved is not None and same_bits(seen[0], moved, without="objective")
                assert whole or (same_bits(seen[0], before, without="objective") and same_bits(run.situation(), before))
                outcomes.add("after" if whole else "before")
            seen.clear()
            run = Run(case)
    assert len(outcomes) == 2


class Signalling(Dispatched):
    """Sends this process a signal at one of the ops."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__(at, Failed())
        self.number = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(self.number)
        return func(*args, **(kwargs or {}))


def test_signals_are_held_in_the_main_thread_and_come_in_their_order() -> None:
    came: list[int] = []
    with handler(signal.SIGUSR1, lambda number, _: came.append(number)), handler(signal.SIGUSR2, lambda n, _: came.append(n)):
        with signals_held():
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR1)
            assert came == []
        assert came == [signal.SIGUSR2, signal.SIGUSR1]
        later: list[int] = []
        with signals_held(later):
            signal.raise_signal(signal.SIGUSR1)
        assert later == [signal.SIGUSR1] and len(came) == 2
        deliver(later)
        assert came[2:] == [signal.SIGUSR1] and not later

        def elsewhere() -> None:
            with signals_held():
                pass

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert callable(signal.getsignal(signal.SIGUSR1))


def test_writes_say_whether_they_are_begun() -> None:
    def broken() -> None:
        raise Failed

    writes = Writes([lambda: [broken]])
    with pytest.raises(Failed):
        writes.finish()
    assert writes and not writes.begun
    begun = Writes([lambda: None, broken])
    with pytest.raises(Failed):
        begun.finish()
    assert begun and begun.begun


@pytest.mark.parametrize("at", [0, 3])
def test_the_fused_steps_of_adamw_are_all_taken_or_none(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """teleport_adamw_ moves what the engine left to the step: a fault in it is overcome, and counted once."""
    from teleport_fast.optim import adamw

    runs = Run("tf.optim.AdamW"), Run("tf.optim.AdamW")
    works, calls = adamw.teleport_adamw_, [0]

    def broken(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] <= at:
            raise Failed
        works(*arguments, **options)

    for run, op in zip(runs, (works, broken), strict=True):
        run.look.remove()
        monkeypatch.setattr(adamw, "teleport_adamw_", op)
        if at and op is broken:
            with pytest.warns(RuntimeWarning, match="could not be finished"), pytest.raises(Failed):
                run.optimizer.step()
            run.optimizer.state_dict()  # finishes the fused step, as any touch of the engine does
        else:
            run.optimizer.step()
    assert calls[0] > at
    fused = [f"{i}.weight" for i in (4, 5)]
    for name in fused:
        one, other = (dict(run.model.named_parameters())[name] for run in runs)
        assert torch.equal(one, other)
        assert float(runs[0].optimizer.state[one]["step"]) == float(runs[1].optimizer.state[other]["step"]) == LAST + 1


@pytest.mark.filterwarnings("ignore:teleport_fast")
def test_rotateds_bases_and_moments_turn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault between a basis' turn and its moments': the turn is finished, with the bits of a step without the fault."""
    from teleport_fast.optim import refresh

    def build() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False))
        return model, tf.optim.Rotated(model.named_parameters(), every=1)

    runs = [build() for _ in range(2)]
    works, calls = refresh.group_action_, [0]

    def broken(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise Failed
        works(*arguments, **options)

    for (model, optimizer), op in zip(runs, (works, broken), strict=True):
        monkeypatch.setattr(refresh, "group_action_", op)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    assert calls[0] > 2
    for one, other in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(one, other)
        for key, value in runs[0][1].state[one].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(runs[1][1].state[other][key])), key
