"""Runs checks in real torch.distributed processes: `python tests/distributed/ranks.py NAME...` prints one JSON line per check.

A check is a function in a `checks_*.py` of this folder under `@on(2, 4)`: it runs on so many ranks, and fails where it raises on
one of them. torch is loaded once and the ranks are forked, since loading it costs more than all checks; a group of ranks
runs one check after another, and after a failure a fresh group goes on with the rest.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

HERE = Path(__file__).parent
# A check that takes longer hangs: its ranks are stopped, and it fails.
SECONDS = float(os.environ.get("RANKS_SECONDS", "240"))
CHECKS: dict[str, tuple[int, Callable[[], None]]] = {}


def on(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a check for these numbers of ranks; its names are the function's and the number."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        for world in worlds:
            CHECKS[f"{function.__name__}-{world}"] = (world, function)
        return function

    return register


def load(files: list[str] | None = None) -> dict[str, tuple[int, Callable[[], None]]]:
    """All checks, by name, or those of these files; the modules that hold them find this one as `ranks`."""
    sys.modules.setdefault("ranks", sys.modules[__name__])
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    for path in sorted(HERE.glob("checks_*.py")) if files is None else map(Path, files):
        sys.path.insert(0, str(path.parent))
        importlib.import_module(path.stem)
    return CHECKS


def _work(rank: int, world: int, names: list[str], folder: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
    )
    for name in names:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            CHECKS[name][1]()
        except BaseException:
            pipe.send((name, traceback.format_exc(), time.perf_counter() - start))
            os._exit(1)  # the others are waiting for this rank: its end wakes them up
        pipe.send((name, None, time.perf_counter() - start))
    os._exit(0)


def run_group(world: int, names: list[str]) -> dict[str, tuple[str | None, float]]:
    """Outcomes {name: (traceback or None, seconds)} of the checks that this group came to; the last one may have failed."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends, ranks = {}, []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(rank, world, names, folder, there), daemon=True)
            process.start()
            there.close()
            ends[here], _ = rank, ranks.append(process)
        heard: dict[str, dict[int, tuple[str | None, float]]] = {}
        last = time.monotonic()
        while ends and time.monotonic() - last < SECONDS:
            for end in wait(list(ends), timeout=1.0):
                try:
                    name, problem, seconds = end.recv()  # type: ignore[union-attr]
                    heard.setdefault(name, {})[ends[end]] = (problem, seconds)  # type: ignore[index]
                    last = time.monotonic()
                except EOFError:
                    del ends[end]  # type: ignore[arg-type]
        hangs = bool(ends)
        for process in ranks:
            process.kill()
            process.join()
    outcomes: dict[str, tuple[str | None, float]] = {}
    for name in names:
        of_ranks = heard.get(name, {})
        problems = [f"rank {rank} of {world}:\n{problem}" for rank, (problem, _) in sorted(of_ranks.items()) if problem]
        if len(of_ranks) < world and not problems:
            problems = [f"only ranks {sorted(of_ranks)} of {world} came to an end" + (", the others hang" if hangs else "")]
        outcomes[name] = ("\n".join(problems) or None, max((seconds for _, seconds in of_ranks.values()), default=0.0))
        if problems:
            break
    return outcomes


def outcomes_of(chosen: list[str], *modules: Path) -> dict[str, str | None]:
    """What went wrong with each of these checks, None where nothing did, from one process that forks the ranks."""
    command = [sys.executable, "-P", str(HERE / "ranks.py"), *map(str, modules), *chosen]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800)
    found: dict[str, str | None] = dict.fromkeys(chosen, f"the check was not run\n{done.stderr[-4000:]}")
    for line in done.stdout.splitlines():
        if line.startswith('{"name"'):
            outcome = json.loads(line)
            found[outcome["name"]] = outcome["problem"]
    return found


def main(wanted: list[str]) -> int:
    files = [word for word in wanted if word.endswith(".py")]
    load(files or None)
    wanted = [word for word in wanted if word not in files]
    for module in {CHECKS[name][1].__module__ for name in wanted or CHECKS}:
        getattr(sys.modules[module], "prepare", lambda: None)()  # what all ranks need is made once, before they are forked
    names = wanted or list(CHECKS)
    failed = 0
    for world in sorted({CHECKS[name][0] for name in names}):
        left = [name for name in names if CHECKS[name][0] == world]
        while left:
            outcomes = run_group(world, left)
            for name, (problem, seconds) in outcomes.items():
                print(json.dumps({"name": name, "problem": problem, "seconds": round(seconds, 3)}), flush=True)
                failed += problem is not None
            left = left[len(outcomes) :]
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(min(main(sys.argv[1:]), 1))
