"""The bars of the ops that stream over entries: bytes a second against torch.clone, teleport_adamw_ against torch's AdamW.

python bench/ops/streaming.py [--rounds 15] [--threads 1] [--tensors 300] [--parameters 60]

All routes take turns in one run; figures are medians of the per-round ratios with their quartiles. One thread is timed
by its CPU time, which other processes disturb less than the clock on the wall. torch.clone also pays for fresh pages
from the system; copy_ into memory at hand is the harder measure.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

from teleport_fast.experiments.timing import Calls, compare, interleaved
from teleport_fast.ops import diagonal_action_, permutation_action_, square_sums, teleport_adamw_
from teleport_fast.ops.backend import set_backend

H, N = 256, 900


def weights(flat: Tensor, count: int, layout: str) -> list[Tensor]:
    """`count` weights that share the memory; where they are fewer than its size asks for, longer along the slower axis."""
    n = flat.numel() // (count * H)
    if layout == "rows":
        return list(flat.view(count, 1, -1, N))
    if layout == "columns":
        return [tensor.mT[None] for tensor in flat.view(count, n, H)]
    if layout == "heads":
        return [tensor.view(n, 4, H // 4).permute(1, 2, 0) for tensor in flat.view(count, n, H)]
    return [tensor.transpose(0, 1)[None] for tensor in flat.view(count, n // 9, H, 9)]


def bandwidth(count: int, rounds: int) -> None:
    flat = torch.randn(count * H * N)
    out = torch.empty_like(flat)
    calls: Calls = {"clone": flat.clone, "copy": lambda: out.copy_(flat)}
    layouts = ("rows", "columns", "heads", "convolution")
    for layout in layouts:
        many, one = weights(flat, count, layout), weights(flat, 1, layout)
        for kind, tensors in ((layout, many), (f"{layout}, one", one)):
            heads, h = tensors[0].shape[:2]
            s, index = torch.ones(heads, h), torch.stack([torch.randperm(h) for _ in range(heads)])
            calls[f"square_sums {kind}"] = lambda tensors=tensors: square_sums(tensors)
            calls[f"diagonal_action_ {kind}"] = lambda t=tensors, s=s: diagonal_action_(t, s, [1.0] * len(t))
            calls[f"permutation_action_ {kind}"] = lambda t=tensors, index=index: permutation_action_(t, index)
    seconds = interleaved(calls, rounds)
    clone = 1e3 * statistics.median(seconds["clone"])
    print(f"{count} tensors, {flat.numel() * 4 / 1e6:.0f} MB, {torch.get_num_threads()} thread(s); clone {clone:.1f} ms")
    print("| op, layout | bytes/s over clone's | over copy_'s | time of many over one |")
    print("| --- | --- | --- | --- |")
    for op in ("square_sums", "diagonal_action_", "permutation_action_"):
        # A sum reads every byte once, a move reads and writes it, as a copy does.
        share = 0.5 if op == "square_sums" else 1.0
        for layout in layouts:
            name = f"{op} {layout}"
            ratios = [compare(seconds, name, other, share) for other in ("clone", "copy")]
            print(f"| {name} | {ratios[0]} | {ratios[1]} | {compare(seconds, f'{name}, one', name)} |")


def adamw(count: int, rounds: int) -> None:
    parameters = [torch.nn.Parameter(torch.randn((H, N) if i % 2 else (N, H))) for i in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    optimizer.step()
    sources = [
        [parameter.detach() for parameter in parameters],
        [parameter.grad for parameter in parameters],
        [optimizer.state[parameter]["exp_avg"] for parameter in parameters],
        [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters],
    ]
    lists = [[t[None] if i % 2 else t.mT[None] for i, t in enumerate(tensors)] for tensors in sources]
    everything = [tensor for tensors in lists for tensor in tensors]
    exponents = [1.0 if i % 2 else -1.0 for i in range(count)]
    all_exponents = [sign * e for sign in (1.0, -1.0, -1.0, -2.0) for e in exponents]
    s = torch.ones(1, H)

    def apart() -> None:
        diagonal_action_(everything, s, all_exponents)
        optimizer.step()

    def apart_in_torch() -> None:
        for tensor, exponent in zip(everything, all_exponents, strict=True):
            tensor.mul_(s[..., None].pow(exponent))
        optimizer.step()

    calls: Calls = {
        "AdamW(fused=True) alone": optimizer.step,
        "teleport_adamw_": lambda: teleport_adamw_(*lists, s, exponents, step=2),
        "diagonal_action_, then AdamW": apart,
        "torch's mul_, then AdamW": apart_in_torch,
    }
    seconds = interleaved(calls, rounds)
    print(f"\n{count} parameters of {H * N} entries")
    print("| route | ms | its time over teleport_adamw_'s |")
    print("| --- | --- | --- |")
    for name in calls:
        print(f"| {name} | {1e3 * statistics.median(seconds[name]):.1f} | {compare(seconds, 'teleport_adamw_', name)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--parameters", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with set_backend("cpp"), torch.no_grad():
        bandwidth(options.tensors, options.rounds)
        adamw(options.parameters, options.rounds)


if __name__ == "__main__":
    main()
