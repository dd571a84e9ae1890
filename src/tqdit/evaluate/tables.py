"""The numbers of an evaluation as text, from the same JSON that the report shows."""

from __future__ import annotations

import math
from typing import Any

from tqdit.evaluate.bootstrap import Measure, number
from tqdit.evaluate.names import INCEPTION_TITLES, SETS, TITLES

Facts = dict[str, Any]


def title(metric: str, facts: Facts) -> str:
    """What a metric is called with this extractor."""
    extractor = facts.get("extractor") or {}
    named = INCEPTION_TITLES.get(metric) if extractor.get("name") == "inception" else None
    return named or TITLES.get(metric, metric)


def set_title(name: str) -> str:
    return SETS.get(name, name)


def summary(facts: Facts) -> str:
    """Verdict, then one line per metric and set, then what could not be computed."""
    lines = [facts["verdict"], ""]
    metrics = list(dict.fromkeys(metric for found in facts["sets"].values() for metric in found))
    found = [(metric, set_title(name), measures[metric])
             for metric in metrics for name, measures in facts["sets"].items() if metric in measures]  # fmt: skip
    found += [(metric, "against float", entry) for metric, entry in (facts.get("paired") or {}).items()]
    for metric, of, entry in found:
        lines.append(f"{title(metric, facts):<28} {of:<20} {Measure(**entry)}   n {entry['count']}")
    for engine in facts.get("engines") or []:
        lines.append(
            f"{'engine':<28} {set_title(engine['set']):<20} {engine['precision']}, "
            f"{engine['size_mb']:.2f} MB, {engine['ms_per_image_and_step']:.2f} ms per image and step"
        )
    lines += _of_calls(facts)
    lines += [f"not computed: {title(metric, facts)} {reason}" for metric, reason in facts["not_computed"].items()]
    return "\n".join(lines)


def fewest_calls(facts: Facts) -> Facts | None:
    """Of `--calls`: the point with the fewest calls whose distance lies within the float model's own seed noise, the
    nearest of those with as many; None without one, or without distances."""
    noise = facts.get("seed_noise")
    if noise is None:
        return None
    found = [
        (point["calls"], point["frechet_distance"]["value"], index)
        for index, point in enumerate(facts["calls"])
        if point["frechet_distance"] and point["frechet_distance"]["value"] <= noise["high"]
    ]
    return facts["calls"][min(found)[-1]] if found else None


def _of_calls(facts: Facts) -> list[str]:
    """A line per sampler, spacing and number of calls, then which are enough."""
    points: list[Facts] = facts.get("calls") or []
    lines = []
    for point in sorted(points, key=lambda point: (point["calls"], point["error_median"] or math.inf)):
        parts = []
        if point["error"] is not None:
            parts += [f"error {number(point['error']['value'])}", f"median {number(point['error_median'])}"]
        if point["frechet_distance"]:
            parts.append(f"Frechet distance {number(point['frechet_distance']['value'])}")
        parts.append(f"{point['seconds']:.1f} s")
        lines.append(f"{point['calls']} calls of {point['sampler']}, {point['spacing']}: {', '.join(parts)}")
    if points and facts.get("seed_noise"):
        high, best = number(facts["seed_noise"]["high"]), fewest_calls(facts)
        lines.append(
            f"none of these has a Frechet distance within the float model's own seed noise (at most {high})"
            if best is None
            else f"the fewest calls within the float model's own seed noise (at most {high}): {best['calls']} of "
            f"{best['sampler']}, {best['spacing']}"
        )
    return lines
