"""The phases, in order and resumable (Algorithm 1).

    rows     (1)  chains of the float model -> calibration rows
    inputs   (2)  one forward and one backward pass -> samples of every product, on disk
    search   (3)  product by product -> a partial scale table each
    blocks   (4)  of method `reconstruct` alone: rounding and scales learned, unit by unit -> a partial table each

Settings add searches by errors of the whole network: of columns before (2), of bits before (3). After the table come
golden calls, errors along chains and placed steps, of the fake-quantized network.

Each phase leaves its results in the work folder, so a killed run loses at most the batch or the product that it was in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tqdit.bounds import check_memory
from tqdit.calibration import bit_search, column_search
from tqdit.calibration.capture import Capture, Picker, Samples
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.correcting import find_correction
from tqdit.calibration.cost import Meter, product_costs
from tqdit.calibration.data import DataSet, data_rows
from tqdit.calibration.device import exact_arithmetic
from tqdit.calibration.drift import check_group_count
from tqdit.calibration.end_to_end import EndToEnd
from tqdit.calibration.equalize import choose_divisor
from tqdit.calibration.fisher import FISHERS
from tqdit.calibration.layers import LayerPlan, plan, rewrites_of, with_one_region
from tqdit.calibration.low_rank import find_branches
from tqdit.calibration.methods import METHODS, weights
from tqdit.calibration.placing import Placing, check_forecasts, check_placing
from tqdit.calibration.problem import Problem, Solution, make_problem
from tqdit.calibration.reconstruct import reconstruct, units_of
from tqdit.calibration.results import make_table, some_inputs
from tqdit.calibration.rows import CalibrationRows, Trajectory, every_state, pick, recorded_rows, sampling_of
from tqdit.calibration.work import WorkFolder, digest, open_search, versions
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.golden import CALLS
from tqdit.models.loaded import LoadedModel
from tqdit.models.recording import Recording
from tqdit.models.rewrites import Rewrites, Tensors, rewrite
from tqdit.models.rotation import block_of
from tqdit.quantization.fake_quant import apply, golden_calls
from tqdit.quantization.fold import fold_layers
from tqdit.quantization.table import ScaleTable, Site
from tqdit.sampling.guidance import rows_per_image

TWO_REGIONS_PAY = 0.5  # of the error with one region: above it, the second product is not worth it
SAVES_PER_TRAJECTORY = 25


@dataclass(frozen=True)
class Result:
    """A table, what it cost this process, and the folder of its intermediate results, which may be deleted."""

    table: ScaleTable
    meter: Meter
    folder: WorkFolder


def calibrate(
    model: LoadedModel,
    config: QuantizationConfig,
    work: Path,
    console: Console | None = None,
    data: DataSet | Recording | None = None,
) -> Result:
    """Find the scales of `model` under `config`. `work` is a folder for intermediate results; rows stay in it.

    data: what rows are taken from in place of the model's own chains.
    """
    with exact_arithmetic(model.device):
        run = Calibration(model, config.for_model(model), work, console or Console(quiet=True), data)
        rows = run.rows()
        run.choose_columns(rows)
        table = run.reconstruct(run.search(rows), rows)
        table = run.with_placed_steps(run.with_correction(run.with_golden_calls(table, rows)))
    return Result(table, run.meter, run.folder)


class Calibration:
    """One run: its plan, its folders, and how far it has come."""

    def __init__(
        self,
        model: LoadedModel,
        config: QuantizationConfig,
        work: Path,
        console: Console,
        data: DataSet | Recording | None = None,
    ) -> None:
        self.model, self.console, self.data = model, console, data
        self._take(config)
        self.space = column_search.space(model, self.plans, config) if config.column_search else None
        self.carried: dict[str, Tensor] | None = None  # part of a layer -> the error of the parts before it
        self.bits = bit_search.space(self.plans, config) if config.bit_search else None
        self.meter = Meter({name: cost.multiply_adds for name, cost in product_costs(model).items()})
        self.spec = sampling_of(model, config)
        if config.method == "weights":
            weights.check(self.plans)
        self._check()
        row_facts = {
            "fingerprint": model.fingerprint, "sampling": str(self.spec), "versions": versions(model.device),
            "data": data.sha256 if data else None, "renoised": config.fisher == "loss" or data is not None,
            "config": [config.groups, config.boundaries, config.rows_per_group, config.chains, config.guidance_scale,
                       config.seed],
        }  # fmt: skip
        self.rows_name = f"rows-{digest(row_facts)}"
        self.root = WorkFolder(work, model.device)
        self.folder = open_search(work, {"rows": row_facts, "config": config.to_json()}, model.device)

    @property
    def phases(self) -> int:
        return 4 if self.config.method == "reconstruct" else 3

    def _take(self, config: QuantizationConfig) -> None:
        """The settings, and the rewrites and plans that they ask for."""
        self.config = config
        self.rewrites = rewrites_of(config)
        self.plans = plan(rewrite(self.model, self.rewrites), config)

    def _check(self) -> None:
        """Refuse what the phases cannot do, before the chains run: they are most of a calibration's time."""
        scale = self.config.guidance_scale or 0
        recorded = self.model.guidance.scale if self.model.guidance and isinstance(self.data, Recording) else scale
        if not math.isclose(scale, recorded, rel_tol=1e-3):
            raise UsageError(f"--guidance-scale is {scale:g}; calls were recorded with {recorded:g}. Leave it out.")
        if self.config.correction:
            _ = self.spec.schedule  # raises if no chain is known
        check_placing(self.model.sampling, self.model.signature, self.config)
        check_forecasts(self.model, self.config)
        chains, config = len(self.data) if self.data else None, self.config
        signature, rows = self.model.signature, config.groups * config.rows_per_group
        state = 4 * math.prod(signature.state.row_shape)
        row = state + sum(np.dtype(port.dtype).itemsize * math.prod(port.row_shape) for port in signature.ports)
        held = 0 if self.data else config.chains * (6 + self.spec.steps * (config.boundaries == "drift"))
        check_memory(
            f"{rows} calibration rows" + ("" if self.data else f" from {config.chains} chains"),
            2 * rows * row + held * state, "Lower --rows-per-group or --chains.",
        )  # fmt: skip
        if isinstance(self.data, Recording):
            recorded_rows(self.model, self.config, self.data)
        elif self.config.boundaries == "drift":
            check_group_count(self.config.groups, self.spec.steps)
        else:
            pick(self.model, self.config, chains=chains)

    # phase 1 ---------------------------------------------------------------------------------------------------------

    def rows(self) -> CalibrationRows:
        """The calibration rows of the whole network, from disk if an earlier run has left them."""
        found = self.root.load_or_none(self.rows_name)
        if found is not None:
            rows = CalibrationRows.of(found)
            self.console.say(f"calibration rows: {len(rows)}, kept from an earlier run in {self.root.path}")
            return rows
        if isinstance(self.data, Recording):
            rows = recorded_rows(self.model, self.config, self.data)
        elif self.data:
            rows = data_rows(self.model, self.spec, self.config, self.data)
        else:
            rows = self._sample_rows()
        self.root.save(self.rows_name, rows.tensors())
        self.root.remove(f"{self.rows_name}-chains")
        return rows

    def _sample_rows(self) -> CalibrationRows:
        measured = self.config.boundaries == "drift"
        picks = every_state(self.spec, self.config) if measured else pick(self.model, self.config)
        trajectory = Trajectory(self.model, self.config, picks)
        state_name = f"{self.rows_name}-chains"
        state = self.root.load_or_none(state_name)
        if state is not None:
            trajectory.load_state_dict(state)
        steps = trajectory.next_step + 1
        self.meter.forward("rows", self.config.chains * rows_per_image(self.model.guidance) * steps)
        save_every = max(1, self.spec.steps // SAVES_PER_TRAJECTORY)
        with self.console.bar(self.spec.steps, f"1/{self.phases} rows from chains", "steps") as bar:
            bar.update(self.spec.steps - steps)

            def after(step: int) -> None:
                if step % save_every == 0:
                    self.root.save(state_name, trajectory.state_dict())
                bar.update()

            trajectory.run(after)
        if measured:
            trajectory.place_boundaries()
        return trajectory.renoised_rows() if self.config.fisher == "loss" else trajectory.rows()

    def choose_columns(self, rows: CalibrationRows) -> None:
        """Find the columns of each layer, if the settings ask for it; all that follows is of the network so divided."""
        if self.space is not None:
            objective = column_search.Objective(self.model, self.config, rows, self.meter)
            self._take(column_search.run(self.space, self.config, objective, self.folder, self.console))

    # phase 2 ---------------------------------------------------------------------------------------------------------

    def capture(
        self, model: LoadedModel, rows: CalibrationRows, plans: tuple[LayerPlan, ...], label: str = "samples"
    ) -> Capture:
        """The samples of some products on `rows`, recorded if they are not on disk."""

        def cotangent(index: Tensor, output: Tensor) -> Tensor:
            return FISHERS[self.config.fisher](rows, index, output, self.model, self.config)

        picker = Picker(len(rows), self.config.token_share, self.config.seed)
        names = tuple(entry.name for entry in plans)
        found = Capture(model, names, rows.inputs, picker, cotangent, self.folder, label)
        with self.console.bar(len(rows), f"2/{self.phases} inputs and gradients", "rows") as bar:
            recorded = found.run(bar.update)
        self.meter.forward("inputs", found.forward_passes * recorded)
        self.meter.backward("gradients", recorded)
        return found

    def _layers(self, rows: CalibrationRows) -> dict[str, Tensors]:
        """What rewrites take, layer by layer: divisors if they help, and branches of low rank."""
        found: dict[str, dict[str, Tensor]] = {name: {"divisor": each} for name, each in self._divisors(rows).items()}
        branches = self.folder.load_or_none("branches")
        if branches is None:
            branches = {}
            for name, tensors, spent in find_branches(self.model, self.rewrites, found, self.config):
                branches |= {f"{name}|{key}": tensor for key, tensor in tensors.items()}
                self.meter.add("search", spent)
            self.folder.save("branches", branches)
        for key, tensor in branches.items():
            name, _, key = key.rpartition("|")
            found.setdefault(name, {})[key] = tensor
        return {**found}

    def _divisors(self, rows: CalibrationRows) -> dict[str, Tensor]:
        """The divisors (K,) of the inputs that they help, if they cost nothing at run time or may."""
        config, rewrites = self.config, self.rewrites
        if config.equalize == "none":
            return {}
        found = self.folder.load_or_none("divisors")
        if found is not None:
            return found
        places = {product.name: block_of(product.columns, rewrites.rotate) if product.place == "block" else 0
                  for product in self.model.products
                  if product.folds or (product.place == "block" and rewrites.divide)}  # fmt: skip
        if rewrites != Rewrites():  # overrides name rewritten layers
            config = replace(config, overrides="", gelu="uniform" if rewrites.rotate else config.gelu)
        plans = tuple(entry for entry in plan(self.model, config)
                      if set(entry.operands) == {"weight", "input"} and entry.name in places)  # fmt: skip
        capture, found = self.capture(self.model, rows, plans, "equalize"), {}
        for entry in plans:
            weight = self.model.weight(entry.name)
            assert weight is not None
            samples, block = capture.samples(entry.name), places[entry.name]
            divisor, spent = choose_divisor(entry, samples, weight, rows.group, config, block)
            self.meter.add("search", spent)
            if divisor is not None:
                found[entry.name] = divisor
        self.folder.save("divisors", found)
        capture.delete()
        return found

    # phase 3 ---------------------------------------------------------------------------------------------------------

    def search(self, rows: CalibrationRows) -> ScaleTable:
        """Capture every product and search its scales; the whole table, sites in the order of the network's calls."""
        layers = self._layers(rows)
        model = fold_layers(self.model, self.rewrites, layers)
        if self.config.method == "weights":
            return self._table(list(weights.sites(model, self.plans, self.config)), {}, rows, layers)
        capture = self.capture(model, rows, self.plans)
        if self.bits is not None and self.bits.layers:
            weighted = self.config.fisher in ("step", "guided")  # as the errors of the layers are
            whole = EndToEnd(model, self.config, rows, self.meter, "bits", weighted)
            self._take(bit_search.run(self.bits, capture, whole, self.config, self.console))
        parts = []
        if self.config.method == "gptq":
            self._forget_halves()
            self.carried = {}
        with self.console.bar(len(self.plans), f"3/{self.phases} scales", "layers") as bar:
            for entry in self.plans:
                name = f"table-{entry.name}"
                if not self.folder.has(name):
                    weight = model.weight(entry.name)
                    sites, error = self.solve(entry, capture.samples(entry.name), weight, rows)
                    self.folder.save_table(name, self._table(sites, {entry.name: error}, rows))
                parts.append(self.folder.load_table(name))
                bar.update()
        sites = [site for part in parts for site in part.sites]
        errors = {name: error for part in parts for name, error in part.errors.items()}
        return self._table(sites, errors, rows, layers)

    def _forget_halves(self) -> None:
        """Remove what a kill left of layers in parts: their errors go on from part to part, and are not on disk."""
        names = [entry.name for entry in self.plans if ".columns." in entry.name]
        missing = {name.rpartition(".columns.")[0] for name in names if not self.folder.has(f"table-{name}")}
        for name in names:
            if name.rpartition(".columns.")[0] in missing:
                self.folder.remove(f"table-{name}")

    # phase 4 ---------------------------------------------------------------------------------------------------------

    def reconstruct(self, table: ScaleTable, rows: CalibrationRows) -> ScaleTable:
        """The table with rounding and scales learned block by block, if the method says so."""
        if self.config.method != "reconstruct":
            return table
        with self.console.bar(len(units_of(self.model, table)), "4/4 blocks learned", "blocks") as bar:

            def done(multiply_adds: float) -> None:
                self.meter.add("reconstruction", multiply_adds)
                bar.update()

            costs = product_costs(rewrite(self.model, self.rewrites))
            per_row = {name: cost.multiply_adds for name, cost in costs.items()}
            return reconstruct(self.model, table, rows, self.config, self.folder, per_row, done)

    def with_golden_calls(self, table: ScaleTable, rows: CalibrationRows) -> ScaleTable:
        """The table with a few rows, spread over the groups, that prove an engine; and what was recorded."""
        golden = golden_calls(self.model, table, some_inputs(rows, CALLS))
        self.meter.forward("golden calls", 2 * len(golden))
        interface = self.data.interface if isinstance(self.data, Recording) else None
        return replace(table, golden=golden, interface=interface)

    def with_placed_steps(self, table: ScaleTable) -> ScaleTable:
        """The table with the steps of a short chain, if they are asked for."""
        if self.config.calls is None:
            return table

        def meter(images: int) -> None:
            self.meter.forward("placed steps", images * rows_per_image(self.model.guidance))

        requests = self.data.requests if isinstance(self.data, Recording) else None
        placing = Placing(self.model, self.config, self.folder, self.console, requests, table.correction)
        return replace(table, placed=placing.run(apply(self.model, table), meter))

    def with_correction(self, table: ScaleTable) -> ScaleTable:
        """The table with PTQD's correction, if it is asked for."""
        if not self.config.correction:
            return table
        requests = self.data.requests if isinstance(self.data, Recording) else None
        with self.console.bar(self.spec.steps, "errors along chains", "steps") as bar:

            def done(images: int) -> None:
                self.meter.forward("correction", 2 * images * rows_per_image(self.model.guidance))
                bar.update()

            quantized = apply(self.model, table)
            found = find_correction(self.model, quantized, self.config, self.folder, done, requests)
        return replace(table, correction=found)

    def solve(
        self, layer_plan: LayerPlan, samples: Samples, weight: Tensor | None, rows: CalibrationRows
    ) -> tuple[list[Site], float]:
        """The sites of one product, and its error relative to its energy."""
        problem, solution = self.solve_plan(layer_plan, samples, weight, rows)
        one_region = with_one_region(layer_plan, self.config.for_layer(layer_plan.name))
        if one_region is not None:
            other, uniform = self.solve_plan(one_region, samples, weight, rows)
            if solution.history[-1] > TWO_REGIONS_PAY * uniform.history[-1]:
                problem, solution = other, uniform
        error = problem.relative(solution.history[-1])
        layer, _, part = layer_plan.name.rpartition(".columns.")
        if layer and self.carried is not None:
            number, *core = part.split(".")  # 'core' of a rewritten part that is the network's own
            after = ".".join([str(int(number) + 1), *core])
            self.carried = {f"{layer}.columns.{after}": problem.left_over(solution)}
        sites = []
        for role, operand in problem.operands.items():
            quantizer = operand.quantizer(solution.parameters[role])
            codes = None
            if role == "weight" and solution.weight_codes is not None and weight is not None:
                codes = solution.weight_codes.reshape(weight.shape).to(torch.int8).cpu().numpy()
            sites.append(Site(layer_plan.name, role, quantizer, codes))
        return sites, error

    @torch.no_grad()
    def solve_plan(
        self, layer_plan: LayerPlan, samples: Samples, weight: Tensor | None, rows: CalibrationRows
    ) -> tuple[Problem, Solution]:
        """One layer under one plan, by the configured method."""
        problem = make_problem(layer_plan, samples, weight, rows.group, self.config)
        carried = (self.carried or {}).get(layer_plan.name)
        if carried is not None and carried.shape == samples.g2.shape:
            problem = replace(problem, carried=carried)
        solution = METHODS[self.config.method](problem, self.config)
        self.meter.add("search", solution.multiply_adds)
        return problem, solution

    def _table(
        self, sites: list[Site], errors: dict[str, float], rows: CalibrationRows,
        layers: Mapping[str, Tensors] | None = None,
    ) -> ScaleTable:  # fmt: skip
        return make_table(self.model, self.config, rows.boundaries.cpu().numpy(), sites, errors, layers or {})
