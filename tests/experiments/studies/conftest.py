"""Studies run on one thread, as the command line runs them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(same_seed_and_settings: None) -> None:
    """At these sizes a second thread only waits, and on a busy machine it waits long."""
    torch.set_num_threads(1)
