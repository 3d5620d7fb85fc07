"""Discovery runs on tiny models: one thread, since two only wait for each other."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    torch.set_num_threads(1)
