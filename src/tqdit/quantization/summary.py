"""What a person wants to see of a scale table: a few lines, and a picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tqdit.extras import need
from tqdit.files import whole_file
from tqdit.quantization.table import PerTimestepGroup, ScaleTable, Site, TwoRegionSoftmax

WORST = 5  # layers that the summary names


def facts(table: ScaleTable) -> list[tuple[str, object]]:
    """(name, value) pairs."""
    kinds = Counter(
        f"{'weights' if site.role == 'weight' else 'activations'} {site.quantizer.bits} bits {site.quantizer.scheme}"
        for site in table.sites
    )
    grouped = sum(isinstance(site.quantizer.granularity, PerTimestepGroup) for site in table.sites)
    worst = sorted(table.errors.items(), key=lambda item: -item[1])[:WORST]
    settings = table.settings
    return [
        ("kind", "scale table"),
        ("model", f"{table.model} (fingerprint {table.fingerprint})"),
        ("quantizes", f"{len(table.sites)} tensors of {len(table.by_module)} layers"),
        *(("", f"{count} x {kind}") for kind, count in sorted(kinds.items())),
        ("time groups", f"{table.groups}, on {grouped} tensors; boundaries {table.boundaries.tolist()}"),
        *_equalised(table),
        ("guidance", f"calibrated at scale {table.guidance_scale}, seed {table.seed}"),
        ("method", ", ".join(str(settings[key]) for key in ("method", "metric", "fisher") if key in settings)),
        ("error", f"median {np.median(list(table.errors.values())):.2e}" if table.errors else "not recorded"),
        *(("", f"{error:.2e}  {name}") for name, error in worst),
        ("written by", ", ".join(f"{name} {version}" for name, version in table.versions.items())),
    ]


def _equalised(table: ScaleTable) -> list[tuple[str, object]]:
    divisors = [site.divisor for site in table.sites if site.divisor is not None]
    if not divisors:
        return []
    every = np.concatenate(divisors)
    reach = f"{every.min():.2g} to {every.max():.2g}"
    return [("equalised", f"inputs of {len(divisors)} layer(s), by divisors from {reach}")]


def plot(table: ScaleTable, path: Path) -> None:
    """Step sizes against the group of timesteps, and the error of each layer, as an image (.png, .svg, .pdf)."""
    need("matplotlib", "demo", "--plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    steps, errors = figure.subplots(1, 2, width_ratios=(3, 2))
    grouped = [site for site in table.sites if isinstance(site.quantizer.granularity, PerTimestepGroup)]
    for site in grouped:
        values = _steps(site)
        steps.plot(range(len(values)), values / np.exp(np.log(values).mean()), label=site.name, lw=1, alpha=0.8)
    steps.set(
        xlabel="group of timesteps (0 is the cleanest)", ylabel="step / its geometric mean", yscale="log",
        title=f"steps of {len(grouped)} time-grouped tensors",
    )  # fmt: skip
    if 0 < len(grouped) <= 12:
        steps.legend(fontsize=6)
    names = list(table.errors)
    errors.barh(range(len(names)), [max(table.errors[name], 1e-12) for name in names])
    errors.set(xscale="log", title="relative error of each layer's output", ylim=(len(names) - 0.5, -0.5))
    errors.set_yticks(range(len(names)), names, fontsize=max(2, min(7, 260 / max(1, len(names)))))
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=150)


def _steps(site: Site) -> NDArray[np.float32]:
    """The step that varies: the low step after softmax, the positive one after GELU, else the only one."""
    arrays = site.arrays()
    if isinstance(site.quantizer, TwoRegionSoftmax):
        return arrays["low_step"]
    return arrays["positive_step"] if "positive_step" in arrays else arrays["scale"]
