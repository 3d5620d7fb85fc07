"""The catalogue of bad input: for each kind the exception's type, and that its text names the argument, the value and the remedy.

What attach, Teleport, joints and objectives refuse at the door is in test_bad_input.py, what models and files may hold in
test_security.py and tests/inspection; here is all else that a user calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast import data_dependent, minima, ops, peers
from teleport_fast.objectives import Fixed
from teleport_fast.symmetry import GeneralLinear, Orthogonal
from teleport_fast.symmetry.groups import Group

A, G2, EYE = torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.eye(2).unsqueeze(0)
LINE = torch.arange(2).unsqueeze(0)
SHARED = torch.ones(1, 2, 1).expand(1, 2, 3)
P = nn.Parameter(torch.ones(2, 2))


def loss() -> Tensor:
    return P.square().sum()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))


def joint(group: Group | None = None, **changes: Any) -> tf.Joint:
    views = (tf.View("0.weight", 0, 1, 4),), (tf.View("1.weight", 1, 1, 4),)
    fields = {"name": "joint", "kind": "test", "group": group or GeneralLinear(4), "heads": 1, "width": 4, "plus": views[0], "minus": views[1]}
    return tf.Joint(**{**fields, **changes})  # type: ignore[arg-type]


def symmetries(**changes: Any) -> tf.Symmetries:
    return tf.Symmetries((joint(**changes),))


def attach(**options: Any) -> Any:
    net = model()
    return tf.attach(torch.optim.AdamW(net.parameters()), tf.Symmetries((joint(),), model=net), **options)


def adamw(**numbers: Any) -> None:
    one = torch.ones(1, 1, 1)
    ops.teleport_adamw_(one, one, one.clone(), one.clone(), torch.ones(1, 1), **{"step": 1, **numbers})


def rotated(*sizes: int, **options: Any) -> Any:
    return tf.optim.Rotated([("a.weight", nn.Parameter(torch.ones(*(sizes or (4, 4)))))], **options)


def action(form: str = "v_exact", X: Tensor | None = None, weights: Any = None, **options: Any) -> Any:
    weights = [torch.randn(3, 2), torch.randn(2, 3)] if weights is None else weights
    return data_dependent.MLPAction(weights, torch.randn(2, 5) if X is None else X, form=form, **options)


# name: (what is called, the exception, the argument, its value, the remedy)
CATALOGUE: dict[str, tuple[Callable[[], object], type[Exception], str, str, str]] = {
    # the engine
    "condition of one": (lambda: attach(max_condition=1.0), ValueError, "max_condition", "got 1.0", "None is 1/√eps"),
    "condition that is nan": (lambda: attach(max_condition=math.nan), ValueError, "max_condition", "got nan", "None is 1/√eps"),
    "condition that is text": (lambda: attach(max_condition="10"), ValueError, "max_condition", "got '10'", "None is 1/√eps"),
    "norm of zero": (lambda: attach(max_norm=0.0), ValueError, "max_norm", "got 0.0", "1.0 is usual"),
    "backend without a name": (lambda: tf.set_backend("gpu"), ValueError, "backend", "got 'gpu'", "see teleport_fast.backends()"),
    # schedules
    "a step before the first": (lambda: tf.At(-1), ValueError, "steps", "got -1", "count from 0"),
    "a step that is no integer": (lambda: tf.At(1.5), ValueError, "steps", "got 1.5", "count from 0"),  # type: ignore[arg-type]
    "every zeroth step": (lambda: tf.Every(0), ValueError, "n must", "got 0", "Every(100) fires"),
    "every true step": (lambda: tf.Every(True), ValueError, "n must", "got True", "Every(100) fires"),
    "no count": (lambda: tf.Every(2, count=0), ValueError, "count", "got 0", "None is no limit"),
    "a condition that is a number": (lambda: tf.When(3), TypeError, "condition", "got int", "pass a function"),  # type: ignore[arg-type]
    "no patience": (lambda: tf.Plateau(patience=0), ValueError, "patience", "got 0", "50 is the default"),
    "a threshold of one": (lambda: tf.Plateau(threshold=1.0), ValueError, "threshold", "got 1.0", "0.01 asks for"),
    "smoothing of one": (lambda: tf.Plateau(smoothing=1.0), ValueError, "smoothing", "got 1.0", "0 takes the norm"),
    "no loss": (lambda: tf.OffEigenvector(None), TypeError, "loss_fn", "got NoneType", "pass a function"),  # type: ignore[arg-type]
    "an angle of one": (lambda: tf.OffEigenvector(loss, threshold=1.0), ValueError, "threshold", "got 1.0", "0.1 is the default"),
    "no horizon": (lambda: tf.WorthItsTime(horizon=0), ValueError, "horizon", "got 0", "10 is the default"),
    "no clock": (lambda: tf.WorthItsTime(clock=1), TypeError, "clock", "got int", "time.perf_counter"),  # type: ignore[arg-type]
    "first of what is no schedule": (lambda: tf.First(3), TypeError, "schedule", "got int", "Plateau()"),  # type: ignore[arg-type]
    "another schedule's memory": (lambda: tf.Every(2).load_state_dict({"mean": 1.0}), ValueError, "Every", "['mean']", "load it with"),
    # ops
    "integers to move": (lambda: ops.group_action_(A.int(), [], EYE), TypeError, "plus[0]", "got torch.int32", "convert it first"),
    "a vector to move": (lambda: ops.group_action_(torch.ones(2), [], EYE), ValueError, "plus[0]", "(2,)", "pass the joint's view"),
    "widths that differ": (lambda: ops.group_action_(A, torch.ones(1, 3, 2), EYE), ValueError, "minus[0]", "(1, 3, 2)", "pass views of"),
    "dtypes that differ": (lambda: ops.group_action_(A, A.double(), EYE), ValueError, "minus[0]", "float64", "convert one of them"),
    "nothing to move": (lambda: ops.group_action_([], [], EYE), ValueError, "plus and minus", "both empty", "pass at least one"),
    "runs of unequal length": (lambda: ops.group_action_([A, A, A], [], EYE, joints=2), ValueError, "joints=2", "3 and 0", "joint-major"),
    "an element of another width": (lambda: ops.group_action_(A, [], torch.eye(3)[None]), ValueError, "g must", "(1, 3, 3)", "pass one (h, h)"),
    "an inverse of another width": (
        lambda: ops.group_action_(A, [], EYE, torch.eye(3)[None]),
        ValueError, "g_inverse_t", "(1, 3, 3)", "pass one",
    ),
    "an element of integers": (lambda: ops.group_action_(A, [], EYE.long()), TypeError, "g must", "got torch.int64", "g.float()"),
    "entries that share memory": (lambda: ops.group_action_(SHARED, [], EYE), ValueError, "strides (2, 1, 0)", "share memory", "distinct"),
    "scales of integers": (lambda: ops.diagonal_action_(A, LINE), TypeError, "s must", "got torch.int64", "s.float()"),
    "scales of another width": (lambda: ops.diagonal_action_(A, torch.ones(1, 3)), ValueError, "s must", "got (1, 3)", "one entry per row"),
    "too many exponents": (lambda: ops.diagonal_action_(A, torch.ones(1, 2), [1.0, 1.0]), ValueError, "exponents", "got 2", "one per tensor"),
    "scaling what shares memory": (lambda: ops.diagonal_action_(SHARED, torch.ones(1, 2)), ValueError, "(1, 2, 3)", "share memory", "distinct"),
    "an order of floats": (lambda: ops.permutation_action_(A, LINE.float()), TypeError, "index", "got torch.float32", "index.long()"),
    "an order that repeats": (lambda: ops.permutation_action_(A, LINE * 0), ValueError, "index", "0 … h − 1", "pass a permutation"),
    "a covariance in halves": (lambda: ops.covariance_(EYE.half(), A, 0.9), TypeError, "covariance", "got torch.float16", "keep it in float32"),
    "an unknown normaliser": (
        lambda: ops.covariance_(EYE, A, 0.9, normalise="all"),
        ValueError, "normalise", "got 'all'", "'tensor' is the default",
    ),
    "exp of integers": (lambda: ops.matrix_exp(EYE.int()), TypeError, "M must", "got torch.int32", "convert it first"),
    "exp of what is not square": (lambda: ops.matrix_exp(torch.ones(2, 3)), ValueError, "M must", "(2, 3)", "pass square matrices"),
    "an objective's element": (
        lambda: ops.grad_norm_objective(A, G2, torch.eye(3)[None]),
        ValueError, "grad_norm_objective: g must", "(1, 3, 3)", "pass one (h, h)",
    ),
    "an activation of integers": (lambda: ops.activation_action(A.int(), EYE, 0.1), TypeError, "Z must", "got torch.int32", "convert it first"),
    "an activation's element": (lambda: ops.activation_action(A, torch.eye(3), 0.1), ValueError, "g (h, h)", "(3, 3)", "pass one (h, h)"),
    "step zero": (lambda: adamw(step=0), ValueError, "step", "step=0", "at least 1"),
    "a beta of one": (lambda: adamw(betas=(1.0, 0.9)), ValueError, "betas", "betas=(1.0, 0.9)", "in [0, 1)"),
    # symmetries by hand
    "a view without heads": (lambda: tf.View("w", 0, 0, 4), ValueError, "heads", "got 0, 4, 1", "must be positive"),
    "a view before its start": (lambda: tf.View("w", 0, 1, 4, start=-1), ValueError, "start", "got -1, 1", "at least 0"),
    "a group without width": (lambda: Orthogonal(0), ValueError, "width", "got 0", "drop joints of width 0"),
    "views of another width": (
        lambda: joint(heads=2, group=GeneralLinear(2), width=2),
        ValueError, "'0.weight'", "1 of width 4", "share one space",
    ),
    "a joint without views": (lambda: joint(plus=(), minus=()), ValueError, "'joint'", "no views", "name at least one"),
    "two joints of one name": (lambda: tf.Symmetries((joint(), joint())), ValueError, "joints", "distinct names", "rename the duplicates"),
    "no such joint": (lambda: symmetries()["other"], KeyError, "joint named", "'other'", "the joints are joint"),
    "select what is not there": (lambda: symmetries().select("other"), ValueError, "keep", "['other']", "kinds here are ['test']"),
    "a model without the parameter": (
        lambda: symmetries().apply_(nn.Linear(3, 4), {"joint": torch.eye(4)}),
        ValueError, "'0.weight'", "does not have", "find_symmetries on this",
    ),
    "a singular element": (
        lambda: symmetries().apply_(model(), {"joint": torch.ones(4, 4)}),
        ValueError, "element of joint 'joint'", "singular", "pass an invertible",
    ),
    "random without a radius": (lambda: symmetries().random(radius=math.inf), ValueError, "radius", "got inf", "0.5 is the usual choice"),
    "no model": (lambda: tf.find_symmetries("gpt2"), TypeError, "model", "got str", "pass the module itself"),  # type: ignore[arg-type]
    "a model without parameters": (lambda: tf.find_symmetries(nn.ReLU()), ValueError, "model", "no parameters", "pass a model with"),
    "an unknown proof": (
        lambda: tf.find_symmetries(model(), verify="all"),  # type: ignore[arg-type]
        ValueError, "verify", "got 'all'", "True, False or",
    ),
    "an unknown canonical form": (
        lambda: tf.canonicalize(model(), symmetries(), kind="qr"),
        ValueError, "kind", "got 'qr'", "balance is the one",
    ),
    "no tolerance": (lambda: tf.canonicalize(model(), symmetries(), tolerance=0.0), ValueError, "tolerance", "got 0.0", "pass 1e-8"),
    "an element for no joint": (
        lambda: Fixed({"other": EYE}).check(symmetries()),
        ValueError, "elements", "'other'", "see symmetries.explain()",
    ),
    # Rotated
    "an unknown base map": (lambda: rotated(base="lion"), ValueError, "base", "got 'lion'", "'adam' is the default"),
    "a negative rate": (lambda: rotated(lr=-1.0), ValueError, "lr", "got -1.0", "pass a value such as 0.006"),
    "three betas": (lambda: rotated(betas=(0.9, 0.9, 0.9)), ValueError, "betas", "(0.9, 0.9, 0.9)", "(0.9, 0.98) is the default"),
    "a root mean square of zero": (lambda: rotated(match_rms=0.0), ValueError, "match_rms", "got 0.0", "0.2 matches"),
    "a negative rate of tables": (lambda: rotated(table_lr=-1.0), ValueError, "table_lr", "got -1.0", "0.01 is usual"),
    "bases that never turn": (lambda: rotated(every=0), ValueError, "every", "got 0", "3 is the default"),
    "covariances that never fade": (lambda: rotated(decay=1.0), ValueError, "decay", "got 1.0", "0.95 is the default"),
    "bases in float16": (lambda: rotated(basis_dtype=torch.float16), ValueError, "basis_dtype", "got torch.float16", "pass one of these"),
    "an unknown stream": (lambda: rotated(stream="all"), ValueError, "stream", "got 'all'", "'matrix' is the default"),
    "a negative side": (lambda: rotated(max_side=-1), ValueError, "max_side", "got -1", "4096 is the default"),
    "a hidden width of one": (lambda: rotated(hidden=1), ValueError, "hidden", "got 1", "64 is the default"),
    "a side without a meaning": (lambda: rotated(sides={"a*": ("left", "none")}), ValueError, "sides['a*']", "('left', 'none')", "rows first"),
    "heads that do not divide": (
        lambda: rotated(sides={"a*": ("heads:3", "none")}).table(),
        ValueError, "sides of 'a.weight'", "'heads:3'", "pass a divisor",
    ),
    "no symmetries for Rotated": (lambda: rotated(symmetries=3), TypeError, "symmetries", "got int", "pass find_symmetries(model)"),
    # the papers' action, minima and peers
    "an unknown form": (lambda: action(form="exact"), ValueError, "form", "got 'exact'", "'u_exact' or 'v_exact'"),
    "one layer": (lambda: action(weights=[torch.ones(2, 2)]), ValueError, "weights", "got 1", "no hidden space"),
    "inputs in halves": (lambda: action(X=torch.ones(2, 5).half()), ValueError, "X must", "got torch.float16", "pass X.double()"),
    "inputs that are not finite": (lambda: action(X=torch.full((2, 5), math.nan)), ValueError, "X must", "columns [0, 1", "drop these samples"),
    "samples in rows": (lambda: action(X=torch.ones(5)), ValueError, "X must", "(5,)", "pass inputs.mT"),
    "a slope of zero": (lambda: data_dependent.leaky_relu(0.0), ValueError, "negative_slope", "got 0.0", "for example 0.1"),
    "too few elements": (lambda: action().apply([]), ValueError, "gs must", "got 0", "one element per hidden layer"),
    "a ball without radius": (lambda: minima.worst_sharpness(loss, [P], 0.0), ValueError, "radius", "got 0.0", "for example 0.1"),
    "a spectrum of none": (lambda: minima.hessian_spectrum(loss, [P], 0), ValueError, "k must", "got 0", "in 1..4"),
    "no directions": (lambda: [*minima.sphere_directions([P], 0)], ValueError, "count", "got 0", "more directions"),
    "no parameters": (lambda: minima.hessian_spectrum(loss, [], 1), ValueError, "params", "got none", "model.parameters()"),
    "a tied parameter twice": (lambda: minima.hessian_spectrum(loss, [P, P], 1), ValueError, "params", "got 2", "pass tied parameters once"),
    "an unknown measure": (
        lambda: minima.teleport_to(action(), lambda Y: Y.square().mean(), "flat"),
        ValueError, "measure", "got 'flat'", "'sharpness', 'curvature'",
    ),
    "negative steps": (lambda: peers.level_set_teleport(loss, [P], steps=-1), ValueError, "steps", "got -1", "not be negative"),
    "a whole Armijo share": (lambda: peers.level_set_teleport(loss, [P], armijo=1.0), ValueError, "armijo", "got 1.0", "the default is 0.25"),
    "no energy": (lambda: peers.null_space_teleport(loss, model(), energy=0.0), ValueError, "energy", "got 0.0", "1 is exact"),
    "no model for the null space": (
        lambda: peers.null_space_teleport(loss, [P]),  # type: ignore[arg-type]
        ValueError, "model", "got list", "whose layers loss_fn calls",
    ),
}


def test_the_catalogue_holds_at_least_sixty_kinds() -> None:
    assert len(CATALOGUE) >= 60
    assert len({(error, argument, value, remedy) for _, error, argument, value, remedy in CATALOGUE.values()}) == len(CATALOGUE)


@pytest.mark.parametrize("kind", CATALOGUE)
def test_the_text_names_the_argument_the_value_and_the_remedy(kind: str) -> None:
    call, error, argument, value, remedy = CATALOGUE[kind]
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is error
    for part in (argument, value, remedy):
        assert part in text, f"{part!r} is not in {text!r}"
    assert "\n" not in text
