"""docs/benchmarks.md is what the committed runs say, and says where we lose."""

from __future__ import annotations

import copy
import re

from bench.page import PAGE, ROOT, beyond, load, render


def test_the_page_is_the_committed_runs() -> None:
    runs = load()
    assert PAGE.read_text() == render(runs), "docs/benchmarks.md is not what bench/recorded holds; run python -m bench.page"
    changed = copy.deepcopy(runs)
    changed["ratios"]["rows"][0]["routes"]["auto"]["speed"]["median"] *= 2
    assert PAGE.read_text() != render(changed)
    assert "No run of `python -m bench.peers` is committed yet." in render({name: run for name, run in runs.items() if name != "peers"})


def test_every_case_slower_than_torch_is_named_as_lost() -> None:
    runs = load()
    lost = render(runs).split("### Where we lose")[1].split("### All cases")[0]
    slower = [
        f"`{route}`, {row['op']} {row['dtype']} {row['size']}:"
        for row in runs["ratios"]["rows"] for route in ("auto", "cpp")
        if route in row["routes"] and row["routes"][route]["speed"]["high"] < 1
    ]
    assert all(name in lost for name in slower) and lost.count("\n- `") == len(slower)
    assert [beyond({"low": low, "median": 1.0, "high": high}) for low, high in ((1.1, 2.0), (0.5, 0.9), (0.9, 1.1))] == [1, -1, 0]


def test_pictures_and_commands_of_the_page_are_there() -> None:
    text = PAGE.read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (PAGE.parent / picture).read_bytes().startswith(b"\x89PNG"), picture
    for module in re.findall(r"python -m (bench[.\w]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
