"""Mutation score: every mutant of a module is run against the tests that reach it, in a fork of one process.

    .venv/bin/python -m pip install -r requirements/mutation.txt
    .venv/bin/python .ci/mutate [--jobs 2] [--only PATTERN] [--minutes 60] [--survivors]

torch is imported and the tests are collected once. A first fork runs all tests under coverage, which says which tests reach a line
and how long each takes; what fails without a mutant is left out. Then each mutant has a fork, in which the code of the mutated
function is exchanged and the tests that reach it run, quickest first, until one fails. Mutants come in a random order (seed 0), so
that a run cut off by --minutes is a sample of all; the next one goes on from there, as long as build/mutation is kept. --survivors
runs the survivors of the record again, with every test that reaches them. Counts and survivors go to docs/evidence/mutation.json,
where the judgement beside a survivor is written by hand and kept, and from there into the tables of docs/evidence/mutation.md;
--page does this last step alone.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a fork has one thread

import argparse
import json
import random
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # else each fork would import it
from forks import fork, passes, read_all
from install import install
from mutants import Mutant, mutants
from reach import Reach
from record import write, write_page

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["teleport_fast/symmetry/*.py", "teleport_fast/search.py", "teleport_fast/searching.py", "teleport_fast/teleporter.py"]
# What runs in the process and reaches these modules; other tests start processes or take long, and would kill little more.
TESTS = ["symmetry", "objectives", "discovery", "optim", "test_search.py", "test_searching.py", "test_teleporter.py", "test_optimizer.py"]
TESTS += ["test_state.py", "test_schedule.py", "test_atomic.py", "test_errors.py", "test_bad_input.py", "test_frames.py", "test_tracked.py"]
TESTS += ["test_scaled.py", "test_history.py", "test_plan.py", "test_bases.py", "test_checkpoint.py", "test_canonical.py"]
TESTS += ["test_conditions.py", "test_interrupted_steps.py", "test_random_sequences.py", "test_soundness.py", "test_public_api.py"]
TESTS += ["test_docs_examples.py"]
LEFT_OUT = ("test_importing_on_top_of_torch", "test_the_papers_part_is_loaded")
BUILD = ROOT / "build" / "mutation"
RECORD, PAGE = ROOT / "docs/evidence/mutation.json", ROOT / "docs/evidence/mutation.md"
WALL_SECONDS = 300  # of one mutant that waits instead of computing


class Run:
    """A pytest plugin: takes the collected tests, and runs mutants in place of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.files = [str(p.relative_to(ROOT)) for pattern in MODULES for p in sorted(ROOT.glob(pattern))]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = [item for item in session.items if not any(part in item.nodeid for part in LEFT_OUT)]
        torch.linalg.eigh(torch.eye(2) @ torch.eye(2))  # what torch does once, at its first use, is done before any fork
        self.reach = Reach(ROOT, BUILD, self.items, self.files)
        failed = [self.items[n].nodeid for n in self.reach.failed]
        print(f"{len(self.items)} tests, {sum(self.reach.seconds):.0f} s; left out, since they fail without a mutant: {failed}")
        every = [m for file in self.files for m in mutants(ROOT, file)]
        random.Random(0).shuffle(every)
        log = BUILD / "outcomes.jsonl"
        outcomes = {o["id"]: o for o in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
        survivors = {m for m, o in outcomes.items() if o["how"] == "survived"}
        wanted = [m for m in every if (m.id in survivors if self.options.survivors else m.id not in outcomes)]
        wanted = [m for m in wanted if re.search(self.options.only, f"{m.path}:{m.function}:{m.id}")]
        print(f"{len(every)} mutants, {len(wanted)} to run", flush=True)
        with log.open("a") as stream:
            for number, (mutant, outcome) in enumerate(self._all(wanted), 1):
                outcomes[mutant.id] = outcome
                print(json.dumps(outcome), file=stream, flush=True)
                if outcome["how"] == "survived":
                    print(f"{number}/{len(wanted)} survived: {mutant.path}:{mutant.line} {mutant.before} → {mutant.after}", flush=True)
        write(RECORD, every, outcomes, len(self.items))
        return True

    def _all(self, wanted: list[Mutant]) -> Iterator[tuple[Mutant, dict[str, Any]]]:
        kills: dict[str, Counter[int]] = defaultdict(Counter)
        running: dict[int, tuple[Mutant, list[int], int, float]] = {}
        waiting, until = iter(wanted), time.monotonic() + 60 * self.options.minutes
        while True:
            while len(running) < self.options.jobs and time.monotonic() < until and (mutant := next(waiting, None)):
                tests = self._affordable(self.reach.tests(mutant, kills[mutant.path + mutant.function]))
                child, reads = fork(lambda mutant=mutant, tests=tests: self._first_failure(mutant, tests))
                running[child] = (mutant, tests, reads, time.monotonic())
            if not running:
                return
            time.sleep(0.005)
            for child, (mutant, tests, reads, began) in list(running.items()):
                gone, status = os.waitpid(child, os.WNOHANG)
                if not gone:
                    if time.monotonic() - began > WALL_SECONDS:
                        os.kill(child, signal.SIGKILL)
                    continue
                del running[child]
                failed = read_all(reads)
                if failed is None:
                    by_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGKILL)
                    outcome = {"how": "timeout" if by_time else "crashed"}
                else:
                    outcome = {"how": "survived" if failed == -1 else "killed"}
                    if failed >= 0:
                        kills[mutant.path + mutant.function][failed] += 1
                        outcome["by"] = self.items[failed].nodeid
                yield mutant, {"id": mutant.id, **outcome, "tests": len(tests)}

    def _affordable(self, tests: list[int]) -> list[int]:
        """As many as the time for one mutant holds; all of them for a survivor."""
        chosen, left = [], float("inf") if self.options.survivors else self.options.seconds
        for number in tests:
            left -= self.reach.seconds[number]
            if left < 0:
                break
            chosen.append(number)
        return chosen

    def _first_failure(self, mutant: Mutant, tests: list[int]) -> int:
        """The number of the first test that fails, -1 where none does; -2 where the module can no longer be imported."""
        try:
            install(mutant)
        except BaseException:
            return -2
        for number, following in zip(tests, [*tests[1:], None], strict=True):
            after = None if following is None else self.items[following]
            if not passes(self.items[number], after, 10 + 10 * self.reach.seconds[number]):
                return number
        return -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="a pattern of file:function:id")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no mutant is begun after that")
    parser.add_argument("--seconds", type=float, default=8.0, help="of tests for one mutant")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if not options.page:
        BUILD.mkdir(parents=True, exist_ok=True)
        arguments = [str(ROOT / "tests" / name) for name in TESTS]
        pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:cov", "-p", "no:xdist", *arguments], plugins=[Run(options)])
    write_page(PAGE, json.loads(RECORD.read_text()))


if __name__ == "__main__":
    main()
