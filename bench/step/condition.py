"""What a move by an ill-conditioned g costs in accuracy: logits of a byte GPT before and after, over condition numbers.

    python bench/step/condition.py [--seeds 5] [--json]

Every value-output and query-key joint of the GPT moves by g = U diag(s) Vᵀ with random orthogonal U, V and log s spread evenly over
the condition number; the figure is ‖logits after − before‖/‖before‖, the median and the largest over the seeds. The default of
`max_condition` is 1/√eps of the arithmetic, where the bound on that figure, eps times the condition number, is √eps.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

import teleport_fast as tf
from teleport_fast.experiments.gpt import GPT, GPTConfig
from teleport_fast.soundness import usual_bound
from teleport_fast.symmetry import GeneralLinear

CONDITIONS = {torch.float32: (1.0, 10.0, 1e2, 1e3, 1e4, 1e5, 1e6), torch.float64: (1.0, 1e2, 1e4, 1e6, 1e8, 1e10)}


def element(heads: int, width: int, condition: float, generator: torch.Generator) -> torch.Tensor:
    """(heads, h, h) of this condition number, |det g| = 1, float64."""
    u, v = (torch.linalg.qr(torch.randn(heads, width, width, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    s = torch.linspace(0.5, -0.5, width, dtype=torch.float64).mul(torch.log(torch.tensor(condition, dtype=torch.float64))).exp()
    return (u * s) @ v


def moved(dtype: torch.dtype, condition: float, seed: int) -> float:
    """How far the logits move, of their norm."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(vocab=64, d_model=64, layers=2, heads=4, context=16)).to(dtype)
    tokens = torch.randint(64, (4, 16), generator=generator)
    dense = tf.find_symmetries(model, verify=False).select(lambda joint: isinstance(joint.group, GeneralLinear))
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh GPT's last projections are zero
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        before = model(tokens).double()
        dense.apply_(model, {joint.name: element(joint.heads, joint.width, condition, generator).to(dtype) for joint in dense})
        return float((model(tokens).double() - before).norm() / before.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype, conditions in CONDITIONS.items():
        for condition in conditions:
            found = [moved(dtype, condition, seed) for seed in range(options.seeds)]
            rows.append({"dtype": str(dtype), "condition": condition, "median": statistics.median(found), "largest": max(found)})
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("dtype          condition   logits moved, median   largest   eps x condition")
    for row, dtype in ((row, getattr(torch, str(row["dtype"]).removeprefix("torch."))) for row in rows):
        bound = torch.finfo(dtype).eps * float(str(row["condition"]))
        print(f"{row['dtype']:14} {row['condition']:9.0e} {row['median']:22.1e} {row['largest']:9.1e} {bound:17.1e}")
    print("max_condition by default:", ", ".join(f"{usual_bound(dtype):.3g} in {dtype}" for dtype in CONDITIONS))


if __name__ == "__main__":
    main()
