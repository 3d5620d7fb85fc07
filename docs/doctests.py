"""Griffe's extension for the API pages: a docstring's example becomes a block of code, what it says of an argument a paragraph."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )(?=\S| ).+\n?)*)+", re.M)


def fenced(docstring: str) -> str:
    """The docstring with each example in a fence.

    >>> fenced(">>> 1 + 1\\n2").splitlines()
    ['```pycon', '>>> 1 + 1', '2', '```']
    """
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", docstring).rstrip("\n")


def paragraphs(docstring: str, names: list[str]) -> str:
    """The docstring with a paragraph for each argument, the errors and the source, which it runs together.

    >>> print(paragraphs("Adds. x: a number. y: another one.\\nErrors: none.", ["x", "y"]))
    Adds.
    <BLANKLINE>
    **x**: a number.
    <BLANKLINE>
    **y**: another one.
    <BLANKLINE>
    **Errors**: none.
    """
    # longer names first; a clause begins a line or follows the end of one, and may be about several arguments
    one = "|".join(re.escape(name) for name in sorted([*names, "Returns", "Errors", "Source", "Related"], key=len, reverse=True))
    clause = re.compile(rf"(?:(?<=[.;)]) |\n)({one})((?:, (?:{one}))*):(?= )")
    return clause.sub(lambda found: f"\n\n**{found[1]}{found[2]}**:", docstring)


class Doctests(Extension):
    """Runs over everything that griffe reads."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """One docstring."""
        if obj.docstring:
            names = [parameter.name for parameter in getattr(obj, "parameters", ())]
            obj.docstring.value = fenced(paragraphs(obj.docstring.value, names))
