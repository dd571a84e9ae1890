"""What a person wants to see of a scale table: a few lines, and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tqdit.extras import need
from tqdit.files import whole_file
from tqdit.quantization.granularity import PerTimestepGroup
from tqdit.quantization.table import ScaleTable, Site

WORST = 5  # layers that the summary names


def facts(table: ScaleTable) -> list[tuple[str, object]]:
    """(name, value) pairs."""
    kinds = Counter(
        f"{'weights' if site.role == 'weight' else 'activations'} {site.quantizer.bits} bits {site.quantizer.scheme}"
        for site in table.sites
    )
    grouped = sum(isinstance(site.quantizer.granularity, PerTimestepGroup) for site in table.sites)
    worst = sorted(table.errors.items(), key=lambda item: -item[1])[:WORST]
    boundaries = ", ".join(f"{boundary:g}" for boundary in table.boundaries)
    settings = table.settings
    return [
        ("kind", "scale table"),
        ("model", f"{table.model} (fingerprint {table.fingerprint})"),
        ("quantizes", f"{len(table.sites)} tensors of {len(table.by_module)} layers"),
        *(("", f"{count} x {kind}") for kind, count in sorted(kinds.items())),
        ("time groups", f"{table.groups}, on {grouped} tensors; boundaries [{boundaries}]"),
        *_equalised(table),
        *_rewritten(table),
        ("guidance", f"calibrated at scale {table.guidance_scale}, seed {table.seed}"),
        *_placed(table),
        *([] if table.correction is None else [("correction", str(table.correction))]),
        ("method", ", ".join(str(settings[key]) for key in ("method", "metric", "fisher") if key in settings)),
        ("error", f"median {np.median(list(table.errors.values())):.2e}" if table.errors else "not recorded"),
        *(("", f"{error:.2e}  {name}") for name, error in worst),
        ("written by", ", ".join(f"{name} {version}" for name, version in table.versions.items())),
    ]


def _placed(table: ScaleTable) -> list[tuple[str, object]]:
    if table.placed is None:
        return []
    placed = table.placed
    timesteps = ", ".join(f"{timestep:g}" for timestep in placed.timesteps)
    return [
        ("placed steps", f"{len(placed.timesteps)} of {placed.sampler} at [{timesteps}]"),
        *([("full calls", f"at steps {', '.join(map(str, placed.full_calls))}")] if placed.full_calls else []),
        *(("", f"{error:.2e}  error of {placed.images} images, steps {name}") for name, error in placed.errors.items()),
    ]


def _equalised(table: ScaleTable) -> list[tuple[str, object]]:
    divisors = [site.divisor for site in table.sites if site.divisor is not None]
    divisors += [own["divisor"] for own in table.layers.values() if "divisor" in own]
    if not divisors:
        return []
    every = np.concatenate(divisors)
    reach = f"{every.min():.2g} to {every.max():.2g}"
    return [("equalised", f"inputs of {len(divisors)} layer(s), by divisors from {reach}")]


def _rewritten(table: ScaleTable) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    parts = Counter(layer for name in table.by_module for layer, _, _ in [name.rpartition(".columns.")] if layer)
    if parts:
        found.append(("columns", f"{len(parts)} layer(s), each a sum of {min(parts.values())} to {max(parts.values())} "
                                 "products of fewer input channels"))  # fmt: skip
    if rotate := table.count("rotate"):
        found.append(("rotated", f"inputs of blocks, in groups of up to {rotate} channels"))
    if ranks := [own["up"].shape[1] for own in table.layers.values() if "up" in own]:
        found.append(("branches", f"beside {len(ranks)} layer(s), of rank {min(ranks)} to {max(ranks)}, float"))
    return found


def plot(table: ScaleTable, path: Path) -> None:
    """Scales against the group of timesteps, and the error of each layer, as an image (.png, .svg, .pdf).

    A table that no search made has no errors; then the scales of each layer's weights are drawn, from least to largest.
    """
    need("matplotlib", "demo", "--plot")
    from matplotlib.figure import Figure

    grouped = [site for site in table.sites if isinstance(site.quantizer.granularity, PerTimestepGroup)]
    figure = Figure(figsize=(12 if grouped else 7, 5), layout="constrained")
    if grouped:
        scales, layers = figure.subplots(1, 2, width_ratios=(3, 2))
        _plot_groups(scales, grouped)
    else:
        layers = figure.subplots()
    if table.errors:
        names = list(table.errors)
        layers.barh(range(len(names)), [max(table.errors[name], 1e-12) for name in names])
        layers.set(title="relative error of each layer's output", xscale="log")
    else:
        weights = [site for site in table.sites if site.role == "weight"]
        names = [site.name for site in weights]
        found = [site.arrays()[site.quantizer.plotted] for site in weights]
        layers.hlines(range(len(names)), [each.min() for each in found], [each.max() for each in found], lw=4)
        layers.set(title="scales of each layer's weights, from least to largest", xlim=(0, None))
    layers.set(ylim=(max(len(names), 1) - 0.5, -0.5))
    layers.set_yticks(range(len(names)), names, fontsize=max(2, min(7, 260 / max(1, len(names)))))
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=150)


def _plot_groups(axis: Any, sites: Sequence[Site]) -> None:
    """Scales against the group of timesteps."""
    for site in sites:
        values = site.arrays()[site.quantizer.plotted]
        axis.plot(range(len(values)), values / np.exp(np.log(values).mean()), label=site.name, lw=1, alpha=0.8)
    axis.set(
        xlabel="group of timesteps (0 is the cleanest)", ylabel="scale / its geometric mean", yscale="log",
        title=f"scales of {len(sites)} time-grouped tensors",
    )  # fmt: skip
    if len(sites) <= 12:
        axis.legend(fontsize=6)
