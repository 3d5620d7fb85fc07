"""The probe: a joint is proven only if a right move is invisible and a wrong one is not, off the initialisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.symmetry import Diagonal, Joint, PositiveDiagonal, Signs, View
from teleport_fast.symmetry.verify import JointProof, Prover, VerifyReport, relative_deviation, verify

if TYPE_CHECKING:
    from tests.symmetry.conftest import Trial

VALUE_OUTPUT = "blocks.0.attention.value-output"


def test_every_found_joint_is_proven_with_its_control(trial: Trial) -> None:
    report = verify(trial.symmetries, trial.model, trial.ids, tolerance=1e-12)
    assert report.ok
    assert [proof.name for proof in report] == [joint.name for joint in trial.symmetries]
    assert all(proof.deviation <= 1e-12 and proof.control > 1e-3 for proof in report)
    assert report.max_deviation == max(proof.deviation for proof in report)


def test_a_report_is_as_good_as_its_worst_joint() -> None:
    good, bad = JointProof("a", 1e-15, 0.5, True), JointProof("b", 0.2, 0.5, False)
    assert VerifyReport((good,), 1e-10)
    assert not VerifyReport((good, bad), 1e-10)
    assert VerifyReport((good, bad), 1e-10).max_deviation == 0.2
    assert VerifyReport((), 1e-10).ok
    assert VerifyReport((), 1e-10).max_deviation == 0.0


def test_a_joint_that_is_right_only_at_initialisation_is_caught() -> None:
    """Biases start at zero, so a value bias left behind is invisible until the weights are perturbed."""
    model = GPT(GPTConfig(vocab=13, context=8, d_model=16, layers=1, heads=4, hidden=12, bias=True)).double()
    model.head.weight.data.normal_()
    joint = find_symmetries(model)[VALUE_OUTPUT]
    forgetful = replace(joint, plus=joint.plus[:1])
    ids = torch.randint(13, (2, 8))
    before = model(ids).detach()
    hand_made = Symmetries((forgetful,))
    hand_made.apply_(model, hand_made.random())
    assert relative_deviation([model(ids).detach()], [before]) < 1e-12
    assert not hand_made.verify(model, ids).ok


def test_a_joint_that_the_outputs_do_not_see_is_not_proven(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of("relu2")
    trial.model.blocks[0].attention.forward = lambda x: torch.zeros_like(x)
    (proof,) = verify([trial.symmetries[VALUE_OUTPUT]], trial.model, trial.ids)
    assert (proof.deviation, proof.control, proof.ok) == (0.0, 0.0, False)


def test_the_model_is_left_untouched(trial: Trial) -> None:
    model = trial.model.train()
    model(trial.ids).square().mean().backward()
    before = {name: (t.clone(), t.grad if t.grad is None else t.grad.clone()) for name, t in trial.tensors.items()}
    state = torch.get_rng_state()
    trial.symmetries.verify(model, trial.ids)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, (weight, gradient) in before.items():
        tensor = trial.tensors[name]
        assert torch.equal(tensor, weight)
        assert (tensor.grad is None and gradient is None) or torch.equal(tensor.grad, gradient)


def test_the_prover_puts_every_move_back(trial: Trial) -> None:
    prover = Prover(trial.model, trial.ids)
    before = {name: tensor.detach().clone() for name, tensor in prover.tensors.items()}
    proofs = [[prover.prove(joint, 1e-10) for joint in trial.symmetries] for _ in range(2)]
    assert proofs[0] == proofs[1]
    assert all(torch.equal(prover.tensors[name], tensor) for name, tensor in before.items())


def test_frozen_parameters_are_not_perturbed(trial_of: Callable[..., Trial]) -> None:
    """Folded gains are exactly one; noise on them would hide the residual joint."""
    prover = Prover(trial_of("folded").model, torch.zeros(1, 4, dtype=torch.long))
    assert torch.equal(prover.tensors["norm.weight"], torch.ones(16, dtype=torch.float64))
    assert not torch.equal(prover.tensors["head.weight"], torch.zeros(13, 16, dtype=torch.float64))


class Wrapped(nn.Module):
    """A ReLU pair with a choice of calling conventions and outputs."""

    def __init__(self, answer: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
        self.answer = answer

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.answer(self.layers(x) * scale)


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(4, 3), (torch.randn(4, 3),), [torch.randn(4, 3), 2.0], {"x": torch.randn(4, 3), "scale": 0.5}, None],
    ids=["tensor", "tuple", "list", "keywords", "guessed"],
)
def test_inputs_come_in_every_form(inputs: Any) -> None:
    model = Wrapped()
    symmetries = find_symmetries(model, inputs)
    assert [joint.kind for joint in symmetries] == ["up-down", "neurons"]
    assert symmetries.verify(model, inputs).ok


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: {"logits": y, "argmax": y.argmax(-1)},
        lambda y: (None, [y.sum(), y]),
        lambda y: SimpleNamespace(to_tuple=lambda: (y, None)),
    ],
    ids=["dict", "nested tuple", "output object"],
)
def test_every_floating_output_is_compared(answer: Callable[[Tensor], Any]) -> None:
    assert len(find_symmetries(Wrapped(answer))) == 2


def test_outputs_without_a_float_are_refused() -> None:
    with pytest.raises(ValueError, match="returns no floating tensor for example_inputs; pass inputs that give logits"):
        find_symmetries(Wrapped(lambda y: y.argmax(-1)))


def test_a_complex_rotary_table_keeps_its_imaginary_part() -> None:
    class Turned(nn.Module):
        turn: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.3, 1.2])))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.view_as_complex(self.up(x).unflatten(-1, (2, 2)))
            return torch.view_as_real(y * self.turn).flatten(-2)

    model, x = Turned(), torch.randn(5, 4)
    (after,) = Prover(model, x).call()
    prover = Prover(model, x)
    y = prover.model.up(x.double()).unflatten(-1, (2, 2))
    cos, sin = torch.tensor([0.3, 1.2]).cos(), torch.tensor([0.3, 1.2]).sin()
    wanted = torch.stack((y[..., 0] * cos - y[..., 1] * sin, y[..., 0] * sin + y[..., 1] * cos), -1).flatten(-2)
    torch.testing.assert_close(after, wanted, rtol=1e-6, atol=1e-6)


def test_relative_deviation_is_infinite_when_there_is_nothing_to_compare() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert relative_deviation([one * 1.5], [one]) == pytest.approx(0.5)
    assert relative_deviation([one, 2 * one], [one, one]) == pytest.approx(0.5**0.5)
    assert relative_deviation([one], [one[:1]]) == float("inf")
    assert relative_deviation([one, one], [one]) == float("inf")
    assert relative_deviation([nan], [one]) == float("inf")
    assert relative_deviation([one], [nan]) == float("inf")
    assert relative_deviation([0 * one], [0 * one]) == float("inf")


def test_a_joint_of_another_model_is_refused(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of("relu2")
    with pytest.raises(ValueError, match=r"names the parameter .* which the model does not have"):
        verify(trial.symmetries, Wrapped(), torch.randn(4, 3))


@pytest.mark.parametrize("width", range(1, 9))
def test_a_sign_is_always_among_what_is_proven(width: int) -> None:
    """Of five fair signs all are positive in one draw of 32: such a draw would take ReLU for a linear function."""
    model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
    plus = (View("0.weight", 0, 1, width), View("0.bias", 0, 1, width))
    joint = Joint("signed", "up-down", Diagonal(width), 1, width, plus, (View("2.weight", 1, 1, width),))
    prover = Prover(model, torch.randn(7, 3))
    assert not any(prover.prove(joint, 1e-10, seed).ok for seed in range(20))


class OneOfTwo(nn.Module):
    """Two units, of which only the first one has an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).split(1, -1)
        return self.down(torch.cat([first.relu(), second], -1))


def test_every_head_has_a_sign_among_what_is_proven() -> None:
    plus = (View("up.weight", 0, 2, 1), View("up.bias", 0, 2, 1))
    joint = Joint("signed", "up-down", Diagonal(1), 2, 1, plus, (View("down.weight", 1, 2, 1),))
    prover = Prover(OneOfTwo(), torch.randn(7, 3))
    assert not any(prover.prove(joint, 1e-10, seed).ok for seed in range(20))


class Sign(nn.Module):
    def __init__(self, seen: bool) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        return x.sign() if self.seen else x.sign().abs()


@pytest.mark.parametrize("seen", [True, False], ids=["a sign is seen", "nothing is seen"])
def test_a_scale_that_nobody_reads_is_controlled_by_its_negative(seen: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), Sign(seen), nn.Linear(4, 2))
    joint = Joint("scale", "free", PositiveDiagonal(4), 1, 4, (View("0.weight", 0, 1, 4),), ())
    (proof,) = verify([joint], model, torch.randn(7, 3))
    assert proof.deviation == 0
    assert proof.ok is seen and (proof.control > 1e-3) is seen


class Gain(nn.Module):
    """A gain that is stored less 1, and its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.out = nn.Parameter(torch.zeros(5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * (1 + self.gain))


def test_a_sign_of_a_shifted_gain_is_put_back_bit_for_bit() -> None:
    """1 + w forgets the last bits of w: the inverse alone would not bring them back."""
    joint = Joint("gain", "norm", Signs(5), 1, 5, (View("gain", 0, 1, 5, shift=1.0),), (View("out.weight", 1, 1, 5),))
    prover = Prover(Gain(), torch.randn(7, 5))
    before = {name: tensor.clone() for name, tensor in prover.tensors.items()}
    assert prover.prove(joint, 1e-10).ok
    assert all(torch.equal(prover.tensors[name], value) for name, value in before.items())


class Named(nn.Module):
    """Answers by name with its output, with what it keeps inside, and with nothing."""

    def __init__(self, output: str, inside: str) -> None:
        super().__init__()
        self.up, self.down, self.names = nn.Linear(3, 4), nn.Linear(4, 2), (output, inside)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        hidden = self.up(x)
        return {self.names[0]: self.down(hidden), self.names[1]: hidden, "loss": None}


@pytest.mark.parametrize(
    ("output", "inside", "holds"),
    [
        ("logits", "hidden_states", True),
        ("logits_per_image", "embeds", True),
        ("out", "past_key_values", True),
        ("out", "hidden_states", False),
    ],
)
def test_logits_are_what_must_stay_or_else_all_but_caches(output: str, inside: str, holds: bool) -> None:
    plus = (View("up.weight", 0, 1, 4), View("up.bias", 0, 1, 4))
    joint = Joint("joint", "up-down", Diagonal(4), 1, 4, plus, (View("down.weight", 1, 1, 4),))
    assert bool(verify([joint], Named(output, inside), torch.randn(7, 3))) is holds
