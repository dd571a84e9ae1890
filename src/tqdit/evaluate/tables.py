"""The numbers of an evaluation as text, from the same JSON that the report shows."""

from __future__ import annotations

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
    lines += [
        f"{point['calls']} calls of {point['sampler']}, {point['spacing']}: error {number(point['error']['value'])}, "
        f"median {number(point['error_median'])}, {point['seconds']:.1f} s"
        for point in sorted(facts.get("calls") or [], key=lambda point: (point["calls"], point["error_median"]))
    ]
    lines += [f"not computed: {title(metric, facts)} {reason}" for metric, reason in facts["not_computed"].items()]
    return "\n".join(lines)
