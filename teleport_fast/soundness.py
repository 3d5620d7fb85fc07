"""What an element must be to move anything: finite and well conditioned; and the objective's memory if it is not."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from teleport_fast.objectives.base import Objective
from teleport_fast.symmetry.bucket import Bucket, Element, Split


def usual_bound(dtype: torch.dtype) -> float:
    """1/√eps of the arithmetic: a move by a g of this condition number changes the function by about √eps at most.

    >>> round(usual_bound(torch.float32)), round(usual_bound(torch.bfloat16))
    (2896, 2896)
    """
    return 1 / math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).eps)


def check_bound(max_condition: object) -> None:
    """Raise ValueError unless it is None or a number above 1."""
    number = isinstance(max_condition, (int, float)) and not isinstance(max_condition, bool)
    if max_condition is not None and not (number and max_condition > 1):  # type: ignore[operator]
        raise ValueError(f"max_condition must be a number above 1 or None, got {max_condition!r}; None is 1/√eps, 2896 in float32")


def refusal(bucket: Bucket, element: Element | Split, max_condition: float) -> str | None:
    """Why the element may not be used, by the first joint that it would spoil; None if it may."""
    if bool(element.finite()):
        if math.isinf(max_condition) or element.form != "dense":
            return None
        condition = element.conditions()
        largest = float(condition.amax()) if condition.numel() else 1.0
        if largest <= max_condition:
            return None
        name = bucket.joints[int(condition.argmax()) // bucket.heads].name
        return f"joint {name!r}: the search gave an element of condition number {largest:.2g}, max_condition is {max_condition:.2g}"
    sides = (element.plus, element.minus) if isinstance(element, Split) else (element,)
    for side in sides:
        good = [bool(row.isfinite().all()) and (side.form != "diagonal" or bool((row != 0).all())) for row in side.g]
        if not all(good):
            name = bucket.joints[good.index(False) // bucket.heads].name
            return f"joint {name!r}: the search gave a non-finite element"
    return f"joint {bucket.joints[0].name!r}: the search gave a non-finite element"


def remembered(objective: Objective) -> dict[str, Any]:
    """The objective's attributes, its dictionaries, sets and lists copied: `element` replaces what it remembers in them."""
    return {key: copy.copy(value) if isinstance(value, (dict, set, list)) else value for key, value in vars(objective).items()}


def restore(objective: Objective, memory: dict[str, Any]) -> None:
    vars(objective).clear()
    vars(objective).update(memory)
