"""The command line's door: says in one line what is missing or wrong, and otherwise hands over to the verbs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

NEEDED = "the command line needs typer and rich; pip install 'teleport-fast[cli]' (or: pip install typer rich)"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m teleport_fast ARGUMENTS`, by default the process's own, and returns the exit code.

    0: done; 1: a check failed or a part is missing; 2: bad input, in one line on standard error; 130: ended by Ctrl-C
    with what was measured.

    >>> main(["train", "--steps", "0"])
    2
    """
    try:
        import rich  # noqa: F401
        import typer
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is missing: {NEEDED}", 1)
    from teleport_fast.commands import app

    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(args=given, prog_name="python -m teleport_fast", standalone_mode=False, obj=given)
    except (ValueError, ModuleNotFoundError, OSError) as error:
        return _fail(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception as error:
        # Typer's usage errors: the class has moved between click and typer, the method has not.
        if not hasattr(error, "format_message"):
            raise
        verbs = {command.callback.__name__ for command in app.registered_commands if command.callback}
        verb = f"{given[0]} " if given[0] in verbs else ""
        return _fail(f"{error.format_message()} (see: python -m teleport_fast {verb}--help)", 2)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
