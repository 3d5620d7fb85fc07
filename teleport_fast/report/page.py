"""The page: what a run's folder holds, in sections of words, plots and tables, through one template that escapes it all."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from teleport_fast.experiments.picture import COLOURS
from teleport_fast.report import plots
from teleport_fast.report.read import Found, History, RunRead, mappings, number, numbers, text

MOST_RECORDS = 200


@dataclass(frozen=True)
class Table:
    """A header, rows of text, and what stands on the line that opens it; an empty `opens` shows it at once."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    opens: str = ""
    words: int = 1


@dataclass
class Section:
    """A heading with its anchor, words, plots with their captions, tables."""

    anchor: str
    title: str
    words: list[str] = field(default_factory=list)
    figures: list[tuple[Markup, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: str = ""

    def is_empty(self) -> bool:
        return not (self.words or self.figures or self.tables or self.code)


def shown(value: Any, form: str = ".4g") -> str:
    """A number in this form, a list of mean and standard deviation as "mean ± sd"; – for what is none.

    >>> shown(2.1273), shown([2.1273, 0.0084], ".3f"), shown([1.5, None], ".1f"), shown(None)
    ('2.127', '2.127 ± 0.008', '1.5', '–')
    """
    parts = numbers(value) if isinstance(value, list) else (number(value),)
    finite = [format(part, form) for part in parts[:2] if math.isfinite(part)]
    return " ± ".join(finite) if finite and math.isfinite(parts[0]) else "–"


def render(found: Found) -> str:
    """The whole page as HTML: no script, no style, font or picture from outside. Text from the run is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    everything = [*_compared(found), *_swept(found), *_histories(found), settings(found), reproduce(found)]
    return environment.get_template("page.html").render(
        title=f"{found.folder.resolve().name}: teleport_fast run",
        heading=_heading(found),
        notes=notes(found),
        cards=cards(found),
        sections=[section for section in everything if not section.is_empty()],
    )


def _heading(found: Found) -> str:
    setting = mappings([(found.comparison or found.sweep).get("setting")])
    model = mappings([setting[0].get("model")]) if setting else []
    if not model:
        return f"Teleports in {found.folder.resolve().name}"
    size = f"{text(model[0].get('layers'))} layers, width {text(model[0].get('d_model'))}"
    work = f"{text(setting[0].get('steps'))} steps of {text(setting[0].get('batch'))} × {text(model[0].get('context'))} bytes"
    return f"Byte-level GPT, {size}: {work}"


def notes(found: Found) -> list[tuple[str, str]]:
    """(level, sentence): whether the function was kept, and whatever makes the run less than what was asked for."""
    told = []
    moved = max((value for run in found.runs for value in run.deviations if math.isfinite(value)), default=math.nan)
    if found.comparison.get("function_kept") is True and math.isfinite(moved):
        told.append(("good", f"The function was checked at every teleport: the logits moved by {moved:.1e} of their norm at most."))
    if found.comparison.get("function_kept") is False:
        told.append(("bad", f"A teleport moved the function: its logits moved by {shown(moved, '.1e')} of their norm."))
    if found.comparison.get("interrupted") is True or found.sweep.get("interrupted") is True:
        told.append(("warn", "Interrupted: the page shows what was measured until then."))
    told += [("warn", f"{run.arm}, seed {run.seed}: diverged after {len(run.losses)} steps.") for run in found.runs if run.diverged]
    skipped = found.comparison.get("skipped")
    told += [("warn", f"Left out: {text(line)}") for line in (skipped if isinstance(skipped, list) else [])]
    told += [("warn", f"Not read: {name} ({why}).") for name, why in found.left_out]
    return told


def cards(found: Found) -> list[dict[str, str]]:
    """An arm each: its name, colour, final loss, and what it gained on the baseline."""
    colour = plots.colours(found.arms())
    baseline = text(found.comparison.get("baseline"))
    made = []
    for row in mappings(found.comparison.get("summary")):
        arm = text(row.get("arm"))
        note = f"learning rate {shown(row.get('rate'))}, seeds: {shown(row.get('seeds'), '.0f')}; the baseline"
        if arm != baseline:
            reached = f"its loss after {shown(row.get('reach'), '.0f')} steps" if number(row.get("reached")) > 0 else "its loss not reached"
            note = f"{_gained(numbers(row.get('gain')), baseline)}; {reached}"
        loss = shown(row.get("loss"), ".3f") if math.isfinite(_mean(row.get("loss"))) else "diverged"
        made.append({"name": arm, "value": loss, "note": note, "colour": colour.get(arm, "#000000")})
    return made


def _gained(gain: Sequence[float], baseline: str) -> str:
    if not gain or not math.isfinite(gain[0]):
        return f"not paired with {baseline}"
    side = "below" if gain[0] >= 0 else "above"
    return f"{shown([abs(gain[0]), *gain[1:]], '.3f')} {side} {baseline}"


def _compared(found: Found) -> list[Section]:
    if not found.runs:
        return []
    first = Section("curves", "Loss curves")
    drawn = plots.curves(found)
    if drawn:
        first.figures.append((drawn, ""))
    first.tables.append(summary(found))
    moves, bases, joints = Section("teleports", "Teleports"), Section("spectra", "Spectra"), Section("joints", "Joints")
    colour, told = plots.colours(found.arms()), []
    for index, arm in enumerate(found.arms()):
        of = [run for run in found.runs if run.arm == arm]
        run = next((run for run in of if run.history.records), of[0] if of else None)
        if run is None:
            continue
        _add_teleports(moves, run.history, run.deviations, f"teleports-{index}", colour[arm])
        if run.teleports and not run.history.records:
            told.append(f"{arm}: {len(run.teleports)} teleports; this run did not record their objective.")
        drawn = plots.spectra(run, f"spectra-{index}")
        if drawn:
            bases.figures.append((drawn, f"{arm}, seed {run.seed}"))
        if run.joints:
            joints.tables.append(_joint_table(run))
    moves.words += told
    if bases.figures:
        bases.words.append(
            "P = gᵀg of a joint's last move: log P is 0 for a rotation. A basis is the eigenbasis where the diagonal of the gradient "
            "covariance lies on its eigenvalues. Each curve is one joint, all its heads, divided by the trace."
        )
    if joints.tables:
        joints.words.append(
            "A joint is a hidden space that some tensors write and others read; dim is its number of continuous symmetric dimensions, "
            "proof the outputs' relative deviation under a random element of its group when it was found. P: its eigenvalues in the last "
            "move. Diagonal: the diagonal's share of the gradient covariance's squared norm, 1 in an eigenbasis."
        )
    return [first, moves, bases, joints]


def _add_teleports(section: Section, history: History, deviations: Sequence[float], name: str, colour: str) -> None:
    drawn = plots.teleports(history, deviations, name, colour)
    if drawn:
        section.figures.append((drawn, f"{history.name}: {len(history.records)} teleports"))
        section.tables.append(_record_table(history))


def _record_table(history: History) -> Table:
    header = ("step", "objective before", "after", "radius used", "joints", "ms", "condition of g")
    rows = [
        (
            shown(record["step"], ".0f"),
            shown(record["objective_before"], ".6g"),
            shown(record["objective_after"], ".6g"),
            shown(record["radius_used"]),
            shown(record["joints"], ".0f"),
            shown(1e3 * record["seconds"], ".2f"),
            shown(record["condition"]),
        )
        for record in history.records[:MOST_RECORDS]
    ]
    hidden = len(history.records) - len(rows)
    return Table(header, rows, f"{history.name}: every teleport" + (f" but the last {hidden}" if hidden else ""), words=0)


def _joint_table(run: RunRead) -> Table:
    header = ("joint", "kind", "group", "heads × width", "dim", "proof", "moves", "‖g − I‖, first and last", "P, last", "diagonal", "left out")
    rows = []
    for row in run.joints:
        distance, powers = numbers(row.get("distance")), numbers(row.get("log_p"))
        held = mappings([row.get("covariance")])
        p = f"{shown(_exp(powers[-1]), '.2g')} to {shown(_exp(powers[0]), '.2g')}" if powers else "–"
        rows.append(
            (
                text(row.get("name")),
                text(row.get("kind")),
                text(row.get("group")),
                f"{shown(row.get('heads'), '.0f')} × {shown(row.get('width'), '.0f')}",
                shown(row.get("dim"), ",.0f"),
                shown(row.get("deviation"), ".0e"),
                shown(row.get("moves"), ".0f"),
                ", ".join(shown(value, ".2f") for value in distance) or "–",
                p,
                shown(held[0].get("share"), ".3f") if held else "–",
                text(row.get("why_not")),
            )
        )
    return Table(header, rows, f"{run.arm}, seed {run.seed}: {len(rows)} rows", words=3)


def summary(found: Found) -> Table:
    """The comparison's own table, an arm a row."""
    base = text(found.comparison.get("baseline"))
    header = (
        "arm", "learning rate", "seeds", "validation loss", f"below {base}", "steps to its loss", "ms a step", "overhead, %", "teleports",
        "logits moved",
    )  # fmt: skip
    rows = []
    for row in mappings(found.comparison.get("summary")):
        of_base, moved = text(row.get("arm")) == base, number(row.get("teleports")) > 0
        rows.append(
            (
                text(row.get("arm")),
                shown(row.get("rate")),
                shown(row.get("seeds"), ".0f"),
                shown(row.get("loss"), ".4f"),
                "" if of_base else shown(row.get("gain"), ".4f"),
                "" if of_base else shown(row.get("reach"), ".0f"),
                shown(row.get("step_ms"), ".1f"),
                "" if of_base else shown(row.get("overhead_percent"), "+.1f"),
                "" if of_base else shown(row.get("teleports"), ".0f"),
                "" if of_base else shown(row.get("max_deviation") if moved else None, ".1e"),
            )
        )
    return Table(header, rows)


def _swept(found: Found) -> list[Section]:
    section = Section("sweep", "Learning rates")
    drawn = plots.sweep(found.sweep)
    if drawn:
        section.figures.append((drawn, ""))
    rates = found.sweep.get("rates", {})
    rows = [
        (str(arm), shown(best.get("rate")), shown(best.get("loss"), ".4f"), "yes" if best.get("at_edge") is True else "no")
        for arm, best in rates.items()
        if isinstance(best, dict)
    ]
    if rows:
        section.tables.append(Table(("arm", "best learning rate", "validation loss", "at the grid's edge"), rows))
    return [section]


def _histories(found: Found) -> list[Section]:
    section = Section("histories", "Histories")
    for index, history in enumerate(found.histories):
        _add_teleports(section, history, (), f"history-{index}", COLOURS[(index + 1) % len(COLOURS)])
    return [section]


def settings(found: Found) -> Section:
    """What was run, on what, with which versions: every scalar of the JSON's setting, text and versions."""
    section, source = Section("settings", "Settings"), found.comparison or found.sweep
    for key, title in (("setting", "Training and model"), ("text", "Text"), ("versions", "Versions and machine")):
        rows = list(_flat(source.get(key)))
        if rows:
            section.tables.append(Table(("", title), rows))
    return section


def reproduce(found: Found) -> Section:
    """The commands that make the run and the page again."""
    command = text(found.comparison.get("command")) or text(found.sweep.get("command"))
    again = f"python -m teleport_fast report {shlex.quote(str(found.folder))}"
    section = Section("reproduce", "Measure again", code="\n".join(line for line in (command, again) if line))
    if command:
        section.words.append("From a checkout of the version named above; weights and batches follow from the seeds, times do not.")
    return section


def _flat(value: Any, prefix: str = "") -> Sequence[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return []
    rows: list[tuple[str, str]] = []
    for key, entry in value.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(entry, dict):
            rows += _flat(entry, f"{name}: ")
        elif entry is not None:
            rows.append((name, {True: "yes", False: "no"}[entry] if isinstance(entry, bool) else text(entry)))
    return rows


def _mean(value: Any) -> float:
    return numbers(value)[0] if numbers(value) else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
