"""The docstrings' examples of the harness run."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("additions", "interface", "optimizers", "paired", "peers.shampoo", "report", "store", "tasks")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"bench.convergence.{name}")
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
