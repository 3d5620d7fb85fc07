"""What a parameter group of `Rotated` may say."""

from __future__ import annotations

from typing import Any

from teleport_fast.optim.turned_step import BASES


def check_group(group: dict[str, Any]) -> None:
    """Errors: ValueError naming the value that is out of range, and the remedy."""
    lr, betas, eps, decay, rms = (group[key] for key in ("lr", "betas", "eps", "weight_decay", "match_rms"))
    if group["base"] not in BASES:
        raise ValueError(f"base must be one of {', '.join(BASES)}, got {group['base']!r}; 'adam' is the default")
    for name, value, example in (("lr", lr, 0.006), ("eps", eps, 1e-8), ("weight_decay", decay, 0.1)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}; pass a value such as {example}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}; (0.9, 0.98) is the default")
    if rms is not None and not rms > 0:
        raise ValueError(f"match_rms must be positive or None, got {rms}; 0.2 matches AdamW's usual updates")
