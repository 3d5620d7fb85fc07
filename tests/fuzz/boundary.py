"""The op boundary under arbitrary input: whatever the numbers say is built twice, given to plain torch and to the C++ kernels, and
both must refuse it alike, naming the op, or agree; nothing outside of the views may change.

    python tests/fuzz/boundary.py --seconds 60     # coverage-guided, by atheris, over tests/fuzz/corpus (needs pip install atheris)

The same `check` is run by hypothesis and over the corpus in test_fuzz.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
Draw = Callable[[int], int]  # a number below its argument


def main() -> None:
    import argparse

    import atheris

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--failures", default="./", help="what the name of a failing input's file begins with")
    options = parser.parse_args()
    with atheris.instrument_imports(include=["teleport_fast.ops", "teleport_fast.symmetry"]):
        import teleport_fast.ops  # noqa: F401
    calls = [0, 0]

    def once(data: bytes) -> None:
        calls[0] += 1
        calls[1] += check(reader(data))
        if calls[0] % 1000 == 0:
            print(f"{calls[0]} inputs, {calls[1]} of them computed, the others refused", flush=True)

    limits = [f"-max_total_time={options.seconds}", "-max_len=96", "-rss_limit_mb=4096", "-timeout=60"]
    command = [sys.argv[0], str(options.corpus), f"-artifact_prefix={options.failures}", *limits]
    atheris.Setup(command, once)
    atheris.Fuzz()


def reader(data: bytes) -> Draw:
    """Numbers out of bytes; 0 once they are used up."""
    rest = iter(data)

    def draw(below: int) -> int:
        if below <= 1:
            return 0
        number = next(rest, 0)
        return (number * 256 + next(rest, 0) if below > 256 else number) % below

    return draw


if __name__ == "__main__":
    # before torch and the ops: atheris instruments what is imported under it
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ENTRIES = 256
MAY_MEET = ("group_action_", "diagonal_action_", "permutation_action_")  # views of one memory move in the lists' order
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
SPECIAL = (0.0, 1e30, -1e30, float("inf"), float("nan"), 1e-40, 6e4)


class Case:
    """The arguments of one call, on buffers of their own; the same numbers build the same case."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.buffers: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.heads, self.h = (1, 1, 2, 3, 0)[draw(5)], (1, 2, 3, 5, 17, 0)[draw(6)]
        self.joints = (1, 1, 1, 2)[draw(4)]
        self.dtype = DTYPES[draw(4)]
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.generator = torch.Generator().manual_seed(draw(256))
        self.exact = draw(8) > 0
        self.mistake = draw(6) if draw(6) == 0 else -1
        self.columns = (draw(4) + 1, draw(4)) if draw(2) else (draw(20),)
        self.name, build = OPS[draw(len(OPS))]
        self.arguments, self.options = build(self)

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.wide)

    def invertible(self, heads: int) -> tuple[Tensor, Tensor]:
        g = torch.linalg.matrix_exp(0.3 * self.numbers(heads, self.h, self.h, dtype=torch.float64))
        return g.to(self.wide), torch.linalg.inv(g).mT.to(self.wide)

    def view(self, shape: Sequence[int] = (), dtype: torch.dtype | None = None, wild: bool = True, positive: bool = False) -> Tensor:
        """A strided view of a buffer, which may be another view's too, and whose entries may overlap."""
        shape = tuple(shape) or (self.heads, self.h, *self.columns)
        dtype = dtype or self.dtype
        if self.mistake == 0:
            shape = (*shape[:1], shape[1] + 1, *shape[2:])
        if self.mistake == 1:
            dtype = (torch.int32, torch.complex64, torch.float64)[self.draw(3)]
        layout = self.draw(5) if wild else 0
        order = list(range(len(shape)))
        strides = [0] * len(shape)
        if layout == 4:
            strides = [self.draw(8) for _ in shape]
        else:
            if layout in (1, 2):
                order.sort(key=lambda _: self.draw(16))
            step = 1 + (self.draw(3) if layout == 2 else 0)
            for axis in reversed(order):
                strides[axis] = step
                step *= max(1, shape[axis]) + (self.draw(2) if layout == 3 else 0)
        offset = self.draw(4)
        needed = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
        again = [i for i, buffer in enumerate(self.buffers) if buffer.dtype == dtype and len(buffer) >= needed]
        if again and self.name in MAY_MEET and self.draw(6) == 5:
            index = again[self.draw(len(again))]
        else:
            values = torch.randn(max(ENTRIES, needed), generator=self.generator).to(dtype)
            if not self.exact:
                places = torch.randint(len(values), (len(values) // 4,), generator=self.generator)
                special = SPECIAL[self.draw(len(SPECIAL))]
                values[places] = torch.tensor(special if dtype != torch.int32 else 0).to(dtype)
            self.buffers.append(values.abs().to(dtype) if positive else values)
            self.masks.append(torch.zeros(len(values), dtype=torch.bool))
            index = len(self.buffers) - 1
        self.masks[index].as_strided(shape, strides, offset).fill_(True)
        return self.buffers[index].as_strided(shape, strides, offset)

    def views(self, runs: int) -> list[Tensor]:
        return [self.view() for _ in range(runs * self.joints + (1 if self.mistake == 2 else 0))]

    def matrix(self, tensor: Tensor) -> Tensor:
        if self.mistake == 3:
            return tensor[..., :-1] if tensor.shape[-1] else tensor.unsqueeze(-1)
        return tensor.to(torch.int64) if self.mistake == 4 else tensor


Built = tuple[list[Any], dict[str, Any]]


def _group_action(case: Case) -> Built:
    g, inverse = case.invertible(case.heads * case.joints)
    plus, minus = case.views(case.draw(3)), case.views(case.draw(3))
    return [plus, minus, case.matrix(g), inverse], {"joints": case.joints}


def _diagonal_action(case: Case) -> Built:
    tensors = case.views(1 + case.draw(2))
    s = case.numbers(case.heads * case.joints, case.h).exp()
    exponents = [(1.0, -1.0, -2.0, 2.0, 0.5)[case.draw(5)] for _ in tensors]
    shifts = [float(case.draw(2)) for _ in tensors]
    return [tensors, case.matrix(s), exponents[: len(tensors) - (case.mistake == 5)], shifts], {"joints": case.joints}


def _permutation(case: Case) -> Built:
    rows = [torch.randperm(case.h, generator=case.generator) for _ in range(case.heads * case.joints)]
    index = torch.stack(rows) if rows else torch.zeros(0, case.h, dtype=torch.int64)
    if case.mistake == 5:
        index = index.clone().fill_(case.draw(3) - 1)
    return [case.views(1 + case.draw(2)), index.float() if case.mistake == 3 else index], {"joints": case.joints}


def _gram(case: Case) -> Built:
    return [case.views(case.draw(3)), case.views(case.draw(3))], {"joints": case.joints}


def _sums(case: Case) -> Built:
    return [case.views(1 + case.draw(2))], {"joints": case.joints}


def _covariance(case: Case) -> Built:
    tensors = case.views(1 + case.draw(2))
    count = case.heads * case.joints
    covariance = case.view((count, case.h, case.h), case.wide, wild=False)
    if covariance.shape[-1] == covariance.shape[-2]:
        covariance.copy_(covariance + covariance.mT)
    return [case.matrix(covariance), tensors, 0.9], {"joints": case.joints}


def _exp(case: Case) -> Built:
    return [case.matrix(case.numbers(max(1, case.heads), case.h, case.h) * 0.3)], {}


def _objective(case: Case) -> Built:
    g, _ = case.invertible(case.heads * case.joints)
    return [case.views(case.draw(2)), case.views(case.draw(2)), case.matrix(g)], {"joints": case.joints}


def _activation(case: Case) -> Built:
    g, _ = case.invertible(max(1, case.heads))
    return [case.view((max(1, case.heads), case.h, case.columns[0]), case.wide), case.matrix(g), 0.1], {}


def _adamw(case: Case) -> Built:
    lists, second = [case.views(1) for _ in range(3)], [case.view(positive=True) for _ in range(case.joints)]
    s = case.numbers(case.heads * case.joints, case.h).exp()
    return [*lists, second, case.matrix(s), [1.0], [0.0]], {"step": 1 + case.draw(3) - (case.mistake == 5), "joints": case.joints}


def _rotate(case: Case) -> Built:
    lists = [[case.view()] for _ in range(3)]
    second = case.view(positive=True)
    left = case.matrix(torch.linalg.qr(case.numbers(max(0, case.heads), case.h, case.h))[0])
    return [*lists, [second], [left] if case.draw(2) else None, None], {"step": 1 + case.draw(3) - (case.mistake == 5), "lr": 0.01}


def _iteration(case: Case) -> Built:
    heads = max(1, case.heads)
    basis = torch.linalg.qr(case.numbers(heads, case.h, case.h))[0].contiguous()
    root = case.numbers(heads, case.h, case.h)
    case.buffers.append(basis.view(-1))
    case.masks.append(torch.ones(basis.numel(), dtype=torch.bool))
    return [[basis], [case.matrix(root @ root.mT)]], {}


OPS: list[tuple[str, Callable[[Case], Built]]] = [
    ("group_action_", _group_action),
    ("diagonal_action_", _diagonal_action),
    ("permutation_action_", _permutation),
    ("gram_difference", _gram),
    ("square_sums", _sums),
    ("covariance_", _covariance),
    ("matrix_exp", _exp),
    ("grad_norm_objective", _objective),
    ("activation_action", _activation),
    ("teleport_adamw_", _adamw),
    ("rotate_step_", _rotate),
    ("orthogonal_iteration_", _iteration),
]


def check(draw: Draw) -> bool:
    """Build, call and compare; whether it was computed rather than refused. Raises AssertionError for what is wrong."""
    import teleport_fast as tf

    script: list[int] = []

    def recording(below: int) -> int:
        script.append(draw(below))
        return script[-1]

    before = Case(recording)
    outcomes = []
    for backend in ("reference", "cpp" if tf.backends()["cpp"] is True else "reference"):
        numbers = iter(script)
        case = Case(lambda below, numbers=numbers: next(numbers))  # type: ignore[misc]
        result, error = None, None
        try:
            with tf.set_backend(backend), torch.no_grad():
                result = getattr(tf.ops, case.name)(*case.arguments, **case.options)
        except (ValueError, TypeError, torch.linalg.LinAlgError) as caught:
            error = caught
        except RuntimeError as caught:
            if "cannot compute" not in str(caught):
                raise
            return False  # the kernel is not there for these dtypes
        outcomes.append((case, result, error))
    (plain, expected, refused), (kernel, found, error) = outcomes
    assert type(refused) is type(error), f"{plain.name}: {refused!r} and {error!r}"
    for case in (plain, kernel):
        for buffer, start, mask in zip(case.buffers, before.buffers, case.masks, strict=True):
            still = mask if refused is None else torch.zeros_like(mask)
            assert same(buffer[~still], start[~still]), f"{case.name} wrote outside of its views, or before it refused {refused!r}"
    if refused is not None:
        assert plain.name in str(refused) or "normalise" in str(refused), f"{plain.name}: {refused!r} names no op"
        return False
    if plain.exact:
        pairs = [*zip(kernel.buffers, plain.buffers, strict=True), *zip(leaves(found), leaves(expected), strict=True)]
        for one, other in pairs:
            scale = 1 + float(other.abs().amax()) if other.numel() else 1.0
            worst = float((one.double() - other.double()).abs().amax()) if one.numel() else 0.0
            assert worst <= TOLERANCE[plain.dtype] * scale, f"{plain.name}: {worst:.2g} apart, of {scale:.2g}"
    return True


def same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


def leaves(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from leaves(part)


if __name__ == "__main__":
    main()
