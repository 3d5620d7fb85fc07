"""What a run of mutants found, as docs/evidence/mutation.json, and from there the tables of docs/evidence/mutation.md."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from mutants import Mutant

BEGIN, END = "<!-- written: python .ci/mutate -->", "<!-- /written -->"
NOT_JUDGED = "not judged"


def interval(part: int, whole: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, seen in `whole` of `of`; with all of them seen, the share itself."""
    if not whole:
        return 0.0, 1.0
    share, z = part / whole, 1.96 * math.sqrt((of - whole) / max(of - 1, 1))
    middle, spread = share + z * z / (2 * whole), z * math.sqrt(share * (1 - share) / whole + z * z / (4 * whole**2))
    return (middle - spread) / (1 + z * z / whole), (middle + spread) / (1 + z * z / whole)


def counts(every: list[Mutant], outcomes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    how = Counter(outcomes[m.id]["how"] for m in every if m.id in outcomes)
    ran, killed = how.total(), how.total() - how["survived"]
    low, high = interval(killed, ran, len(every))
    score = {"score": round(killed / ran, 4), "interval": [round(low, 4), round(high, 4)]} if ran else {}
    forced = {"of_these_timeouts": how["timeout"], "of_these_crashes": how["crashed"]}
    return {"mutants": len(every), "ran": ran, "killed": killed, **forced, **score}


def write(path: Path, every: list[Mutant], outcomes: dict[str, dict[str, Any]], tests: int) -> None:
    """The counts and the survivors; a judgement that stands beside a survivor of the last record is kept."""
    before = {s["id"]: s["judgement"] for s in json.loads(path.read_text())["survivors"]} if path.exists() else {}
    files = sorted({m.path for m in every})
    survivors = [
        {"id": m.id, "path": m.path, "line": m.line, "function": m.function, "before": m.before, "after": m.after,
         "tests": outcomes[m.id]["tests"], "judgement": before.get(m.id, NOT_JUDGED)}
        for m in sorted(every, key=lambda m: (m.path, m.line))
        if m.id in outcomes and outcomes[m.id]["how"] == "survived"
    ]  # fmt: skip
    record = {
        "tests": tests,
        "all": counts(every, outcomes),
        "modules": {file: counts([m for m in every if m.path == file], outcomes) for file in files},
        "survivors": survivors,
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_page(page: Path, record: dict[str, Any]) -> None:
    """Puts the tables between the page's marks."""
    text = page.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:begin] + "\n" + tables(record) + text[end:])


def tables(record: dict[str, Any]) -> str:
    lines = ["| module | mutants | run | killed | of these by time or crash | score |", "| --- | --- | --- | --- | --- | --- |"]
    for name, c in [*record["modules"].items(), ("all", record["all"])]:
        low, high = c.get("interval", (0, 0))
        share = f"{100 * c['score']:.1f} %" if c["ran"] else "-"
        share += f" ({100 * low:.1f} to {100 * high:.1f})" if 0 < c["ran"] < c["mutants"] else ""
        by_force = c["of_these_timeouts"] + c["of_these_crashes"]
        lines.append(f"| {name} | {c['mutants']} | {c['ran']} | {c['killed']} | {by_force} | {share} |")
    judged = Counter(s["judgement"].split(":")[0] for s in record["survivors"])
    lines += ["", "Survivors: " + ", ".join(f"{n} {what}" for what, n in judged.most_common()) + ".", ""]
    lines += ["| where | mutant | judgement |", "| --- | --- | --- |"]
    for s in record["survivors"]:
        where = f"{s['path'].removeprefix('teleport_fast/')}:{s['line']}"
        lines.append(f"| {where} | {_code(s['before'])} → {_code(s['after'])} | {s['judgement']} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"`` {text if len(text) < 90 else text[:60] + ' … ' + text[-25:]} ``"
