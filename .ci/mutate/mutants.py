"""The mutants of a source file: mutmut's operators on every expression and statement that can matter, one change each.

Not generated, since no test should hold them: annotations, docstrings, imports, decorators and dataclasses' `field`, asserts (they
narrow types), aliases of types, `__all__`, what stands under TYPE_CHECKING, and the wording of errors and warnings.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

SKIPPED = (cst.Annotation, cst.Import, cst.ImportFrom, cst.Decorator, cst.Assert)
SAYS = ("_warn", "warn")


@dataclass(frozen=True)
class Mutant:
    id: str
    path: str
    function: str  # dotted name of the outermost function, "" in a class or module body
    inside: bool  # in that function's body; False: a default, an attribute of a class, a constant of the module
    lines: tuple[int, int]  # of the innermost statement (of a compound one, of its head)
    line: int
    before: str
    after: str
    source: str


class Finder(cst.CSTVisitor):
    """Collects (node, its replacements, where it stands) over a module."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.above: list[cst.CSTNode] = []
        self.found: list[tuple[cst.CSTNode, list[cst.CSTNode], list[cst.CSTNode]]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, SKIPPED) or self._is_told(node) or (isinstance(node, cst.Call) and _name(node.func) == "field"):
            return False
        new = [change for kind, operator in mutation_operators if isinstance(node, kind) for change in operator(node)]
        if new:
            self.found.append((node, new, [*self.above]))
        self.above.append(node)
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self.above and self.above[-1] is original_node:
            self.above.pop()

    def _is_told(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.SimpleStatementLine):
            (first, *_) = node.body
            if isinstance(first, cst.Expr) and isinstance(first.value, cst.SimpleString | cst.ConcatenatedString):
                return True
            if isinstance(first, cst.Assign) and not any(isinstance(a, cst.FunctionDef) for a in self.above):
                target = first.targets[0].target
                return isinstance(first.value, cst.Subscript) or (isinstance(target, cst.Name) and target.value == "__all__")
        if isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING":
            return True
        if isinstance(node, cst.BaseString):
            return any(isinstance(a, cst.Raise) or (isinstance(a, cst.Call) and _name(a.func) in SAYS) for a in self.above)
        return False


def _name(func: cst.BaseExpression) -> str:
    return func.attr.value if isinstance(func, cst.Attribute) else func.value if isinstance(func, cst.Name) else ""


def mutants(root: Path, path: str) -> list[Mutant]:
    """Every mutant of a file that parses and differs from it and from the mutants before, in the file's order."""
    text = (root / path).read_text()
    wrapper = MetadataWrapper(cst.parse_module(text))
    finder = Finder()
    wrapper.visit(finder)
    module, places = wrapper.module, wrapper.resolve(PositionProvider)
    seen, found, lines = {ast.dump(ast.parse(text))}, list[Mutant](), text.splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]
    for node, changes, above in finder.found:
        if node not in places:
            continue
        function, inside = _function(above)
        span, (first, last) = places[node], _lines([*above, node], places)
        begin, end = (starts[at.line - 1] + at.column for at in (span.start, span.end))
        for change in changes:
            # a node's place leaves out its parentheses and an operator's the spaces around it
            new = module.code_for_node(change.with_changes(lpar=[], rpar=[]) if hasattr(change, "lpar") else change).strip()
            source = text[:begin] + new + text[end:]
            try:
                tree = ast.dump(ast.parse(source))
            except SyntaxError:
                continue
            if tree in seen:
                continue
            seen.add(tree)
            before, after = " ".join(text[begin:end].split()), " ".join(new.split())
            nth = sum((m.function, m.before, m.after) == (function, before, after) for m in found)
            key = "\0".join([path, function, " ".join(lines[first - 1].split()), before, after, str(nth)])
            digest = hashlib.sha1(key.encode()).hexdigest()[:10]
            found.append(Mutant(digest, path, function, inside, (first, last), span.start.line, before, after, source))
    return found


def _function(above: list[cst.CSTNode]) -> tuple[str, bool]:
    names = []
    for i, node in enumerate(above):
        if isinstance(node, cst.ClassDef):
            names.append(node.name.value)
        elif isinstance(node, cst.FunctionDef):
            setter = any(_name(d.decorator) == "setter" for d in node.decorators)
            return ".".join([*names, node.name.value]) + ("=" if setter else ""), above[i + 1 : i + 2] == [node.body]
    return ".".join(names), False


def _lines(above: list[cst.CSTNode], places: dict) -> tuple[int, int]:
    """First and last line of the innermost statement; of an if, a loop or a function, those before its body."""
    for node in reversed(above):
        if isinstance(node, cst.SimpleStatementLine):
            return places[node].start.line, places[node].end.line
        if isinstance(node, cst.BaseCompoundStatement):
            return places[node].start.line, max(places[node].start.line, places[node.body].start.line - 1)
    raise AssertionError("a mutant outside of every statement")
