"""The simulator's tables as Markdown, and the part of docs/scale.md that they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from bench.scale.costs import GRAD_NORM, ROTATIONS, Method, at_refresh, every_step, state
from bench.scale.machines import A100, H100
from bench.scale.shapes import MODELS, Shape
from bench.scale.simulate import GPUS, Setting, least_every, least_tokens, simulate

BEGIN, END = "<!-- written: python -m bench.scale --write -->", "<!-- /written -->"
EVERY = (3, 10, 100)
LETTERS = {"products": "p", "factorisations": "f", "memory": "m", "network": "n"}


def short(value: float) -> str:
    """Two digits, without an exponent.

    >>> short(0.00123), short(2.345), short(12345.0), short(0.0)
    ('0.0012', '2.3', '12,000', '0')
    """
    if value == 0:
        return "0"
    places = 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def methods(shape: Shape, every: Sequence[int]) -> list[tuple[str, Method]]:
    """The rows: what is said of each, and the method."""
    wide = max(4096, shape.width)
    inner = max(wide, *(side.width for matrix in shape.turned() for side in matrix.sides if side.kind == "hidden"))
    rows = [(f"`grad_norm`, k = {every[-1]}", Method(GRAD_NORM, every=every[-1]))]
    rows += [(f"exact rotations, k = {k}", Method(ROTATIONS, every=k, parts=4)) for k in every]
    rows += [(f"the same, k = {every[-1]}, `parts=16`", Method(ROTATIONS, every=every[-1], parts=16))]
    base = Method("Rotated", every=3, parts=3, max_side=wide)
    reach = "" if wide == 4096 else f", max_side={wide}"
    if reach:
        rows.append(("`Rotated()`: no stream basis, `max_side` is 4096", replace(base, max_side=4096)))
    rows.append((f"`Rotated(hidden=False{reach})`", replace(base, hidden=False)))
    rows.append((f"`Rotated({reach[2:]})`, hidden in blocks of 64", base))
    layer = replace(base, stream="layer")
    rows.append((f'`Rotated(stream="layer"{reach})`', layer))
    rows.append((f"`Rotated(hidden=True, max_side={inner})`", replace(base, hidden=True, max_side=inner)))
    rows.append(("*dealt*, `hidden=False`", replace(base, hidden=False, layout="dealt")))
    rows.append(("*dealt*, hidden in blocks of 64", replace(base, layout="dealt")))
    rows.append(("*dealt*, `hidden=True`", replace(base, hidden=True, max_side=inner, layout="dealt")))
    rows.append(('*dealt*, `stream="layer"`', replace(layer, layout="dealt")))
    return rows


def tables(shape: Shape, setting: Setting, gpus: Sequence[int] = GPUS, every: Sequence[int] = EVERY) -> str:
    """Counts, then shares of a step; letters say what most of the time goes to."""
    tokens, at = setting.tokens or shape.tokens, gpus[len(gpus) // 2]
    precision = "TF32" if setting.tf32 else "float32"
    gpu_columns = " | ".join(f"{n:,} GPUs" for n in gpus)
    lines = [
        f"### {shape.name} on {setting.machine.name}, products in {precision}",
        f"{shape.parameters / 1e9:.2f}B parameters, {shape.active / 1e9:.2f}B a token; {tokens / 2**20:.3g}M tokens a step "
        f"({shape.flops_per_token * tokens / 1e18:.3g} EFLOP). {shape.source}.",
        "",
        "| | PFLOP a step | PFLOP a refresh | state, GB | "
        f"{gpu_columns} | least k, {at:,} | tokens, {at:,} |",
        "| --- |" + " --- |" * (len(gpus) + 5),
    ]
    for name, method in methods(shape, every):
        step, refresh = every_step(shape, method), at_refresh(shape, method)
        work = [w.flops / 1e15 for w in (step, refresh)]
        shares = [simulate(shape, method, n, setting) for n in gpus]
        cells = [f"{short(100 * s.share)} % {LETTERS[s.dominant]}" + ("" if s.held <= setting.machine.holds else " †") for s in shares]
        least = least_every(shape, method, at, setting)
        needed = least_tokens(shape, method, at, setting)
        lines.append(
            f"| {name} | {short(work[0])} | {short(work[1])} | {short(state(shape, method) / 1e9)} | "
            + " | ".join(cells)
            + f" | {'none' if least is None else least} | {short(needed / 2**20)}M |"
        )
    return "\n".join(lines)


def page() -> str:
    """Every table of docs/scale.md."""
    found = [tables(shape, Setting(H100, tf32=tf32)) for shape in MODELS for tf32 in (False, True)]
    return "\n\n".join([*found, tables(MODELS[0], Setting(A100))])


def written(text: str, part: str) -> str:
    """The page with its written part replaced. Errors: ValueError where the marks are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN} and {END} once each; put them back")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END)[1]}"
