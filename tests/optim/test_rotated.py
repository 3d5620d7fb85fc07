"""Rotated: its step is the prototype's mathematics, whatever the base, the sharing of bases and the layout of heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.optim import Rotated
from teleport_fast.optim.turned_step import BASES, sinkhorn

D, HEADS, HEAD, HIDDEN = 8, 2, 4, 12
LR, TABLE_LR, BETAS, EPS, DECAY, WEIGHT_DECAY, EVERY = 0.006, 0.01, (0.9, 0.98), 1e-8, 0.95, 0.1, 3
# (rows, columns) as (heads, width), 0 heads where hidden=False leaves a side.
LAYOUT = {
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), ((HEADS, HEAD), (1, D))),
    "attention.o": ((1, D), (HEADS, HEAD)),
    "mlp.up": ((0, HIDDEN), (1, D)),
    "mlp.down": ((1, D), (0, HIDDEN)),
}


class Prototype:
    """The mathematics of the measured prototype in the return frame, one matrix, whole-side orthogonal matrices.

    B: columns are the basis. Every step C ← β C + (1 − β) G Gᵀ/‖G‖² per side, block by block; every third step
    B' R = qr(C B), first moments go along, second moments are kept; then AdamW in the basis and back.
    """

    def __init__(self, weight: Tensor, layout: tuple[tuple[int, int], tuple[int, int]], every: int = EVERY) -> None:
        self.weight, self.layout, self.every, self.step_count = weight.detach().clone(), layout, every, 0
        self.bases = [torch.eye(size, dtype=weight.dtype) for size in weight.shape]
        self.covariances = [torch.zeros_like(basis) for basis in self.bases]
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)

    def blocks(self, axis: int) -> list[slice]:
        heads, width = self.layout[axis]
        return [slice(i * width, (i + 1) * width) for i in range(heads)]

    def step(
        self, gradient: Tensor, rate: float, base: str = "adam", rms: float | None = None, nesterov: bool = False
    ) -> None:
        self.step_count += 1
        for axis, G in enumerate((gradient, gradient.T)):
            for block in self.blocks(axis):
                C = self.covariances[axis][block, block]
                C.mul_(DECAY).add_(G[block] @ G[block].T, alpha=(1 - DECAY) / float(G.square().sum()))
        if self.step_count % self.every == 0:
            raw = self.bases[0] @ self.m @ self.bases[1].T
            for axis in (0, 1):
                for block in self.blocks(axis):
                    q, r = torch.linalg.qr(self.covariances[axis][block, block] @ self.bases[axis][block, block])
                    self.bases[axis][block, block] = q * r.diagonal().sign()
            self.m = self.bases[0].T @ raw @ self.bases[1]
        turned = self.bases[0].T @ gradient @ self.bases[1]
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * turned
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * turned.square()
        m = BETAS[0] * self.m + (1 - BETAS[0]) * turned if nesterov else self.m
        # rows of row_norm and sinkhorn are those of the side with more heads
        across = self.layout[1][0] > max(1, self.layout[0][0])
        if base == "adam":
            seen = self.step_count + nesterov
            first, second = m / (1 - BETAS[0] ** seen), self.v / (1 - BETAS[1] ** self.step_count)
            U = first / (second.sqrt() + EPS)
        elif base == "sign":
            U = m.sign()
        elif base == "sinkhorn":
            U = sinkhorn(m.T).T if across else sinkhorn(m)
        else:
            U = m / (m.square().mean(0 if across else 1, keepdim=True).sqrt() + EPS)
        if rms is not None:
            U = U * rms / U.square().mean().sqrt()
        self.weight = (1 - rate * WEIGHT_DECAY) * self.weight - rate * self.bases[0] @ U @ self.bases[1].T


def made(model: nn.Module, symmetries: tf.Symmetries | None, **changes: Any) -> Rotated:
    options: dict[str, Any] = {"lr": LR, "table_lr": TABLE_LR, "weight_decay": WEIGHT_DECAY, "symmetries": symmetries}
    options |= {"hidden": False, "nesterov": False}
    return Rotated(model.named_parameters(), **{**options, **changes})


def matrices(model: GPT) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.startswith("blocks")}


def layout_of(name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    return LAYOUT[name.split(".", 2)[2].removesuffix(".weight")]


@pytest.mark.parametrize("base", BASES)
def test_a_few_steps_are_the_prototypes_mathematics_and_a_wrong_basis_is_not(
    gpt: GPT, symmetries: tf.Symmetries, loss_of: Callable[..., Tensor], base: str
) -> None:
    """In float64, the test's own derivation on the same gradients; embeddings and head against torch's AdamW.

    The control steps on the same gradients in a basis that never turns.
    """
    optimizer = made(gpt, symmetries, base=base)
    expected = {name: Prototype(p, layout_of(name)) for name, p in matrices(gpt).items()}
    unturned = {name: Prototype(p, layout_of(name), every=1000) for name, p in matrices(gpt).items()}
    start = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    others = {name: p.detach().clone().requires_grad_() for name, p in gpt.named_parameters() if name not in expected}
    adamw = torch.optim.AdamW(others.values(), lr=TABLE_LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(gpt, step).backward()
        for name, p in gpt.named_parameters():
            assert p.grad is not None
            if name in expected:
                expected[name].step(p.grad, LR, base)
                unturned[name].step(p.grad, LR, base)
            else:
                others[name].grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    for name, p in gpt.named_parameters():
        if name in others:
            torch.testing.assert_close(p.detach(), others[name].detach(), rtol=1e-12, atol=1e-14)
            continue
        state = optimizer.state[p]
        torch.testing.assert_close(state["exp_avg"], expected[name].m, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(p.detach(), expected[name].weight, rtol=1e-6, atol=1e-8)
        if base == "adam":
            torch.testing.assert_close(state["exp_avg_sq"], expected[name].v, rtol=1e-6, atol=1e-8)
        off = (unturned[name].weight - expected[name].weight).norm() / (expected[name].weight - start[name]).norm()
        # the norm of a row does not change when its columns turn, and up's rows are not turned
        if base == "row_norm" and name.endswith("up.weight"):
            assert float(off) < 1e-10
        else:
            assert float(off) > 0.05


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("match_rms", [None, 0.2])
def test_a_matrix_may_have_blocks_on_both_sides(
    gpt: GPT,
    symmetries: tf.Symmetries,
    loss_of: Callable[..., Tensor],
    base: str,
    match_rms: float | None,
    nesterov: bool,
) -> None:
    """Against the prototype, whole-side orthogonal matrices; the control has its blocks' bounds elsewhere."""
    layouts = {"attention.q": ((2, 4), (4, 2)), "mlp.up": ((3, 4), (2, 4)), "mlp.down": ((2, 4), (2, 6))}
    sides = {f"*{key}.weight": (f"heads:{rows[0]}", f"heads:{columns[0]}") for key, (rows, columns) in layouts.items()}
    optimizer = made(gpt, symmetries, base=base, sides=sides, match_rms=match_rms, nesterov=nesterov)
    weights = {key: gpt.blocks[1].get_submodule(key).weight for key in layouts}
    expected = {key: Prototype(p, layouts[key]) for key, p in weights.items()}
    wrong = {key: Prototype(p, ((1, p.shape[0]), (1, p.shape[1]))) for key, p in weights.items()}
    for step in range(7):
        optimizer.zero_grad()
        loss_of(gpt, step).backward()
        for key, p in weights.items():
            assert p.grad is not None
            expected[key].step(p.grad, LR, base, match_rms, nesterov)
            wrong[key].step(p.grad, LR, base, match_rms, nesterov)
        optimizer.step()
    for key, p in weights.items():
        torch.testing.assert_close(p.detach(), expected[key].weight, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected[key].m, rtol=1e-6, atol=1e-8)
        assert float((wrong[key].weight - expected[key].weight).abs().max()) > 1e-4


def test_a_state_from_before_there_was_nesterov_steps_without(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Callable[..., bool]
) -> None:
    optimizer, resumed = made(gpt, symmetries), copy.deepcopy(gpt)
    train(gpt, optimizer, 2)
    old, ahead = optimizer.state_dict(), made(resumed, symmetries, nesterov=True)
    old["param_groups"] = [{k: v for k, v in group.items() if k != "nesterov"} for group in old["param_groups"]]
    resumed.load_state_dict(gpt.state_dict())
    ahead.load_state_dict(old)
    for model, one in ((gpt, optimizer), (resumed, ahead)):
        train(model, one, 1, first=2)
    assert same(gpt, resumed)
    ahead.param_groups[0]["nesterov"] = True
    train(gpt, optimizer, 1, first=3)
    train(resumed, ahead, 1, first=3)
    assert not same(gpt, resumed)


def test_hidden_blocks_are_the_heads_of_an_inner_side(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], same: Callable[..., bool]
) -> None:
    """hidden=5 cuts 12 into 3 blocks of 4, as sides would; memory, and a resume to the bit, with them."""
    other, resumed = copy.deepcopy(gpt), copy.deepcopy(gpt)
    optimizer = made(gpt, symmetries, hidden=5)
    rows = {line.split()[0]: line for line in optimizer.table().splitlines()}
    assert "hidden 3 x 4" in rows["blocks.*.mlp.up.weight"] and "stream 8" in rows["blocks.*.mlp.up.weight"]
    words = {"*.up.weight": ("heads:3", "stream"), "*.down.weight": ("stream", "heads:3")}
    by_hand = made(other, symmetries, sides=words)
    train(gpt, optimizer, 5)
    train(other, by_hand, 5)
    assert same(gpt, other)
    whole = made(resumed, symmetries, hidden=True)
    assert whole.memory().bases - optimizer.memory().bases == 4 * 8 * (12 * 12 - 3 * 4 * 4)
    second = made(resumed, symmetries, hidden=5)
    resumed.load_state_dict(gpt.state_dict())
    second.load_state_dict(optimizer.state_dict())
    assert optimizer.state[gpt.blocks[0].mlp.up.weight]["rows_basis"].shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"'rows_basis' of .*up.weight' is \(3, 4, 4\) and .* \(1, 12, 12\)"):
        whole.load_state_dict(optimizer.state_dict())
    train(gpt, optimizer, 4, first=5)
    train(resumed, second, 4, first=5)
    assert same(gpt, resumed)


def test_without_a_turned_side_it_is_torchs_adamw(gpt: GPT, train: Callable[..., None]) -> None:
    other = copy.deepcopy(gpt)
    optimizer = made(gpt, None, stream="none", heads=False, table_lr=None)
    plain = torch.optim.AdamW(other.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    assert optimizer.memory().bases == 0 < made(gpt, None).memory().bases
    train(gpt, optimizer, 5)
    train(other, plain, 5)
    for one, two in zip(gpt.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stream", ["site", "layer", "model"])
def test_a_shared_basis_is_one_orthogonal_iteration_of_the_summed_covariance(
    gpt: GPT, symmetries: tf.Symmetries, loss_of: Callable[..., Tensor], stream: str
) -> None:
    optimizer = made(gpt, symmetries, stream=stream, heads=False, every=1)
    names = {
        "site": ["blocks.0.attention.q", "blocks.0.attention.k", "blocks.0.attention.v"],
        "layer": [f"blocks.0.{name}" for name in LAYOUT],
        "model": [f"blocks.{i}.{name}" for i in (0, 1) for name in LAYOUT],
    }[stream]
    loss_of(gpt, 0).backward()
    C = torch.zeros(D, D, dtype=torch.float64)
    for name in names:
        grad = gpt.get_submodule(name).weight.grad
        assert isinstance(grad, Tensor)
        G = grad if layout_of(f"{name}.weight")[0] == (1, D) else grad.T
        C += (1 - DECAY) * G @ G.T / G.square().sum()
    optimizer.step()
    owner = optimizer.state[gpt.get_submodule(names[0]).weight]
    torch.testing.assert_close(owner["columns_covariance"][0], C, rtol=1e-10, atol=1e-14)
    q, r = torch.linalg.qr(C)
    torch.testing.assert_close(owner["columns_basis"][0], (q * r.diagonal().sign()).T, rtol=1e-6, atol=1e-8)
    assert not any(key.endswith("basis") for key in optimizer.state[gpt.get_submodule(names[1]).weight])
    alone = made(gpt, symmetries, heads=False, every=1)
    alone.step()
    assert "columns_basis" in alone.state[gpt.blocks[0].attention.k.weight]
    assert float((alone.state[gpt.blocks[0].attention.q.weight]["columns_covariance"][0] - C).norm()) > 1e-3


VARIANTS: dict[str, dict[str, Any]] = {
    "fused-grouped-rotary": {"fused_qkv": True, "kv_heads": 1, "positions": "rotary"},
    "swiglu-gains-bias": {"mlp": "swiglu", "gains": True, "bias": True},
    "tied": {"tied": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_layouts_train_with_orthogonal_bases(
    variant: str, dtype: torch.dtype, train: Callable[..., None]
) -> None:
    model = GPT(GPTConfig(vocab=13, context=6, d_model=D, layers=1, heads=HEADS, hidden=HIDDEN, **VARIANTS[variant]))
    found = tf.find_symmetries(model)
    model.to(dtype)
    optimizer = made(model, found, hidden=True)
    rows = {line.split()[0]: line for line in optimizer.table().splitlines()}
    qkv = "blocks.0.attention.qkv.weight"
    if variant.startswith("fused"):
        assert "heads 4 x 4" in rows[qkv] and "stream 8" in rows[qkv]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 7)
    for p, start in zip(model.parameters(), before, strict=True):
        assert bool(p.isfinite().all()) and not torch.equal(p, start)
    bases = [value for state in optimizer.state.values() for key, value in state.items() if key.endswith("_basis")]
    assert len(bases) >= 8
    for basis in bases:
        assert basis.dtype == torch.float32
        eye = torch.eye(basis.shape[-1]).expand_as(basis)
        torch.testing.assert_close(basis @ basis.mT, eye, rtol=0, atol=2e-6)
        assert float((basis - eye).abs().max()) > 1e-3


@pytest.mark.parametrize("base", BASES)
def test_updates_are_matched_to_a_root_mean_square(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None], base: str
) -> None:
    """Turning back keeps the norm, so the weights' change has it, and without the option Adam's has another."""
    for rms in (0.2, None):
        model = copy.deepcopy(gpt)
        optimizer = made(model, symmetries, base=base, match_rms=rms, weight_decay=0.0)
        train(model, optimizer, 4)
        before = {name: p.detach().clone() for name, p in matrices(model).items()}
        train(model, optimizer, 1, first=4)
        for name, p in matrices(model).items():
            measured = float((p.detach() - before[name]).square().mean().sqrt()) / LR
            if rms is not None:
                assert measured == pytest.approx(rms, rel=1e-9)
            elif base == "adam":
                assert abs(measured - 0.2) > 0.02
            else:
                assert measured == pytest.approx(1.0, rel=1e-3)


def test_a_bucket_of_equal_shapes_steps_like_each_matrix_alone(
    gpt: GPT, symmetries: tf.Symmetries, loss_of: Callable[..., Tensor]
) -> None:
    """One optimizer for all against one per parameter, to rounding: batched products add in another order."""
    other = copy.deepcopy(gpt)
    together = made(gpt, symmetries)
    apart = [
        Rotated(
            [(name, p)],
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            hidden=False,
            nesterov=False,
            sides={name: _words(name)} if name.startswith("blocks") else None,
        )
        for name, p in other.named_parameters()
    ]
    for optimizer, (name, _) in zip(apart, other.named_parameters(), strict=True):
        optimizer.param_groups[0]["lr"] = LR if name.startswith("blocks") else TABLE_LR
    for step in range(5):
        for model, optimizers in ((gpt, [together]), (other, apart)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model, step).backward()
            for optimizer in optimizers:
                optimizer.step()
    for (name, one), two in zip(gpt.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11, msg=name)


def _words(name: str) -> tuple[str, str]:
    def word(heads: int, width: int) -> str:
        return "none" if heads == 0 else "stream" if heads == 1 else f"heads:{heads}"

    rows, columns = layout_of(name)
    return word(*rows), word(*columns)


def test_bases_in_bfloat16_take_half_the_room_and_come_close(
    gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]
) -> None:
    models = [copy.deepcopy(gpt).float() for _ in range(3)]
    dtypes = (None, torch.bfloat16, None)
    optimizers = [made(m, symmetries, basis_dtype=dtype) for m, dtype in zip(models, dtypes, strict=True)]
    assert optimizers[1].memory().bases * 2 == optimizers[0].memory().bases
    optimizers[2].param_groups[0]["rotate"] = False
    start = torch.cat([p.detach().flatten() for p in models[0].blocks.parameters()])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 6)
    steps = [torch.cat([p.detach().flatten() for p in m.blocks.parameters()]) - start for m in models]
    assert 0 < float((steps[1] - steps[0]).norm() / steps[0].norm()) < 0.1
    state = optimizers[1].state[models[1].blocks[0].mlp.up.weight]
    assert state["columns_basis"].dtype == state["columns_covariance"].dtype == torch.bfloat16


def test_hidden_sides_may_turn_more_rarely(gpt: GPT, symmetries: tf.Symmetries, train: Callable[..., None]) -> None:
    optimizer = made(gpt, symmetries, hidden=True, every=1, hidden_every=4)
    state = optimizer.state[gpt.blocks[0].mlp.up.weight]
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    for step in range(4):
        assert step == 0 or torch.equal(state["rows_basis"][0], eye)
        train(gpt, optimizer, 1, first=step)
        assert not torch.equal(state["columns_basis"][0], eye[:D, :D])
    assert not torch.equal(state["rows_basis"][0], eye)
