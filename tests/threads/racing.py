"""Under ThreadSanitizer, by .ci/sanitize: every C++ op on several threads, and from several threads at once, reports no race, and each
of them does where two threads are made to do the same work.

    python tests/threads/racing.py LOG_PATH [quick]     # log_path as in TSAN_OPTIONS
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from calls import CALLS, DTYPES, ON_ONE_THREAD, Call, call
from torch import Tensor

import teleport_fast as tf

AT_ONCE = 2  # each of them with four threads of its own
# one stack is reported once: what the race of another op has shown, and what writes its tensors in code that all instruction sets share
ANOTHERS_CODE = ("activation_action_tangent", "matrix_exp_pair")
ONE_CODE = ("permutation_action_", "orthogonal_iteration_")
QUICK = [(torch.float32, False), (torch.bfloat16, True)]


def instruction_sets() -> list[str]:
    before, found = torch.ops.teleport_fast_cpp.isa(), []
    for isa in ("default", "avx2", "avx512"):
        try:
            found.append(torch.ops.teleport_fast_cpp.isa(isa))
        except RuntimeError:
            continue
    torch.ops.teleport_fast_cpp.isa(before)
    return found


def at_once(calls: Sequence[Call]) -> list[list[Tensor]]:
    """Each call's results, each from a thread of its own."""
    results: list[list[Tensor]] = [[] for _ in calls]
    start = threading.Barrier(len(calls))

    def work(i: int) -> None:
        with tf.set_backend("cpp"):
            start.wait()
            results[i] = calls[i].results()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


class Log:
    """What ThreadSanitizer has reported since it was last asked."""

    def __init__(self, path: str) -> None:
        self._path, self._read = Path(f"{path}.{os.getpid()}"), 0

    def new(self) -> str:
        if not self._path.exists():
            return ""
        text = self._path.read_text(encoding="utf-8", errors="replace")
        found, self._read = text[self._read :], len(text)
        return found


def silent(log: Log, kinds: Sequence[tuple[torch.dtype, bool]]) -> int:
    """Every op in these dtypes and layouts; how many calls there were."""
    count = 0
    for name in CALLS:
        for dtype, columns in kinds:
            alone = [call(name, dtype, columns, seed).results() for seed in range(AT_ONCE)]
            together = at_once([call(name, dtype, columns, seed) for seed in range(AT_ONCE)])
            count += 2 * AT_ONCE
            if not all(map(same, together, alone)):
                sys.exit(f"racing: {name} in {dtype} gives another result from several threads at once")
            if report := log.new():
                sys.exit(f"racing: {name} in {dtype}, columns {columns}\n{report[:4000]}")
    return count


def shared_matrices(log: Log) -> None:
    """One g, read by all threads; and one op's instruction set, switched while it is asked for."""
    stop = threading.Event()
    g = call("group_action_").read
    isa = torch.ops.teleport_fast_cpp.isa
    name = isa()

    def switch() -> None:
        while not stop.is_set():
            isa(name)

    switching = threading.Thread(target=switch)
    switching.start()
    calls = [call("group_action_", seed=seed) for seed in range(AT_ONCE)]
    for one in calls:
        for own, shared in zip(one.read, g, strict=True):
            own.set_(shared)
    at_once(calls)
    stop.set()
    switching.join()
    if report := log.new():
        sys.exit(f"racing: shared matrices\n{report[:4000]}")


def reported(calls: Sequence[Call], log: Log) -> bool:
    """Whether a race is reported: of one call, or of several callers, which by chance may come one after the other."""
    if len(calls) == 1:
        calls[0].run()
        return "data race" in log.new()
    return any("data race" in log.new() for _ in range(100) if at_once(calls))


def unseen(log: Log, first: bool) -> tuple[int, list[str]]:
    """The control on one instruction set: how many races were made, and those that were not reported."""
    others = ON_ONE_THREAD + ANOTHERS_CODE + (() if first else ONE_CODE)
    names = [name for name in CALLS if "," not in name and name not in others]
    os.environ["TELEPORT_FAST_RACE"] = "1"
    missed = [name for name in names if not reported([call(name)], log)]
    os.environ["TELEPORT_FAST_RACE"] = "0"
    one = call("diagonal_action_", torch.float64)
    if not reported([one, one], log):
        missed.append("diagonal_action_ of one tensor by two callers")
    return len(names) + 1, missed


def main() -> None:
    log = Log(sys.argv[1])
    torch.set_num_threads(1)
    with tf.set_backend("cpp"):
        sets = instruction_sets()
        count = 0
        for isa in sets:
            torch.ops.teleport_fast_cpp.isa(isa)
            count += silent(log, QUICK if "quick" in sys.argv[2:] else [*itertools.product(DTYPES, (False, True))])
        shared_matrices(log)
        made = 0
        for isa in sets:
            torch.ops.teleport_fast_cpp.isa(isa)
            races, missed = unseen(log, isa == sets[0])
            made += races
            if missed:
                sys.exit(f"racing: with {isa}, no report of the race that was made in {', '.join(missed)}")
    print(f"{count} calls without a race ({', '.join(sets)}), and a report of each of the {made} that were made")


if __name__ == "__main__":
    main()
