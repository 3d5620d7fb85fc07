"""A shipped configuration of a kernel: what a compiler without a GPU needs to build it (bench/resources_triton.py)."""

from __future__ import annotations

from typing import Any, NamedTuple


class Configuration(NamedTuple):
    """A kernel with the types of its run-time arguments ("*fp32", "i64"), its constants and its launch options."""

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
