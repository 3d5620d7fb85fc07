"""A mutant in the place of what is imported: code, defaults and values are exchanged, so that whoever holds a function has the mutant."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

from mutants import Mutant

CONSTANTS = (int, float, str, type(None), tuple, dict)


def install(mutant: Mutant) -> None:
    """Puts the mutant in the place of what is imported, in this process."""
    name = mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    live = importlib.import_module(name)
    made = types.ModuleType(name)
    made.__file__ = live.__file__
    code = compile(mutant.source, mutant.path, "exec", dont_inherit=True)
    was = sys.modules[name]
    sys.modules[name] = made
    try:
        exec(code, made.__dict__)
    finally:
        sys.modules[name] = was
    for key, new in made.__dict__.items():  # a constant that another module imported
        old = live.__dict__.get(key)
        if isinstance(new, CONSTANTS) and not key.startswith("__") and new != old:
            for module in [m for n, m in sys.modules.items() if n.startswith("teleport_fast") and m is not live]:
                if module.__dict__.get(key) is old:
                    setattr(module, key, new)
    exchange(live, made, live.__dict__)


def exchange(live: Any, made: Any, namespace: dict[str, Any]) -> None:
    """Gives everything that a module or class defines the code, the defaults and the values of its counterpart."""
    for key, new in list(vars(made).items()):
        old = vars(live).get(key)
        if key in ("__dict__", "__weakref__", "__doc__", "__builtins__", "__spec__", "__loader__", "__file__", "__annotations__"):
            continue
        if isinstance(new, type):
            if new.__module__ == namespace["__name__"] and isinstance(old, type):
                exchange(old, new, namespace)
            continue
        pairs = list(zip(functions(old), functions(new), strict=False))
        for before, after in pairs:
            if after.__module__ != namespace["__name__"]:
                continue
            if len(before.__code__.co_freevars) == len(after.__code__.co_freevars):
                before.__code__ = after.__code__
            elif before is old:  # a method that no longer calls super()
                setattr(live, key, types.FunctionType(after.__code__, namespace, key, after.__defaults__, after.__closure__))
            before.__defaults__, before.__kwdefaults__ = after.__defaults__, after.__kwdefaults__
        if not pairs and isinstance(new, CONSTANTS) and not key.startswith("__") and old != new:
            setattr(live, key, new)


def functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions behind a method, property, decorated or cached function."""
    if isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from functions(part)
        return
    value = getattr(value, "func", value) if type(value).__name__ == "cached_property" else getattr(value, "__func__", value)
    while hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    if isinstance(value, types.FunctionType):
        yield value
