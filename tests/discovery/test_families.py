"""Every family of transformers has the joints that its architecture gives it, proven, and none besides."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast import find_symmetries, fold_norm_gains_
from teleport_fast.discovery.inputs import guess_inputs
from teleport_fast.symmetry import GeneralLinear, Joint, Orthogonal, Permutation, Rotary
from teleport_fast.symmetry.bucket import COVECTOR, PARAMETER, Bucket, Element
from teleport_fast.symmetry.verify import Prover, relative_deviation
from teleport_fast.symmetry.widen import WideCasts

if TYPE_CHECKING:
    from tests.discovery.conftest import Found

    Find = Callable[[str], Found]

pytest.importorskip("transformers")


def attention(heads: int, width: int, query_key: str | None, queries: int = 1) -> list[str]:
    """Rows of one attention module: kind, group, heads."""
    rows = [f"value-output GL({width}) x{heads}", f"heads permutation({heads}) x1"]
    if query_key is not None:
        rows.append(f"{query_key} x{heads}")
    if queries > 1:
        rows.append(f"query-heads permutation({queries}) x{heads}")
    return rows


def mlp(width: int, group: str | None, experts: int = 1) -> list[str]:
    rows = [f"neurons permutation({width}) x{experts}"]
    return rows if group is None else [f"up-down {group}({width}) x{experts}", *rows]


def norms(count: int, width: int) -> list[str]:
    return [f"norm-readers diagonal({width}) x1"] * count


def signs(kind: str, width: int, count: int = 1) -> list[str]:
    return [f"{kind} signs({width}) x1"] * count


def stream(width: int, centred: bool) -> list[str]:
    """What general gains leave of a residual stream; under LayerNorm one sign for all units."""
    return [f"residual-order permutation({width}) x1", *signs("residual-signs", 1 if centred else width)]


HALF = "query-key-rotary rotary(6) half"
GROUPED = attention(2, 6, HALF, queries=2)
NORMED = [
    *attention(2, 6, None, queries=2),
    "query-key-gains diagonal(3) x1",
    "query-key-signs signs(3) x2",
    *signs("norm-signs", 6, 2),
]
WHOLE = attention(4, 6, "query-key GL(6)")
LATENT = [
    "value-output GL(7) x4",
    "query-key GL(5) x4",
    "query-key-rotary rotary(4) interleaved x1",
    "heads permutation(4) x1",
    *(row for rank in (11, 13) for row in (*norms(1, rank), f"latent-order permutation({rank}) x1")),
    *signs("norm-signs", 11),
    *signs("norm-signs", 13),
]
LLAMA = 2 * [*GROUPED, *mlp(28, "diagonal"), *norms(2, 20)] + norms(1, 20) + stream(20, False)
LLAMA_24 = 2 * [*GROUPED, *mlp(28, "diagonal"), *norms(2, 24)] + norms(1, 24) + stream(24, False)
GPT = 2 * [*WHOLE, *mlp(28, None), *norms(2, 24)] + norms(1, 24) + stream(24, True)
PARALLEL = 2 * mlp(28, None) + norms(3, 24) + stream(24, True)  # attention and MLP read one norm
T5_ATTENTION = ["value-output GL(6) x4", "query-key GL(6) x4"]
CROSS = "heads permutation(4) x1"
POST = signs("norm-signs", 20, 2)

JOINTS: dict[str, list[str]] = {
    "gpt2": GPT,
    "opt": 2 * [*WHOLE, *mlp(28, "positive diagonal"), *norms(2, 24)] + norms(1, 24) + stream(24, True),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA_24,
    "qwen3": 2 * [*NORMED, *mlp(28, "diagonal"), *norms(2, 20)] + norms(1, 20) + stream(20, False),
    "gemma2": 2 * [*GROUPED, *mlp(28, "diagonal"), *norms(2, 20), *POST] + norms(1, 20) + stream(20, False),
    "gemma3": 2 * [*NORMED, *mlp(28, "diagonal"), *norms(2, 20), *POST] + norms(1, 20) + stream(20, False),
    "phi3": LLAMA_24,
    "gpt_neox": (
        2 * [*attention(4, 6, "query-key-rotary rotary(6) of 4 half"), *mlp(28, None), *norms(2, 24)]
        + norms(1, 24)
        + stream(24, True)
    ),
    # post-norm: gains lie on the stream, so that only the last has a reader of its own, the head's first layer; the
    # activation before the tied decoder's norm is not odd, so that no sign is left
    "bert": 2 * [*WHOLE, *mlp(28, None)] + norms(1, 24) + stream(24, True)[:1],
    "vit": GPT,
    "clip": [
        *(2 * [*WHOLE, *mlp(28, None), *norms(2, 24)] + norms(1, 24) + stream(24, True)),
        *(2 * [*attention(5, 6, "query-key GL(6)"), *mlp(26, None), *norms(2, 30)] + norms(1, 30) + stream(30, True)),
        "common-space O(15) x1",
        *(2 * ["scale positive diagonal(1) x1"]),
    ],
    # the encoder's positions are frozen, the decoder's head is tied: each takes joints away
    "whisper": [
        *mlp(24, None),
        *(2 * [*WHOLE, *mlp(28, None), *norms(2, 24)] + norms(1, 24)),
        *(2 * [*WHOLE, *WHOLE, *mlp(26, None), *norms(3, 24)] + stream(24, True)),
    ],
    # one position bias per stack: self-attentions share the order of their heads, cross-attentions have their own
    "t5": [
        *(2 * [*T5_ATTENTION, *mlp(28, "diagonal"), *norms(2, 20)] + norms(1, 20)),
        *(2 * [*T5_ATTENTION, *T5_ATTENTION, CROSS, *mlp(28, "diagonal"), *norms(3, 20)]),
        *(2 * [CROSS] + stream(20, False)),
    ],
    "mixtral": (
        2 * [*GROUPED, *mlp(28, "diagonal", 5), "expert-order permutation(5) x1", *norms(2, 20)]
        + norms(1, 20)
        + stream(20, False)
    ),
    "qwen2_moe": (
        2 * [*GROUPED, *mlp(10, "diagonal", 5), "expert-order permutation(5) x1", *mlp(14, "diagonal"), *norms(2, 24)]
        + norms(1, 24)
        + stream(24, False)
    ),
    "qwen3_moe": (
        2 * [*NORMED, *mlp(10, "diagonal", 5), "expert-order permutation(5) x1", *norms(2, 20)]
        + norms(1, 20)
        + stream(20, False)
    ),
    "deepseek_v3": [
        *(2 * [*LATENT, *norms(2, 20)] + norms(1, 20) + stream(20, False)),
        *(mlp(28, "diagonal") + mlp(10, "diagonal", 6) + mlp(10, "diagonal")),
        "expert-order permutation(3) x2",
        "expert-group-order permutation(2) x1",
    ],
    "phi": PARALLEL + 2 * attention(4, 6, "query-key-rotary rotary(6) of 4 half"),
    "gptj": PARALLEL + 2 * attention(4, 6, "query-key-rotary rotary(6) of 4 interleaved"),
    "cohere": (
        2 * [*attention(2, 6, "query-key-rotary rotary(6) interleaved", queries=2), *mlp(28, "diagonal")]
        + norms(3, 24)
        + stream(24, True)
    ),
    # each key head's queries, key and value lie side by side
    "falcon": 2 * [*GROUPED, *mlp(28, None), *norms(2, 24)] + norms(1, 24) + stream(24, True),
    # ReLU², gains stored as 1 + w under LayerNorm, and half of 6 rounded to 4 rotated dimensions
    "nemotron": [
        *(2 * attention(2, 6, "query-key-rotary rotary(6) of 4 half", queries=2)),
        *(2 * ["up-down-squared positive diagonal(28) x1", *mlp(28, None)]),
        *(norms(5, 24) + stream(24, True)),
    ],
    # the second layer has no rotary embedding
    "smollm3": [row for row in LLAMA_24 if row != f"{HALF} x2"] + [f"{HALF} x2", "query-key GL(6) x2"],
}
# Families whose own forward stays in the model's dtype; the others cast to float32 (norms, softmax, rotary, routers).
WIDE = {"gpt2", "bert", "whisper"}

every_family = pytest.mark.parametrize("family", JOINTS)


@every_family
def test_a_family_has_these_joints_and_no_others(family: str, found_in: Find) -> None:
    found = found_in(family)
    rows = Counter(f"{joint.kind} {joint.group} x{joint.heads}" for joint in found.symmetries)
    assert rows == Counter(JOINTS[family]), found.symmetries.explain()
    deviations = [f.deviation for f in found.symmetries.findings if f.status == "found"]
    assert len(deviations) == len(found.symmetries)
    assert max(d for d in deviations if d is not None) <= 1e-10
    assert all(finding.reason for finding in found.symmetries.findings if finding.status != "found")
    assert found.seconds <= 3.0


@every_family
def test_a_family_that_casts_to_float32_says_so(family: str, found_in: Find) -> None:
    notes = [f for f in found_in(family).symmetries.findings if f.kind == "float32"]
    assert [note.name for note in notes] == ([] if family in WIDE else ["model"])


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    found = model(**inputs)
    return [value for key, value in found.items() if "logits" in key]


@every_family
def test_all_joints_at_once_leave_the_model_itself_alone(family: str, found_in: Find) -> None:
    """On the model as it is, its casts to float32 included, with inputs that the proof did not see."""
    found = found_in(family)
    model = copy.deepcopy(found.model)
    generator = torch.Generator().manual_seed(9)
    inputs = {
        key: value.flip(0).roll(1, -1) if value.dtype == torch.int64 else value + torch.randn_like(value)
        for key, value in found.inputs.items()
    }
    with torch.no_grad():
        before = outputs(model, inputs)
        found.symmetries.apply_(model, found.symmetries.random(0.5, generator))
        assert relative_deviation(outputs(model, inputs), before) <= (1e-10 if family in WIDE else 3e-5)


@every_family
def test_gradients_move_contragrediently(family: str, found_in: Find) -> None:
    """Autograd at g·w against the moved gradients of w, all joints one after another; unmoved gradients are noticed."""
    found = found_in(family)
    model = copy.deepcopy(found.model)
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}

    def gradients() -> dict[str, Tensor]:
        with WideCasts():
            loss = sum(value.square().mean() for value in outputs(model, found.inputs))
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            got = torch.autograd.grad(loss, [tensors[name] for name in trained], allow_unused=True)
        return {name: g.clone() for name, g in zip(trained, got, strict=True) if g is not None}

    before = gradients()
    moved = {name: g.clone() for name, g in before.items()}
    elements = found.symmetries.random(0.5, torch.Generator().manual_seed(2))
    for joint in found.symmetries:
        element = Element.of(joint.group, elements[joint.name])
        Bucket((joint,)).move_(element, [(PARAMETER, tensors), (COVECTOR, moved)])
    after = gradients()
    assert relative_deviation(list(moved.values()), list(after.values())) <= 1e-9
    assert relative_deviation(list(before.values()), list(after.values())) > 1e-3


def without(joint: Joint, parameter: str) -> Joint:
    sides = (joint.plus, joint.minus, joint.carried)
    plus, minus, carried = (tuple(v for v in side if not v.parameter.endswith(parameter)) for side in sides)
    assert sum(map(len, (plus, minus, carried))) < sum(map(len, sides))
    return replace(joint, plus=plus, minus=minus, carried=carried)


def interleaved(joint: Joint) -> Joint:
    assert isinstance(joint.group, Rotary)
    return replace(joint, group=replace(joint.group, layout="interleaved"))


def general(joint: Joint) -> Joint:
    return replace(joint, group=GeneralLinear(joint.width))


def rotated(joint: Joint) -> Joint:
    return replace(joint, group=Orthogonal(joint.width))


def ungrouped(joint: Joint) -> Joint:
    """The order of all experts where the router chooses among groups of them."""
    plus, carried = (
        tuple(replace(v, heads=1, width=6, head_stride=6) for v in side) for side in (joint.plus, joint.carried)
    )
    return replace(joint, group=Permutation(6), heads=1, width=6, plus=plus, carried=carried)


def unshifted(joint: Joint) -> Joint:
    return replace(joint, plus=tuple(replace(view, shift=0.0) for view in joint.plus))


LAYER = "model.layers.0."
# what must be rejected: (family, joint, what is done to it)
WRONG: dict[str, tuple[str, str, Callable[[Joint], Joint]]] = {
    "rotary planes of the other layout": ("llama", f"{LAYER}self_attn.query-key", interleaved),
    "GL under a rotary embedding": ("llama", f"{LAYER}self_attn.query-key", general),
    "GL where a part is rotated": ("gpt_neox", "gpt_neox.layers.0.attention.query-key", general),
    "a norm's gain without one reader": (
        "llama",
        f"{LAYER}input_layernorm.readers",
        lambda joint: without(joint, "k_proj.weight"),
    ),
    "neurons of a gated MLP without the gate": (
        "llama",
        f"{LAYER}mlp.neurons",
        lambda joint: without(joint, "gate_proj.weight"),
    ),
    "rotations of a stream with gains": ("llama", "residual.order", rotated),
    "a LayerNorm's gain without its bias": ("gpt2", "transformer.h.0.ln_1.readers", lambda j: without(j, "ln_1.bias")),
    "values without their bias": ("qwen2", f"{LAYER}self_attn.value-output", lambda j: without(j, "v_proj.bias")),
    "a gain stored as 1 + w taken for w": ("gemma2", f"{LAYER}input_layernorm.readers", unshifted),
    "gains of queries and keys, unit by unit": ("qwen3", f"{LAYER}self_attn.q_norm.signs", rotated),
    "T5's heads without their position bias": ("t5", "encoder.heads", lambda j: without(j, "attention_bias.weight")),
    "experts without their router": ("mixtral", f"{LAYER}mlp.expert-order", lambda j: without(j, "mlp.gate.weight")),
    "experts without the router's buffer": (
        "deepseek_v3",
        "model.layers.1.mlp.expert-order",
        lambda joint: without(joint, "e_score_correction_bias"),
    ),
    "experts across the router's groups": ("deepseek_v3", "model.layers.1.mlp.expert-order", ungrouped),
    "GL of a cosine's space": ("clip", "common-space", general),
}


@pytest.mark.parametrize(("family", "name", "change"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_does_not_pass(family: str, name: str, change: Callable[[Joint], Joint], found_in: Find) -> None:
    found = found_in(family)
    joint = found.symmetries[name]
    wrong = change(joint)
    if wrong.group.form == "dense":  # a dense group has no shift
        plain = (tuple(replace(view, shift=0.0) for view in side) for side in (wrong.plus, wrong.minus))
        wrong = replace(wrong, plus=next(plain), minus=next(plain))
    prover = Prover(found.model, found.inputs)
    assert prover.prove(joint, 1e-10).ok
    proof = prover.prove(wrong, 1e-10)
    assert not proof.ok
    assert proof.deviation > 1e-3


def test_rejections_name_what_stands_between(found_in: Find) -> None:
    def why(family: str, name: str) -> str:
        (finding,) = [f for f in found_in(family).symmetries.findings if f.name == name]
        return f"{finding.status}: {finding.reason}"

    query_key = "rejected: queries and keys pass through a norm (q_norm and k_norm) before they meet"
    assert why("qwen3", f"{LAYER}self_attn.query-key") == query_key
    assert "position bias" in why("t5", "encoder.block.0.layer.0.SelfAttention.heads")
    assert "embed_positions.weight' is frozen" in why("whisper", "model.encoder.residual.order")
    assert "not homogeneous" in why("gpt2", "transformer.h.0.mlp.up-down")
    assert "acts on what goes on" in why("gemma3", f"{LAYER}post_attention_layernorm.readers")


class Unknown(nn.Module):
    """A layer of a kind that nobody knows, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(20, 20, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x.sort(-1).values @ self.kernel)


def test_an_unknown_layer_leaves_the_others_their_joints_and_is_named(zoo: Any, found_in: Find) -> None:
    model, inputs = zoo.build("llama")
    model.model.layers[1].mlp = Unknown()
    found = find_symmetries(model, inputs)
    theirs = "model.layers.1.mlp", "model.layers.1.post_attention_layernorm", "residual"
    others = {j.name: str(j.group) for j in found_in("llama").symmetries if not j.name.startswith(theirs)}
    assert {joint.name: str(joint.group) for joint in found} == others
    skipped = [finding for finding in found.findings if finding.status == "skipped"]
    (named,) = [finding for finding in skipped if finding.name == "model.layers.1.mlp"]
    assert (named.kind, named.reason.partition(":")[0]) == ("Unknown", "no builder knows its role")


# continuous dimensions of the stream once gains are folded: O(d), under LayerNorm O(d - 1)
FOLDED = {"gpt2": (24, True), "opt": (24, True), "vit": (24, True), "qwen3": (20, False), "deepseek_v3": (20, False)}


@pytest.mark.parametrize("family", FOLDED)
def test_folded_gains_free_the_residual_stream(family: str, zoo: Any) -> None:
    width, centred = FOLDED[family]
    model, inputs = zoo.build(family)
    with torch.no_grad():
        before = outputs(model, inputs)
        folded = fold_norm_gains_(model, inputs)
        assert relative_deviation(outputs(model, inputs), before) <= (1e-12 if family in WIDE else 3e-5)
    found = find_symmetries(model, inputs)
    assert found["residual"].group == Orthogonal(width, fixes_ones=centred)
    assert not {"residual.order", "residual.signs"} & {joint.name for joint in found}
    if family == "deepseek_v3":
        assert {str(joint.group) for joint in found if joint.kind == "latent"} == {"O(11)", "O(13)"}
    folded.unfold_()
    with torch.no_grad():
        assert relative_deviation(outputs(model, inputs), before) <= (1e-12 if family in WIDE else 3e-5)


def test_gains_of_one_stored_as_zero_free_a_stream_with_post_norms(zoo: Any) -> None:
    """Gemma's post-norms write on the stream, so that they cannot be folded: they must be one."""
    model, inputs = zoo.build("gemma3")
    with pytest.raises(ValueError, match=r"post_attention_layernorm.weight' cannot be folded"):
        fold_norm_gains_(model, inputs)
    for name, parameter in model.named_parameters():
        if "norm" in name and "self_attn" not in name:
            parameter.data.zero_()
            parameter.requires_grad_(False)
    assert find_symmetries(model, inputs)["residual"].group == Orthogonal(20)


@every_family
def test_inputs_are_guessed_from_the_config(family: str, zoo: Any, found_in: Find) -> None:
    found = found_in(family)
    guessed = guess_inputs(found.model)
    assert isinstance(guessed, dict)
    assert set(guessed) == set(found.inputs)
    assert all(value.dtype.is_floating_point == found.inputs[key].is_floating_point() for key, value in guessed.items())
    prover = Prover(found.model, guessed)
    assert prover.prove(found.symmetries.joints[0], 1e-10).ok


@pytest.mark.parametrize("family", ["llama", "gemma3", "clip", "deepseek_v3"])
def test_a_teleport_raises_the_gradient_and_keeps_the_loss(family: str, zoo: Any, found_in: Find) -> None:
    """The whole way on a real model: find, attach, backward, step; the optimizer itself stands still."""
    model, inputs = zoo.build(family)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-30)
    teleporter = tf.attach(optimizer, found_in(family).symmetries, objective="grad_norm", schedule=tf.At(0), radius=0.3)
    before = sum(value.square().mean() for value in outputs(model, inputs))
    assert isinstance(before, Tensor)
    before.backward()
    optimizer.step()
    (record,) = teleporter.history
    assert record.objective_after > 1.2 * record.objective_before
    after = sum(value.square().mean() for value in outputs(model, inputs))
    assert float((after - before).detach()) == pytest.approx(0.0, abs=1e-6 * float(before.detach()))


def test_found_joints_hold_again_on_other_inputs(found_in: Find) -> None:
    found = found_in("qwen2_moe")
    inputs = {"input_ids": found.inputs["input_ids"].flip(1)}
    report = found.symmetries.verify(found.model, inputs)
    assert report.ok
    assert report.max_deviation <= 1e-10
