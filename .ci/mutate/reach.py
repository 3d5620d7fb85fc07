"""Which tests reach a line, and how long each takes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import coverage
import pytest
from forks import fork, passes, read_all
from mutants import Mutant


def shared(item: pytest.Item) -> tuple[str, ...]:
    """The fixtures of an item that outlive one test, with the parameter where they have one."""
    found, parameters = [], getattr(getattr(item, "callspec", None), "indices", {})
    for name, (*_, definition) in item._fixtureinfo.name2fixturedefs.items():  # type: ignore[attr-defined]
        if definition.scope != "function" and definition.baseid:
            found.append(f"{definition.baseid}:{name}:{parameters.get(name, '')}")
    return tuple(sorted(found))


class Reach:
    """Measured in a fork and kept while the sources stay; tests that are new are measured alone."""

    def __init__(self, root: Path, build: Path, items: list[pytest.Item], files: list[str]) -> None:
        self.root, self.items, self.files = root, items, files
        names, kept = [item.nodeid for item in items], build / "reach.json"
        sources = hashlib.sha1(b"".join((root / file).read_bytes() for file in files)).hexdigest()
        known = json.loads(kept.read_text()) if kept.exists() else {}
        if known.get("sources") != sources:
            known = {"sources": sources, "tests": [], "seconds": [], "failed": [], "lines": {file: {} for file in files}}
        new = [n for n, name in enumerate(names) if name not in set(known["tests"])]
        if new:
            child, reads = fork(lambda: self._measure(new))
            seconds, failed, lines = read_all(reads)
            os.waitpid(child, 0)
            shift = len(known["tests"])
            known["tests"] += [names[n] for n in new]
            known["seconds"] += seconds
            known["failed"] += [shift + n for n in failed]
            for file in files:
                for line, numbers in lines[file].items():
                    known["lines"][file].setdefault(line, []).extend(shift + n for n in numbers)
            kept.write_text(json.dumps(known))
        place = {name: n for n, name in enumerate(names)}
        now = [place.get(name) for name in known["tests"]]
        self.seconds = [0.0] * len(names)
        for n, seconds in zip(now, known["seconds"], strict=True):
            if n is not None:
                self.seconds[n] = seconds
        self.failed = {now[n] for n in known["failed"]} - {None}
        self.lines = {f: {int(i): {now[n] for n in ns} - {None} for i, ns in table.items()} for f, table in known["lines"].items()}

    def _measure(self, chosen: list[int]) -> Any:
        """CPU seconds of each test, the numbers of those that fail, and per file and line the numbers of those that reach it."""
        measured = coverage.Coverage(data_file=None, include=[str(self.root / file) for file in self.files], config_file=False)
        items = [self.items[n] for n in chosen]
        seconds, failed = [], []
        owners: dict[str, list[int]] = defaultdict(list)
        measured.start()
        for number, (item, following) in enumerate(zip(items, [*items[1:], None], strict=True)):
            measured.switch_context(str(number))
            began = time.process_time()
            if not passes(item, following, 600):
                failed.append(number)
            seconds.append(round(time.process_time() - began, 4))
            for fixture in shared(item):
                owners[fixture].append(number)
        measured.stop()
        # a fixture that many share is made in the first one's name: what reaches a line in it, all of them do
        others: dict[int, set[int]] = defaultdict(set)
        for mine in owners.values():
            others[mine[0]].update(mine)
        lines = {}
        for file in self.files:
            contexts = measured.get_data().contexts_by_lineno(str(self.root / file))
            reached = {line: {int(n) for n in names if n} for line, names in contexts.items()}
            lines[file] = {line: sorted(ns.union(*(others[n] for n in ns if n in others))) for line, ns in reached.items()}
        return seconds, failed, lines

    def tests(self, mutant: Mutant, kills: Counter[int]) -> list[int]:
        """Those that reach the mutant: what killed its neighbours, then the file of the same name, then the rest, quickest first."""
        table = self.lines[mutant.path]
        reached = set[int]().union(*(table.get(line, set()) for line in range(mutant.lines[0], mutant.lines[1] + 1)))
        if not mutant.inside:  # read when the module was imported: whoever reaches the module
            reached = set[int]().union(*table.values())
        reached -= self.failed
        first, own = [number for number, _ in kills.most_common(6) if number in reached], f"/test_{Path(mutant.path).name}"
        return first + sorted(reached - set(first), key=lambda n: (own not in self.items[n].nodeid, shared(self.items[n]), self.seconds[n]))
