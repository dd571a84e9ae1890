"""A scale table without a calibration: for presets whose activations find their scales while the network runs.

The weights are read once and no chain runs. A few golden calls are made for the build to prove its engine: of recorded
calls if there are some, and else of noise.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

from tqdit.calibration.config import PRESETS, QuantizationConfig, presets_without_rows
from tqdit.calibration.cost import product_costs
from tqdit.calibration.device import exact_arithmetic
from tqdit.calibration.layers import plan, rewrites_of
from tqdit.calibration.low_rank import find_branches
from tqdit.calibration.methods import weights
from tqdit.calibration.results import make_table, some_inputs
from tqdit.calibration.rows import boundaries_of, noise_rows, recorded_rows, sampling_of
from tqdit.errors import TqditWarning, UsageError
from tqdit.golden import GoldenCalls
from tqdit.models.loaded import LoadedModel
from tqdit.models.recording import Recording
from tqdit.models.rewrites import rewrite
from tqdit.quantization.fake_quant import golden_calls
from tqdit.quantization.fold import fold_layers
from tqdit.quantization.table import ScaleTable
from tqdit.sampling.guidance import rows_per_image

ROWS = 4  # of golden calls
MOST_MULTIPLY_ADDS = 2e13  # that golden calls may take, by both networks together


def preset_without_rows(name: str) -> QuantizationConfig:
    """Raises UsageError for a preset that needs a calibration, or that does not exist."""
    known = presets_without_rows()
    if name not in known:
        what = "needs a calibration" if name in PRESETS else "is unknown"
        raise UsageError(
            f"preset '{name}' {what}. An export takes {', '.join(known)}; for others run tqdit-calibrate and pass its "
            "table."
        )
    return PRESETS[name]


def table_without_rows(
    model: LoadedModel, config: QuantizationConfig, recording: Recording | None = None
) -> ScaleTable:
    """The table of a config with the method `weights`.

    recording: calls of the network, of which golden calls are taken. Warns (`TqditWarning`) if there are none, because
    the network is large or takes requests that are not recorded. Raises UsageError for what needs a calibration.
    """
    config = config.for_model(model)
    if config.column_search:
        raise UsageError("--column-search needs calibration rows, and an export has none. Pass it to tqdit-calibrate.")
    if config.equalize != "none":
        raise UsageError("--equalize needs calibration rows, and an export has none. Run tqdit-calibrate.")
    rewrites = rewrites_of(config)
    plans = plan(rewrite(model, rewrites), config)
    weights.check(plans)
    with exact_arithmetic(model.device):
        boundaries = boundaries_of(sampling_of(model, config), config.groups)
        layers = {name: branch for name, branch, _ in find_branches(model, rewrites, {}, config)}
        sites = weights.sites(fold_layers(model, rewrites, layers), plans, config)
        table = make_table(model, config, boundaries, sites, {}, layers)
        golden = _golden_calls(model, config, table, recording)
    return replace(table, golden=golden, interface=None if recording is None else recording.interface)


def _golden_calls(
    model: LoadedModel, config: QuantizationConfig, table: ScaleTable, recording: Recording | None
) -> GoldenCalls | None:
    each = rows_per_image(model.guidance)
    per_row = 2 * sum(cost.multiply_adds for cost in product_costs(model).values())
    count = int(min(ROWS, MOST_MULTIPLY_ADDS // per_row)) // each * each
    try:
        if not count:
            raise UsageError(f"a row takes {per_row / 2:.1e} multiply-adds.")
        config = replace(config, rows_per_group=count)
        rows = noise_rows(model, config) if recording is None else recorded_rows(model, config, recording)
    except UsageError as error:
        missing = "no golden calls, by which a build proves its engine"
        warnings.warn(f"{model.source}: {missing}: {error} tqdit-calibrate makes some.", TqditWarning, stacklevel=4)
        return None
    return golden_calls(model, table, some_inputs(rows, count))
