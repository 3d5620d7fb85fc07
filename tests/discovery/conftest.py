"""Discovery runs on tiny models: one thread, since two only wait for each other."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from teleport_fast import Symmetries, find_symmetries


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    torch.set_num_threads(1)


@cache
def load_zoo() -> ModuleType:
    """zoo.py beside this file; tests are imported by path, so that a plain import would not find it."""
    spec = importlib.util.spec_from_file_location("discovery_zoo", Path(__file__).with_name("zoo.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Found:
    """A family's model, its inputs and what find_symmetries found, with the CPU seconds that it took."""

    family: str
    model: nn.Module
    inputs: dict[str, Tensor]
    symmetries: Symmetries
    seconds: float


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    return load_zoo()


@pytest.fixture(scope="session")
def found_in(zoo: ModuleType) -> object:
    """family → Found, each searched once per session; the model must be left as it is."""
    import time

    @cache
    def find(family: str) -> Found:
        torch.set_num_threads(1)
        model, inputs = zoo.build(family)
        start = time.thread_time()
        symmetries = find_symmetries(model, inputs)
        return Found(family, model, inputs, symmetries, time.thread_time() - start)

    return find
