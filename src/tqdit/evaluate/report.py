"""One self-contained HTML page from the JSON of an evaluation: no script, no font, no picture from elsewhere.

Every number in a table stands in an element whose `data-key` is its path in the JSON, so that a test can compare them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tqdit.evaluate.bootstrap import number
from tqdit.evaluate.tables import Facts, set_title, title
from tqdit.files import whole_file

Images = NDArray[np.uint8]
SHOWN_WIDTH = 96  # CSS pixels of one image in a pair
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5b6570; --line: #d5dae0; --page: #ffffff; --mark: #0b63c5; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --soft: #9aa5b1; --line: #3a424c; --page: #14181d; --mark: #6db1ff; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; line-height: 1.45; } h2 { font-size: 1.05rem; margin-top: 2.2rem; }
p, li { color: var(--soft); } table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n { font-variant-numeric: tabular-nums; } small { color: var(--soft); }
.pairs { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; } figcaption { font-size: .8rem;
  color: var(--soft); } img { display: block; image-rendering: pixelated; } .wide { overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--soft); } svg .grid { stroke: var(--line); }
"""
LINES = ("#0b7bd0", "#d1495b", "#2a9d5c", "#c77d0a", "#7b5cc4", "#00979d")  # legible on white and on near-black


def write_report(path: Path, facts: Facts, pictures: dict[str, Images]) -> None:
    """Write the page, whole or not at all."""
    content = page(facts, pictures)
    with whole_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def page(facts: Facts, pictures: dict[str, Images]) -> str:
    """The whole document."""
    parts = [
        _pairs(facts, pictures), _metrics(facts), _paired(facts), _over_time(facts), _layers(facts), _steps(facts),
        _engines(facts), _diagnosis(facts), _settings(facts),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>TQDiT evaluation</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{STYLE}</style></head><body>\n<h1 data-key="verdict">{escape(facts["verdict"])}</h1>\n'
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def png(image: Images) -> str:
    """A data address of one picture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pairs(facts: Facts, pictures: dict[str, Images]) -> str:
    """Each pair as one picture: float on the left, this engine on the right."""
    if not pictures:
        return ""
    sides = [pictures[name] for name in ("float", "subject", "samples") if name in pictures]
    names = [set_title(name) for name in ("float", "subject", "samples") if name in pictures]
    gap = np.full((sides[0].shape[1], max(1, sides[0].shape[2] // 16), 3), 128, np.uint8)
    figures = []
    for index, row in enumerate(zip(*sides, strict=True)):
        joined = row[0] if len(row) == 1 else np.concatenate([row[0], gap, row[1]], axis=1)
        width = max(SHOWN_WIDTH * len(row), joined.shape[1] if joined.shape[1] < 1000 else 1000)
        figures.append(
            f'<figure><img src="{png(joined)}" width="{width}" alt="image {index}: {" | ".join(names)}">'
            f"<figcaption>image {index}</figcaption></figure>"
        )
    what = "Pairs of the same noise and class" if len(sides) == 2 else "Images"
    return f'<h2>{what}: {" | ".join(names)}</h2>\n<div class="pairs">{"".join(figures)}</div>'


def _number(key: str, value: float | None) -> str:
    """One number with its place in the JSON."""
    return f'<span data-key="{escape(key)}">{"none" if value is None else escape(number(value))}</span>'


def _measure(key: str, entry: Facts) -> str:
    """Value, interval and count."""
    text = _number(f"{key}.value", entry["value"])
    if entry["low"] is not None and entry["high"] is not None:
        text += f" <small>({_number(f'{key}.low', entry['low'])} to {_number(f'{key}.high', entry['high'])})</small>"
    return text


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f'<td class="n">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _metrics(facts: Facts) -> str:
    """One row per metric, one column per set."""
    sets = facts["sets"]
    names = list(dict.fromkeys(metric for found in sets.values() for metric in found))
    missing = "".join(
        f"<li>{escape(title(metric, facts))}: {escape(reason)}</li>" for metric, reason in facts["not_computed"].items()
    )
    text = "<h2>Metrics</h2>\n"
    if facts["reference"] is not None:
        extractor = facts["extractor"]
        text += (
            f"<p>Against {escape(facts['reference']['name'])}, features of {escape(extractor['name'])} "
            f"({extractor['features']}; weights {escape(extractor['weights'])}). 95 % intervals in brackets. A Frechet "
            "distance is biased by the number of samples: compare columns, which have the same number.</p>"
        )
    if names:
        rows = [
            [escape(title(metric, facts))]
            + [
                _measure(f"sets.{name}.{metric}", found[metric]) if metric in found else ""
                for name, found in sets.items()
            ]
            + [escape(next(found[metric]["interval"] for found in sets.values() if metric in found))]
            for metric in names
        ]
        heads = [f"{set_title(name)} (n {_count(found)})" for name, found in sets.items()]
        text += _table(["", *heads, "interval"], rows)
    return text + (f"<p>Not computed:</p><ul>{missing}</ul>" if missing else "")


def _count(found: Facts) -> int:
    return int(next(iter(found.values()))["count"]) if found else 0


def _paired(facts: Facts) -> str:
    if not facts.get("paired"):
        return ""
    rows = [
        [escape(title(name, facts)), _measure(f"paired.{name}", entry), str(entry["count"]), escape(entry["interval"])]
        for name, entry in facts["paired"].items()
    ]
    return (
        "<h2>Same noise: this engine against float</h2>\n<p>Errors are squared and relative to the energy of the float "
        "image.</p>" + _table(["", "", "n", "interval"], rows)
    )


def _over_time(facts: Facts) -> str:
    """Error of the state per group, as a table and as a line over the timesteps."""
    if not facts.get("groups"):
        return ""
    rows = [
        [
            str(group["group"]), f"{group['last_timestep']} to {group['first_timestep']}",
            _measure(f"groups.{index}.error", group["error"]),
            _number(f"groups.{index}.signal_to_error_db", group["signal_to_error_db"]),
        ]
        for index, group in enumerate(facts["groups"])
    ]  # fmt: skip
    chart = _line_chart([("", facts["timesteps"], facts["steps"])], "timestep (the chain runs from right to left)",
                        "error of x after the step")  # fmt: skip
    return (
        "<h2>Error along the chain, by group of timesteps</h2>\n" + chart
        + _table(["group", "timesteps", "error of x", "signal to error, dB"], rows)
    )  # fmt: skip


def _layers(facts: Facts) -> str:
    """Heat map: a row per layer, a column per group."""
    if not facts.get("layers"):
        return ""
    errors: dict[str, list[float]] = facts["layers"]["errors"]
    values = np.array(list(errors.values()))
    positive = values[values > 0]
    low, high = (math.log10(float(edge)) for edge in (positive.min(), positive.max())) if len(positive) else (-6.0, 0.0)
    cell, height, left, top = 46, 15, 260, 22
    columns = values.shape[1]
    shapes = [
        f'<text x="{left + column * cell + cell / 2:.0f}" y="14" text-anchor="middle">{column}</text>'
        for column in range(columns)
    ]
    for row, (name, line) in enumerate(errors.items()):
        y = top + row * height
        shapes.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(line):
            share = 0.0 if value <= 0 else (math.log10(value) - low) / max(high - low, 1e-9)
            shapes.append(
                f'<rect x="{left + column * cell}" y="{y}" width="{cell - 1}" height="{height - 1}" '
                f'fill="{_heat(share)}" data-key="layers.errors.{escape(name)}.{column}">'
                f"<title>{escape(name)}, group {column}: "
                f"{number(value)}</title></rect>"
            )
        worst = max(line)
        shapes.append(f'<text x="{left + columns * cell + 6}" y="{y + 11}">{number(worst)}</text>')
    width, total = left + columns * cell + 80, top + len(errors) * height + 34
    legend = [
        f'<rect x="{left + step * 12}" y="{total - 26}" width="12" height="10" fill="{_heat(step / 19)}"/>'
        for step in range(20)
    ]
    legend.append(f'<text x="{left - 6}" y="{total - 17}" text-anchor="end">{10**low:.1e}</text>')
    legend.append(f'<text x="{left + 246}" y="{total - 17}">{10**high:.1e}, logarithmic</text>')
    return (
        "<h2>Error that each layer adds, by group of timesteps</h2>\n<p>Relative squared error of a layer's "
        "output where its input is the float model's. Group 0 holds the cleanest timesteps; the number on the right is "
        "that of the worst group.</p>" + _svg(width, total, "".join(shapes + legend), "heat map of layer errors")
    )


def _heat(share: float) -> str:
    """Dark blue to yellow, both visible on light and dark pages."""
    stops = np.array([(38, 70, 120), (60, 130, 160), (120, 175, 120), (230, 190, 60), (220, 80, 50)], float)
    at = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(at), len(stops) - 2)
    red, green, blue = (stops[index] + (at - index) * (stops[index + 1] - stops[index])).round().astype(int)
    return f"rgb({red},{green},{blue})"


def _steps(facts: Facts) -> str:
    """Step sizes over time, each relative to its mean, so that one picture holds them all."""
    held = facts.get("scale_steps") or []
    if not held:
        return ""
    lines = []
    for entry in held:
        values = np.array(entry["steps"])
        lines.append((entry["site"], list(range(len(values))), (values / np.exp(np.log(values).mean())).tolist()))
    chart = _line_chart(lines[:24], "group of timesteps (0 is the cleanest)", "step / its geometric mean")
    rest = f" The first 24 of {len(lines)} are shown." if len(lines) > 24 else ""
    return f"<h2>Step sizes over time</h2>\n<p>Tensors with one step per group of timesteps.{rest}</p>" + chart


def _engines(facts: Facts) -> str:
    engines = facts.get("engines") or []
    if not engines:
        return ""
    rows = [
        [
            escape(set_title(engine["set"])), escape(engine["name"]),
            escape(f"{engine['backend']}, {engine['precision']}"),
            _number(f"engines.{index}.size_mb", engine["size_mb"]),
            _number(f"engines.{index}.ms_per_image_and_step", engine["ms_per_image_and_step"]),
            str(engine["batch"]), escape(engine["audit"] or ""),
        ]
        for index, engine in enumerate(engines)
    ]  # fmt: skip
    head = ["", "engine", "backend", "MB", "ms per image and step", "batch", "audit"]
    return (
        "<h2>Engines</h2>\n<p>Time as it was while these images were sampled, one run: not a benchmark.</p>"
        + _table(head, rows)
    )


def _diagnosis(facts: Facts) -> str:
    found = facts.get("diagnosis")
    if not found:
        return ""
    sites = [
        [escape(f"{site['layer']}.{site['role']}"), _number(f"diagnosis.sites.{index}.gain", site["gain"]),
         f'{_number(f"diagnosis.sites.{index}.low", site["low"])} to '
         f'{_number(f"diagnosis.sites.{index}.high", site["high"])}']
        for index, site in enumerate(found["sites"][:20])
    ]  # fmt: skip
    mended = [
        [escape(remedy["layer"]), escape(", ".join(f"{key} {value}" for key, value in remedy["change"].items())),
         _number(f"diagnosis.remedies.{index}.gain", remedy["gain"]),
         f'{_number(f"diagnosis.remedies.{index}.low", remedy["low"])} to '
         f'{_number(f"diagnosis.remedies.{index}.high", remedy["high"])}',
         _number(f"diagnosis.remedies.{index}.cost", remedy["cost"]),
         _number(f"diagnosis.remedies.{index}.gain_per_cost", remedy["gain_per_cost"])]
        for index, remedy in enumerate(found["remedies"])
    ]  # fmt: skip
    return (
        "<h2>Diagnosis</h2>\n<p>Share of the step-weighted error of the predicted noise "
        f"({_number('diagnosis.error', found['error'])} over {found['rows']} calibration rows) that goes when one "
        "tensor stays in float:</p>" + _table(["tensor", "gain", "95 %"], sites)
        + "<p>What would mend the worst layers. Cost: extra bit operations, as a share of the model's.</p>"
        + _table(["layer", "change", "gain", "95 %", "cost", "gain per cost"], mended)
    )  # fmt: skip


def _settings(facts: Facts) -> str:
    rows = [
        [escape(f"{part}: {name}"), escape(str(value))]
        for part in ("subject", "settings", "machine", "versions")
        for name, value in (facts.get(part) or {}).items()
    ]
    return "<h2>Settings and versions</h2>\n" + _table(["", ""], rows)


# drawing -----------------------------------------------------------------------------------------------------------


def _svg(width: float, height: float, content: str, label: str) -> str:
    return (
        f'<div class="wide"><svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{escape(label)}">{content}</svg></div>'
    )


def _line_chart(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], x_title: str, y_title: str) -> str:
    """Lines (name, x, y) with a logarithmic y axis; zeros are left out."""
    points = [[(x, y) for x, y in zip(xs, ys, strict=True) if y > 0] for _, xs, ys in lines]
    flat = [point for line in points for point in line]
    if not flat:
        return "<p>No error at all.</p>"
    width, height, left, bottom, right, top = 760, 260, 70, 36, 20, 12
    x_low, x_high = min(x for x, _ in flat), max(x for x, _ in flat)
    y_low, y_high = (math.log10(edge(y for _, y in flat)) for edge in (min, max))
    y_low, y_high = (y_low - 0.05, y_high + 0.05) if y_high - y_low < 0.1 else (y_low, y_high)

    def place(x: float, y: float) -> str:
        across = left + (x - x_low) / max(x_high - x_low, 1e-9) * (width - left - right)
        return f"{across:.1f},{top + (y_high - math.log10(y)) / (y_high - y_low) * (height - top - bottom):.1f}"

    shapes = []
    for tick in np.linspace(y_low, y_high, 5):
        y = top + (y_high - tick) / (y_high - y_low) * (height - top - bottom)
        shapes.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(10 ** float(tick))}</text>')
    few = x_high - x_low <= 20  # groups: whole numbers
    for tick in np.arange(x_low, x_high + 1) if few else np.linspace(x_low, x_high, 6):
        x = left + (tick - x_low) / max(x_high - x_low, 1e-9) * (width - left - right)
        shapes.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:.3g}</text>')
    for index, line in enumerate(points):
        path = " ".join(place(x, y) for x, y in line)
        shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{LINES[index % len(LINES)]}" stroke-width="1.6">'
            f"<title>{escape(lines[index][0])}</title></polyline>"
        )
    shapes.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">{escape(x_title)}</text>'
    )
    label = f"{y_title} against {x_title}"
    key = "".join(
        f'<li style="color:{LINES[index % len(LINES)]}">{escape(name)}</li>'
        for index, (name, _, _) in enumerate(lines)
        if name
    )
    return (
        f"<p>{escape(y_title)}</p>" + _svg(width, height, "".join(shapes), label) + (f"<ul>{key}</ul>" if key else "")
    )


def look_up(facts: Any, key: str) -> Any:
    """The value of a `data-key` in the JSON. Layer and set names hold dots and commas, so the longest name wins."""
    if not key:
        return facts
    if isinstance(facts, list):
        head, _, rest = key.partition(".")
        return look_up(facts[int(head)], rest)
    for name in sorted(facts, key=len, reverse=True):
        if key == name or key.startswith(f"{name}."):
            return look_up(facts[name], key[len(name) + 1 :])
    raise KeyError(key)
