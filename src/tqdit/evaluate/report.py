"""One self-contained HTML page from the JSON of an evaluation: no script, font or picture from elsewhere.

`report.html.jinja` lays the page out, matplotlib draws its charts as inline SVG. Every number in a table stands in an
element whose `data-key` is its path in the JSON.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tqdit.evaluate.bootstrap import number
from tqdit.evaluate.tables import Facts, set_title, title
from tqdit.extras import need
from tqdit.files import whole_file

Images = NDArray[np.uint8]
IMAGE_WIDTH, FIGURE_WIDTH = 96, 1000  # CSS pixels: the least of one image, the most of a figure
LINES = 24  # in the chart of scales over time
GREY = "#7d8794"  # legible on white and on near-black
# Text stays text and black, which the page's style turns into its own colour; no point of a line is left out.
STYLE: dict[Any, Any] = {  # matplotlib types its keys one by one
    "svg.fonttype": "none", "svg.hashsalt": "tqdit", "path.simplify": False, "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": "black", "ytick.labelcolor": "black",
    "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.35, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


def write_report(path: Path, facts: Facts, pictures: dict[str, Images]) -> None:
    """Write the page, whole or not at all."""
    content = page(facts, pictures)
    with whole_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def page(facts: Facts, pictures: dict[str, Images]) -> str:
    """The whole document. `pictures` are uint8 (N, H, W, 3) by the name of their set."""
    need("jinja2", "evaluate", "the report")
    need("matplotlib", "evaluate", "the report")
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "number": number, "set_title": set_title, "title": lambda metric: title(metric, facts), "lines": LINES
    }  # fmt: skip
    template = importlib.resources.files("tqdit.evaluate").joinpath("report.html.jinja").read_text(encoding="utf-8")
    sets = [name for name in ("float", "subject", "samples") if name in pictures]
    return environment.from_string(template).render(
        facts=facts,
        shown=sets,
        figures=_figures([pictures[name] for name in sets]),
        metrics=list(dict.fromkeys(metric for found in facts["sets"].values() for metric in found)),
        cells=_cells(facts),
        chart_over_time=_chart_over_time(facts),
        chart_of_scales=_chart_of_scales(facts),
        charts_of_calls=_charts_of_calls(facts),
    )


def _figures(sets: Sequence[Images]) -> list[tuple[str, int]]:
    """Address and width in CSS pixels of each image; the images of a pair side by side in one."""
    figures = []
    for row in zip(*sets, strict=True):
        joined = row[0]
        for image in row[1:]:
            gap = np.full((joined.shape[0], max(1, image.shape[1] // 16), 3), 128, np.uint8)
            joined = np.concatenate([joined, gap, image], axis=1)
        figures.append((png(joined), max(IMAGE_WIDTH * len(row), min(joined.shape[1], FIGURE_WIDTH))))
    return figures


def png(image: Images) -> str:
    """A data address of one picture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cells(facts: Facts) -> dict[str, list[tuple[float, str, str]]]:
    """Of each layer and group: the error, its colour on a logarithmic scale, and a colour for text on it."""
    if not facts.get("layers"):
        return {}
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, to_hex

    errors: dict[str, list[float]] = facts["layers"]["errors"]
    positive = [value for line in errors.values() for value in line if value > 0] or [1.0]
    share, colours = LogNorm(min(positive), max(positive), clip=True), colormaps["viridis"]

    def cell(value: float) -> tuple[float, str, str]:
        at = float(share(value)) if value > 0 else 0.0
        return value, to_hex(colours(at)), "#000000" if at > 0.5 else "#ffffff"

    return {layer: [cell(value) for value in line] for layer, line in errors.items()}


def _chart_over_time(facts: Facts) -> str:
    if not facts.get("groups"):
        return ""
    x_label = "timestep (the chain runs from right to left)"
    return _chart([("", facts["timesteps"], facts["steps"])], x_label, "error of x after the step")


def _charts_of_calls(facts: Facts) -> list[tuple[str, str]]:
    """(label, chart) of error and distance against network calls, and of error against seconds; a line per method."""
    methods: dict[str, list[Facts]] = {}
    for point in facts.get("calls") or []:
        methods.setdefault(f"{point['sampler']}, {point['spacing']}", []).append(point)
    if not methods:
        return []

    def lines(x: str, y: Callable[[Facts], float]) -> list[tuple[str, Any, Any]]:
        return [(name, [p[x] for p in points], [y(p) for p in points]) for name, points in methods.items()]

    def distance(point: Facts) -> float:
        return (point["frechet_distance"] or {}).get("value") or 0.0  # zeros are left out

    def median(point: Facts) -> float:
        return point["error_median"] or 0.0

    of_distance = lines("calls", distance)
    if facts.get("seed_noise"):  # of the float model with the chain that the engine proposes
        ends = sorted({point["calls"] for point in facts["calls"]})
        for bound in ("low", "high"):
            value = facts["seed_noise"][bound]
            of_distance.append((f"float, another seed: {bound}", ends, [value] * len(ends)))
    error, calls = "same-noise error of x_0, median", "network calls of an image"
    charts = [
        (error, _chart(lines("calls", median), calls, error)),
        (f"{error}, against seconds", _chart(lines("seconds", median), "seconds, all images", error)),
        ("Frechet distance", _chart(of_distance, calls, "Frechet distance")),
    ]
    return [(label, chart) for label, chart in charts if chart]


def _chart_of_scales(facts: Facts) -> str:
    """Scales over time, each relative to its geometric mean, so that one chart shows them all."""
    lines = []
    for entry in (facts.get("scales") or [])[:LINES]:
        values = np.array(entry["scales"])
        lines.append((entry["site"], range(len(values)), values / np.exp(np.log(values).mean())))
    return _chart(lines, "group of timesteps (0 is the cleanest)", "scale / its geometric mean") if lines else ""


def _chart(lines: Sequence[tuple[str, Any, Any]], x_label: str, y_label: str) -> str:
    """Lines (name, x, y) as SVG with a logarithmic y axis; zeros are left out. '' if there is nothing but zeros."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not any(value > 0 for _, _, y in lines for value in y):
        return ""
    with matplotlib.rc_context(STYLE):
        named = sum(bool(name) for name, _, _ in lines)
        figure = Figure(figsize=(10, 3.4 + 0.09 * named), layout="constrained")
        axis = figure.subplots()
        for index, (name, x, y) in enumerate(lines):
            kept = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
            axis.plot(*zip(*kept, strict=True), label=name, linewidth=1.6, gid=f"line-{index}") if kept else None
        axis.set(yscale="log", xlabel=x_label, ylabel=y_label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if named:
            figure.legend(loc="outside lower center", ncols=2)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
