"""Warnings that are said once: a training loop would repeat them at every step."""

from __future__ import annotations

import warnings


class WarnOnce:
    """Warns with RuntimeWarning, the first time that a message comes."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"teleport_fast: {message}", RuntimeWarning, stacklevel=4)
