"""Figures as inline SVG: text stays text, ids are the figure's own, nothing refers to anything outside."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET  # nosec B405: it reads what matplotlib has just written
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
INK, GRID = "#3d4451", "#e3e6eb"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "teleport_fast",
    # names of arms and joints are text, whatever dollars they hold
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ad",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Any]:
    """An empty matplotlib Figure in the page's style, which holds while it is drawn into."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def inline(drawn: Any, name: str, label: str) -> Markup:
    """The figure as an <svg> element for HTML; `name` goes before its ids, `label` is what a screen reader says."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None})
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(buffer.getvalue())  # nosec B314: written by matplotlib just now
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("id", f"{name}-plot")
    return Markup(ET.tostring(root, encoding="unicode"))  # nosec B704: text in it is escaped by the serializer
