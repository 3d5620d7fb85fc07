"""The writes of a move: what can fail comes before the first of them, and from there on all are done (docs/adr/0005)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from teleport_fast.ops.resume import Cursor, resuming

# A call that raises before it has written anything, or one op over many tensors; what returns calls is replaced by them.
Write = Callable[[], Any]
TRIES = 3
_SIGNALS = tuple(int(number) for number in signal.valid_signals())
# the C function below signal's: 4 instead of 58 microseconds for all signals, since it makes no enums
_handler_of: Callable[[int], Any] = getattr(signal, "_signal", signal).getsignal


class Writes:
    """Writes in their order. One that raises is called again and goes on where it stopped; after `tries` errors in a row
    `finish` raises, and what is left can be finished later.

    >>> found, left = [], [1]
    >>> Writes([lambda: found.append(1 / len(left)), lambda: [left.clear, lambda: found.append(2)]]).finish()
    []
    >>> found
    [1.0, 2]
    """

    def __init__(self, writes: Sequence[Write] = (), tries: int = TRIES) -> None:
        self._left, self._tries = list(writes), tries
        self._cursor = Cursor()
        self._counted = False

    @property
    def begun(self) -> bool:
        """Whether anything may have been written."""
        return self._counted or self._cursor.done > 0

    def __bool__(self) -> bool:
        return bool(self._left)

    @torch.no_grad()
    def finish(self) -> list[BaseException]:
        """Do what is left; the errors that were overcome."""
        overcome: list[BaseException] = []
        tries = 0
        while self._left:
            try:
                with resuming(self._cursor):
                    more = self._left[0]()
            except BaseException as error:
                tries += 1
                if tries == self._tries:
                    raise
                overcome.append(error)
                if isinstance(error, torch.OutOfMemoryError):
                    torch.cuda.empty_cache()
                continue
            self._left[:1] = more if isinstance(more, list) else []
            self._counted |= not isinstance(more, list)
            self._cursor, tries = Cursor(), 0
        return overcome


@contextmanager
def signals_held(later: list[int] | None = None) -> Iterator[None]:
    """Python's signal handlers run after the block, or once `deliver(later)` is called.

    A signal without a handler of Python's (SIGKILL, SIGTERM by default) ends the process at once, as ever. Other threads than
    the main one never run handlers: there nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            handler = _handler_of(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        _restore(handlers)
        if later is None:
            deliver(came)
        else:
            later.extend(came)


def deliver(numbers: list[int]) -> None:
    """Let the signals that were held come now; each leaves the list first, since a handler may raise."""
    while numbers:
        number = numbers.pop(0)
        try:
            signal.raise_signal(number)
        finally:
            deliver(numbers)


def _restore(handlers: dict[int, Any]) -> None:
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except BaseException:
        _restore(handlers)
        raise
