"""Griffe's extension for the API pages: a docstring's example becomes a block of code, as its author sees it."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )(?=\S| ).+\n?)*)+", re.M)


def fenced(docstring: str) -> str:
    """The docstring with each example in a fence.

    >>> print(fenced(">>> 1 + 1\\n2"))
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", docstring).rstrip("\n")


class Doctests(Extension):
    """Runs over everything that griffe reads."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Fences the examples of one docstring."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
