"""data_dependent_steps_ is the published teleport: the reference is double backward's, and every backend is the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from teleport_fast.data_dependent import CrossEntropy, SquaredError, leaky_relu
from teleport_fast.data_dependent.reference import published_teleport
from teleport_fast.ops import data_dependent_steps_
from teleport_fast.ops.backend import availability, set_backend
from teleport_fast.ops.data_dependent_steps import NOT_REACHED, can_use_cpp

# One joint to five, batches just over and at a width, square first, middle and last layers, widths of 1, and (widest first)
# stale inputs that are kept as factors.
NETWORKS = [
    ((9, 5, 3), 7),
    ((20, 8, 6, 3), 30),
    ((40, 6, 5, 4, 3), 50),
    ((12, 7, 9, 8, 6, 5, 2), 23),
    ((6, 1, 1, 2), 3),
    ((20, 16, 16, 3), 16),
    ((20, 16, 7, 16, 3), 16),
    ((20, 7, 16, 3), 16),
    ((9, 12, 3), 12),
    ((30, 20, 3, 2), 90),
    ((300, 256, 7, 3), 256),
]
SLOPE = 0.1


@pytest.fixture(params=["reference", "cpp"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """No instruction set of ours takes part: the products are the BLAS's."""
    if request.param == "cpp" and (availability("cpp") is not True or not can_use_cpp(torch.ones(1))):
        pytest.skip("no extension, or a torch without a BLAS within reach")
    with set_backend(request.param):
        yield request.param


class Problem:
    """Arguments of the op for a random network, the T of the first step of norm `first`."""

    def __init__(self, widths: tuple[int, ...], batch: int, labels: bool = True, steps: int = 3, first: float = 1e-3) -> None:
        self.weights = [torch.randn(b, a, dtype=torch.float64) / a**0.5 for a, b in itertools.pairwise(widths)]
        self.X = torch.randn(widths[0], batch, dtype=torch.float64)
        shape = (widths[-1], batch)
        self.target = torch.randint(widths[-1], (batch,)) if labels else torch.randn(shape, dtype=torch.float64)
        self.steps, self.widths, self.scale = steps, widths, 1.0
        with set_backend("reference"):
            probe = self.run(steps=1)
        assert probe["trace"][0, 1] > 0
        self.scale = first / max(float(T.norm()) for T in probe["Ts"])

    def run(
        self, dtype: torch.dtype = torch.float64, cap: float = math.inf, steps: int | None = None, **limits: float
    ) -> dict[str, list[Tensor]]:
        """Everything that a call writes, the memory NaN before it."""
        steps, hidden = self.steps if steps is None else steps, self.widths[1:-1]
        unset = lambda *shape: torch.full(shape, float("nan"), dtype=dtype)  # noqa: E731
        Z0, tail = (self.weights[0] @ self.X).to(dtype), [W.to(dtype, copy=True) for W in self.weights[1:]]
        target = self.target.to(dtype) if self.target.is_floating_point() else self.target
        lead, Ts, outputs = unset(len(Z0), len(Z0)), [unset(steps, k, k) for k in hidden], unset(self.widths[-1], self.X.shape[1])
        trace = torch.full((steps + 1, 2), float("nan"), dtype=torch.float64)
        data_dependent_steps_(
            Z0, tail, (self.X.mT @ self.X).to(dtype), target, lead, Ts, outputs, trace, slope=SLOPE, scale=self.scale, cap=cap,
            gram_limit=limits.get("gram_limit", 1e9), square_limit=limits.get("square_limit", 1e9),
        )  # fmt: skip
        return {"Z0": Z0, "tail": tail, "lead": lead, "Ts": Ts, "outputs": outputs, "trace": trace}


def worst(found: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> float:
    """The largest ‖found − wanted‖/‖wanted‖ of all that is written."""
    flat = [[t for value in d.values() for t in (value if isinstance(value, list) else [value])] for d in (found, wanted)]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("way", ["cpp"], indirect=True)
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("widths", "batch"), NETWORKS)
def test_every_backend_makes_the_references_steps(way, widths, batch, labels):
    problem = Problem(widths, batch, labels, first=1e-6 if batch in widths else 1e-3)
    with set_backend("reference"):
        wanted = problem.run()
    found = problem.run()
    assert torch.isfinite(wanted["trace"]).all()
    assert worst(found, wanted) < 1e-8
    # Negative control: a step of another size ends elsewhere.
    problem.scale *= 1.01
    assert worst(problem.run(), wanted) > 1e-8


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("widths", "batch"), [((9, 5, 3), 7), ((20, 8, 6, 3), 30), ((14, 6, 5, 4, 3), 40), ((20, 9, 9, 3), 9)])
def test_the_steps_are_double_backwards(way, widths, batch, labels):
    problem = Problem(widths, batch, labels, first=1e-5 if batch in widths else 1e-3)
    loss = CrossEntropy(problem.target) if labels else SquaredError(problem.target)
    rows, traced = [], []
    slow, _ = published_teleport(
        problem.weights, problem.X, loss, "iclr24", leaky_relu(SLOPE), problem.steps, problem.scale / 2, math.inf, True,
        lambda value, J, Ts: (rows.append([value, J]), traced.append(Ts)),
    )  # fmt: skip
    found = problem.run()
    wanted = {
        "Z0": slow[0] @ problem.X, "tail": slow[1:], "Ts": [torch.stack(column) for column in zip(*traced, strict=True)],
        "trace": torch.tensor(rows, dtype=torch.float64),
    }  # fmt: skip
    found["trace"] = found["trace"][:-1]
    assert worst({"W": found["lead"] @ problem.weights[0]}, {"W": slow[0]}) < 1e-8
    assert worst({name: found[name] for name in wanted}, wanted) < 1e-8


@pytest.mark.parametrize(("widths", "batch"), [((20, 8, 6, 3), 30), ((9, 4, 3), 4)])
def test_float32_is_float64_to_its_rounding(way, widths, batch):
    problem = Problem(widths, batch, first=1e-3)
    exact, found = problem.run(), problem.run(torch.float32)
    assert found["Z0"].dtype == torch.float32 and found["trace"].dtype == torch.float64
    assert worst({n: v for n, v in found.items() if n != "Ts"}, {n: v for n, v in exact.items() if n != "Ts"}) < 1e-3


def test_no_step_is_made_from_over_the_cap(way):
    problem = Problem((20, 8, 6, 3), 30, steps=5, first=1e-4)
    J = problem.run()["trace"][:, 1]
    assert (J.diff() > 0).all()
    stopped = problem.run(cap=float(J[2] + J[1]) / 2)
    torch.testing.assert_close(stopped["trace"][:3, 1], J[:3])
    assert (stopped["trace"][3:] == NOT_REACHED).all()
    two = problem.run(steps=2)
    torch.testing.assert_close(stopped["Z0"], two["Z0"])
    torch.testing.assert_close(stopped["lead"], two["lead"])
    torch.testing.assert_close(stopped["outputs"], two["outputs"])


@pytest.mark.parametrize("kind", ["wider than the batch", "rank deficient", "square and singular", "not finite"])
def test_what_has_no_full_row_rank_is_refused_in_every_row(way, kind):
    widths, batch = ((20, 8, 6, 3), 30) if kind in ("rank deficient", "not finite") else ((9, 5, 5, 3), 5)
    problem = Problem(widths, batch)
    if kind == "wider than the batch":
        problem = Problem((9, 5, 3), 5)
        problem.X, problem.target = problem.X[:, :4], problem.target[:4]
    elif kind == "not finite":
        problem.weights[0][2] = float("nan")
    else:
        problem.weights[0][1] = problem.weights[0][0]
    assert (problem.run()["trace"] == NOT_REACHED).all()


def test_the_limits_decide_what_is_too_ill_conditioned(way):
    wide, square = Problem((20, 8, 6, 3), 30), Problem((9, 5, 3), 5)
    assert (wide.run(gram_limit=1.5)["trace"] == NOT_REACHED).all()
    assert torch.isfinite(wide.run(square_limit=1.5)["trace"]).all()
    assert (square.run(square_limit=1.0)["trace"] == NOT_REACHED).all()
    assert torch.isfinite(square.run(gram_limit=1.5)["trace"]).all()


def test_a_run_is_repeated_to_the_bit(way):
    problem = Problem((20, 8, 6, 3), 30)
    first, second = problem.run(), problem.run()
    assert worst(first, second) == 0.0


def test_can_use_cpp_says_whether_the_fused_call_is_taken():
    like = torch.ones(2, 2)
    assert not can_use_cpp(like.half())
    with set_backend("reference"):
        assert not can_use_cpp(like)


def arguments(**change: Tensor) -> dict[str, object]:
    values: dict[str, object] = {
        "Z0": torch.randn(4, 9), "tail": [torch.randn(3, 4)], "gram": torch.eye(9), "target": torch.randint(3, (9,)),
        "lead": torch.zeros(4, 4), "Ts": [torch.zeros(2, 4, 4)], "outputs": torch.zeros(3, 9),
        "trace": torch.zeros(3, 2, dtype=torch.float64),
    }  # fmt: skip
    return {**values, **change}


NUMBERS = {"slope": SLOPE, "scale": 1e-3, "cap": 1e9, "gram_limit": 1e6, "square_limit": 1e6}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"Z0": torch.ones(4, 9, dtype=torch.float16)}, TypeError, "Z0 must be float32 or float64"),
        ({"Ts": []}, ValueError, "one T for every weight"),
        ({"gram": torch.eye(8)}, ValueError, r"gram must be contiguous \(9, 9\)"),
        ({"lead": torch.zeros(4, 4, dtype=torch.float64)}, TypeError, "lead must be torch.float32"),
        ({"tail": [torch.randn(4, 3).mT]}, ValueError, r"tail\[0\] must be contiguous \(3, 4\)"),
        ({"target": torch.zeros(8, dtype=torch.int64)}, ValueError, r"target must be contiguous \(9,\)"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        data_dependent_steps_(**arguments(**change), **NUMBERS)


def test_labels_out_of_range_are_named(way):
    with pytest.raises((ValueError, RuntimeError), match=r"target must hold labels in 0\.\.2, got"):
        data_dependent_steps_(**arguments(target=torch.full((9,), 3)), **NUMBERS)


def test_opcheck(way):
    values = arguments()
    torch.library.opcheck(torch.ops.teleport_fast.data_dependent_steps_.default, (*values.values(), *NUMBERS.values()))


def test_compiles_without_a_graph_break(way):
    def trace(Z0: Tensor) -> Tensor:
        values = arguments(Z0=Z0 * 1)
        data_dependent_steps_(**{**values, "tail": [U.clone()], "target": labels}, **NUMBERS)
        return values["trace"][:, 1].sum()

    U, labels, Z0 = torch.randn(3, 4), torch.randint(3, (9,)), torch.randn(4, 9)
    torch.testing.assert_close(torch.compile(trace, fullgraph=True, backend="aot_eager")(Z0), trace(Z0))
