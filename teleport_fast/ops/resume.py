"""An in-place op over many tensors that raised half way can be called again: it goes on where it stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Cursor:
    """How many entries of an op's lists are written."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = 0


class _Local(threading.local):
    cursor: Cursor | None = None


_local = _Local()


@contextmanager
def resuming(cursor: Cursor) -> Iterator[None]:
    """The one op that is called inside skips what the cursor counts as written, and counts on."""
    before, _local.cursor = _local.cursor, cursor
    try:
        yield
    finally:
        _local.cursor = before


def unwritten(entries: Sequence[T]) -> Iterator[T]:
    """The entries that are still to be written: all of them, but for an op that is called again by `resuming`.

    >>> cursor = Cursor()
    >>> with resuming(cursor):
    ...     first = next(unwritten("ab")), cursor.done
    >>> first
    ('a', 0)
    """
    cursor = _local.cursor
    if cursor is None:
        yield from entries
        return
    for entry in entries[cursor.done :]:
        yield entry
        cursor.done += 1
