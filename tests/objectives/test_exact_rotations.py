"""Exact rotations around torch's AdamW on tiny models of transformers: trained, turned, unfolded, the function unmoved."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.discovery.gains import gain_shift, is_norm
from teleport_fast.symmetry.widen import WideCasts

pytest.importorskip("transformers")


@cache
def load_zoo() -> ModuleType:
    path = Path(__file__).parents[1] / "discovery" / "zoo.py"
    spec = importlib.util.spec_from_file_location("zoo_of_families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# family: (changes to its config, whether it starts with gains of one, kinds of joint that turn)
TURNED: dict[str, tuple[dict[str, Any], bool, set[str]]] = {
    # LayerNorm, biases, transposed fused layers, learned positions, tied head
    "gpt2": ({"tie_word_embeddings": True}, True, {"residual", "value-output", "query-key"}),
    # RMSNorm gains, grouped queries, a gated MLP, half-split planes
    "llama": ({}, False, {"residual", "value-output", "query-key-rotary"}),
    # the same with biases on queries, keys and values, and a tied head
    "qwen2": ({"tie_word_embeddings": True}, True, {"residual", "value-output", "query-key-rotary"}),
    # LayerNorm, one fused layer for all heads, part of a head rotated
    "gpt_neox": ({}, False, {"residual", "value-output", "query-key-rotary"}),
    # interleaved planes on a part of a head, attention beside the MLP
    "gptj": ({}, False, {"residual", "value-output", "query-key-rotary"}),
    # gains stored as 1 + w, norms that write onto the stream, normed queries and keys
    "gemma3": ({}, True, {"residual", "value-output"}),
}


@cache
def prepared(family: str) -> tuple[nn.Module, tf.FoldedGains, dict[str, Tensor], tf.Symmetries]:
    """The family's model with folded gains, what the fold did, inputs, and the joints; found once."""
    changes, ones, _ = TURNED[family]
    model, inputs = load_zoo().build(family, **changes)
    if ones:
        _set_gains_to_one(model)
    with torch.no_grad(), WideCasts():
        before = model(**inputs).logits
        folded = tf.fold_norm_gains_(model, inputs, freeze_ones=ones)
        assert moved(model(**inputs).logits, before) < 1e-12
    return model, folded, inputs, tf.find_symmetries(model, inputs)


class Trial:
    """A copy of a family's folded model in some dtype, and its logits on inputs that it is not trained on."""

    def __init__(self, family: str, dtype: torch.dtype) -> None:
        model, folded, self.inputs, self.symmetries = prepared(family)
        self.kinds = TURNED[family][2]
        self.model, self.folded = copy.deepcopy((model, folded))
        assert self.folded.model is self.model
        self.model.to(dtype)

    def outputs(self, ids: Tensor) -> Tensor:
        # the model's own casts to float32 would hide what float64 shows
        with WideCasts() if next(self.model.parameters()).dtype == torch.float64 else _nothing():
            logits: Tensor = self.model(input_ids=ids).logits
        return logits

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.outputs(self.inputs["input_ids"].flip(1).roll(1, 0))

    def train(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            ids = self.inputs["input_ids"]
            logits = self.outputs(ids)
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()

    def adamw(self) -> torch.optim.AdamW:
        return torch.optim.AdamW([(name, p) for name, p in self.model.named_parameters() if p.requires_grad], lr=3e-3)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@torch.no_grad()
def _set_gains_to_one(model: nn.Module) -> None:
    for norm in filter(is_norm, model.modules()):
        if isinstance(norm.weight, nn.Parameter):
            norm.weight.fill_(1.0 - gain_shift(norm))


def moved(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", TURNED)
def test_training_turns_every_joint_and_no_turn_moves_the_logits(family: str, dtype: torch.dtype) -> None:
    trial = Trial(family, dtype)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    optimizer = trial.adamw()
    teleporter = tf.attach(optimizer, trial.symmetries, objective="eigenbasis", schedule=tf.Every(2))
    serving = [joint for bucket in teleporter.plan.buckets for joint in bucket.joints]
    assert {joint.kind for joint in serving} == trial.kinds
    assert sum(joint.kind != "residual" for joint in serving) == 2 * (len(trial.kinds) - 1)
    logits, weights, deviations = [], [], []

    def before(_: Any) -> None:
        logits.append(trial.logits())
        weights.append({name: p.detach().clone() for name, p in trial.model.named_parameters()})

    def after(record: tf.TeleportRecord) -> None:
        deviations.append(moved(trial.logits(), logits[-1]))
        turned = {name for joint in serving for name in joint.parameters()}
        for name, parameter in trial.model.named_parameters():
            assert (moved(parameter.detach(), weights[-1][name]) > 1e-3) == (name in turned), name

    teleporter.before_move.append(before)
    teleporter.after_move.append(after)
    start = trial.logits()
    trial.train(5, optimizer)
    assert len(deviations) == 2
    assert max(deviations) <= limit
    trained = trial.logits()
    assert moved(trained, start) > 1e-2
    # a checkpoint of the folded model is one of the same architecture; the way back to gains that train is open, too
    teleporter.detach()
    trial.folded.unfold_()
    assert moved(trial.logits(), trained) <= limit
    gains = {name: p for name, p in trial.model.named_parameters() if name in trial.folded.gains}
    for name, gain in gains.items():
        assert torch.equal(gain.detach(), trial.folded.gains[name].to(dtype))
    assert all(parameter.requires_grad for parameter in trial.model.parameters())


@pytest.mark.parametrize("family", TURNED)
def test_a_turn_that_leaves_one_tensor_behind_moves_the_logits(family: str) -> None:
    """For each joint of the first layer and the stream: its own turn is exact, and without its last tensor it is not."""
    trial = Trial(family, torch.float64)
    before = trial.logits()
    tensors = dict(trial.model.named_parameters())
    seen = set()
    for joint in trial.symmetries:
        if joint.kind not in trial.kinds or joint.kind in seen:
            continue
        seen.add(joint.kind)
        kept = {name: tensors[name].detach().clone() for name in joint.parameters()}
        noise = torch.randn(joint.heads, joint.width, joint.width, dtype=torch.float64)
        q = joint.group.orthogonal_factor(noise)  # type: ignore[attr-defined]
        trial.symmetries.apply_(trial.model, {joint.name: q})
        assert moved(trial.logits(), before) < 1e-12, joint.name
        last = [view for view in joint.views() if view.counts][-1].parameter
        tensors[last].data.copy_(kept[last])
        assert moved(trial.logits(), before) > 1e-3, joint.name
        for name, value in kept.items():
            tensors[name].data.copy_(value)
    assert seen == trial.kinds
