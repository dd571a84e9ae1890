"""The columns of each layer by evolution (`--column-search N`): Q-DiT's search over group sizes, arXiv 2406.17343.

A genome has a choice of columns for each layer. Its error is that of the network with weights rounded to nearest and
inputs that find their scales while it runs, on a few calibration rows: no chain and no search of scales. The mean of
the columns over the layers has a lower bound, which bounds the work that scaling and adding the parts' results take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from tqdit.calibration.config import QuantizationConfig, wholes
from tqdit.calibration.cost import Meter
from tqdit.calibration.end_to_end import EndToEnd
from tqdit.calibration.layers import LayerPlan, plan
from tqdit.calibration.methods import weights
from tqdit.calibration.rows import CalibrationRows
from tqdit.calibration.work import WorkFolder
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.models.columns import block_widths, narrow, part_widths
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.schemes import find_schemes
from tqdit.quantization.table import ScaleTable

PAPERS_MEAN = 128
EPOCHS = 10  # of 500 evaluations, by 50 genomes each; with N evaluations there are sqrt(5 N) genomes an epoch
PARENTS = 0.2  # of an epoch's genomes; each epoch follows from the best of all so far
MUTATED = 0.1  # of the layers of a mutated genome
TRIES = 100  # to make a genome that is new
FILE = "columns"  # in the work folder

Genome = tuple[int, ...]  # a position among the choices of each layer


@dataclass(frozen=True)
class ColumnSpace:
    """choices: columns of each layer, in increasing order; least: bound of the mean of their columns."""

    choices: dict[str, tuple[int, ...]]
    widths: dict[str, int]
    least: float

    def columns(self, genome: Genome) -> dict[str, int]:
        return {name: self.choices[name][at] for name, at in zip(self.choices, genome, strict=True)}

    def mean(self, genome: Genome) -> float:
        """Of the columns of a part, over the layers."""
        parts = (width / len(part_widths(width, self.columns(genome)[name])) for name, width in self.widths.items())
        return math.fsum(parts) / len(genome)

    @property
    def largest(self) -> Genome:
        return tuple(len(choices) - 1 for choices in self.choices.values())

    @property
    def uniform(self) -> Genome:
        """The least columns that are not below the bound in any layer, if a layer has such."""
        return tuple(
            next((at for at, columns in enumerate(choices) if columns >= self.least), len(choices) - 1)
            for choices in self.choices.values()
        )

    def random(self, rng: np.random.Generator) -> Genome:
        return tuple(int(rng.integers(len(choices))) for choices in self.choices.values())

    def cross(self, rng: np.random.Generator, one: Genome, other: Genome) -> Genome:
        """Each layer's choice from either of them."""
        return tuple(a if rng.random() < 0.5 else b for a, b in zip(one, other, strict=True))

    def mutate(self, rng: np.random.Generator, genome: Genome) -> Genome:
        """Some layers' choices made anew."""
        return tuple(b if rng.random() < MUTATED else a for a, b in zip(genome, self.random(rng), strict=True))

    def repair(self, rng: np.random.Generator, genome: Genome) -> Genome:
        """With wider columns in layers at random, until the mean is not below the bound."""
        largest = self.largest
        while self.mean(genome) < self.least:
            at = int(rng.choice([at for at, most in enumerate(largest) if genome[at] < most]))
            genome = (*genome[:at], genome[at] + 1, *genome[at + 1 :])
        return genome


def space(model: LoadedModel, plans: Iterable[LayerPlan], config: QuantizationConfig) -> ColumnSpace | None:
    """What there is to choose, None if nothing. Raises UsageError for settings that a search cannot work with.

    plans: of the network with the columns that the overrides give; those layers are not part of it.
    """
    if config.columns:
        raise UsageError("--columns gives all layers the same columns, --column-search each its own. Pass one of them.")
    try:
        sizes = sorted({int(text) for text in config.column_sizes.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise UsageError(f"--column-sizes is '{config.column_sizes}'; expected whole numbers >= 1 such as 32,64,128.")
    for entry in plans:
        schemes = {operand.scheme for role, operand in entry.operands.items() if role == "input"}
        if any(find_schemes()[scheme].tensors for scheme in schemes):
            raise UsageError(
                f"--column-search tries networks without calibrated scales; the input of '{entry.name}' has scheme "
                f"'{min(schemes)}'. Pass --inputs dynamic_asymmetric --gelu uniform."
            )
    widths = {
        name: width for name, width in block_widths(model).items() if not set(wholes(name)) & set(config.layer_columns)
    }
    if not widths:
        return None
    choices = {name: _choices(width, sizes) for name, width in widths.items()}
    whole = math.fsum(widths.values()) / len(widths)
    found = ColumnSpace(
        choices, widths, min(PAPERS_MEAN, whole / 2) if config.mean_columns is None else config.mean_columns
    )
    if found.mean(found.largest) < found.least:
        raise UsageError(
            f"--column-sizes {config.column_sizes} give layers of this network {found.mean(found.largest):g} columns "
            f"in the mean at most; --mean-columns is {found.least:g}. Pass larger sizes or a smaller mean."
        )
    return found


def _choices(width: int, sizes: list[int]) -> tuple[int, ...]:
    """Different widths of a layer's parts, in increasing order."""
    return tuple(sorted({part_widths(width, size)[0] for size in sizes}))


def evolve(space: ColumnSpace, count: int, seed: int, score: Callable[[Genome], float]) -> Genome:
    """The genome with the least score of up to `count`, each scored once. The same scores give the same genomes."""
    rng = np.random.default_rng([seed, 3])
    each = max(2, round(math.sqrt(count * 50 / EPOCHS)))
    scores: dict[Genome, float] = {}

    def visit(number: int, make: Callable[[], Genome]) -> bool:
        """Score up to `number` new genomes; whether there were any."""
        before = len(scores)
        for _ in range(min(number, count - before)):
            tried = (space.repair(rng, make()) for _ in range(TRIES))
            new = next((genome for genome in tried if genome not in scores), None)
            if new is not None:
                scores[new] = score(new)
        return len(scores) > before

    visit(1, lambda: space.uniform)
    visit(each - 1, lambda: space.random(rng))
    found = True
    while found and len(scores) < count:
        best = sorted(scores, key=lambda genome: scores[genome])[: max(2, round(PARENTS * each))]

        def parent(best: list[Genome] = best) -> Genome:
            return best[int(rng.integers(len(best)))]

        crossed = visit(each // 2, lambda: space.cross(rng, parent(), parent()))
        found = visit(each - each // 2, lambda: space.mutate(rng, parent())) or crossed
    return min(scores, key=lambda genome: scores[genome])


class Objective:
    """The error of a genome, of a network with four scales tried for each channel of a weight."""

    def __init__(self, model: LoadedModel, config: QuantizationConfig, rows: CalibrationRows, meter: Meter) -> None:
        self.model, self.boundaries = model, rows.boundaries.cpu().numpy()
        self.config = replace(config, attention=False, equalize="none", alpha=0.7, beta=1.0, candidates=4)
        self.end_to_end = EndToEnd(model, config, rows, meter, "columns", config.column_objective == "step")

    def error(self, columns: dict[str, int]) -> float:
        """Of the network with these columns of its layers."""
        config = self.config.with_layer_knobs((name, {"columns": count}) for name, count in columns.items())
        model = narrow(self.model, 0, config.layer_columns)
        sites = tuple(weights.sites(model, plan(model, config), config))
        settings = {"layer_columns": config.layer_columns}
        table = ScaleTable(model.source, model.fingerprint, self.boundaries, sites, config.seed, 1.0, settings)
        return self.end_to_end.error(table)


def run(
    space: ColumnSpace, config: QuantizationConfig, objective: Objective, folder: WorkFolder, console: Console
) -> QuantizationConfig:
    """The settings with the columns that were found. What was evaluated is kept in `folder`."""
    kept = folder.load_or_none(FILE)
    known = (
        {} if kept is None else dict(zip(map(tuple, kept["genomes"].tolist()), kept["scores"].tolist(), strict=True))
    )
    with console.bar(config.column_search, "columns of each layer", "networks") as bar:

        def score(genome: Genome) -> float:
            if genome not in known:
                known[genome] = objective.error(space.columns(genome))
                genomes, scores = torch.tensor(list(known)), torch.tensor(list(known.values()), dtype=torch.float64)
                folder.save(FILE, {"genomes": genomes, "scores": scores})
            bar.update()
            return float(known[genome])

        best = evolve(space, config.column_search, config.seed, score)
    return config.with_layer_knobs((name, {"columns": columns}) for name, columns in space.columns(best).items())
