"""The three phases, in order and resumable (Algorithm 1).

    rows     (1)  chains of the float model -> calibration rows
    inputs   (2)  one forward pass, stage by stage -> the tokens between the stages, on disk
    search   (3)  stages from last to first: recompute, gradients, search of its layers -> a partial scale table each

Each stage leaves its results in the work folder, so a killed run loses at most the stage that it was in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tqdit.calibrate.capture import Recorder, Samples, choose_heads, choose_tokens
from tqdit.calibrate.config import QuantizationConfig
from tqdit.calibrate.cost import Meter, multiply_adds
from tqdit.calibrate.data import DataSet, data_rows
from tqdit.calibrate.device import exact_arithmetic
from tqdit.calibrate.equalize import choose_divisor
from tqdit.calibrate.fisher import FISHERS
from tqdit.calibrate.layers import LayerPlan, plan, with_one_region
from tqdit.calibrate.methods import METHODS
from tqdit.calibrate.operands import array
from tqdit.calibrate.problem import Problem, Solution, make_problem
from tqdit.calibrate.rows import CalibrationRows, Chains, every_state, pick, sampling_of, trajectory
from tqdit.calibrate.stages import Batch, Stages
from tqdit.calibrate.work import WorkFolder, digest, open_search, versions
from tqdit.console import Console
from tqdit.models import LoadedModel
from tqdit.quantization.fold import fold_divisors, source_of
from tqdit.quantization.table import ScaleTable, Site

TWO_REGIONS_PAY = 0.5  # of the error with one region: above it, the second product is not worth it
SAVES_PER_TRAJECTORY = 25
BATCH_ELEMENTS = 2**23  # of the widest tensor of a block in one batch; fixed, since batches decide the last bits


@dataclass(frozen=True)
class Result:
    """A table and what it cost this process."""

    table: ScaleTable
    meter: Meter


def calibrate(
    model: LoadedModel,
    config: QuantizationConfig,
    work: Path,
    console: Console | None = None,
    data: DataSet | None = None,
) -> Result:
    """Find the scales of `model` under `config`. `work` is a folder for intermediate results; rows stay in it."""
    with exact_arithmetic(model.device):
        run = Calibration(model, config.for_model(model), work, console or Console(quiet=True), data)
        rows = run.rows()
        run.forward(rows)
        for stage in reversed(range(len(run.stages))):
            run.search(stage, rows)
        table = run.table(rows)
        run.bar.close()
    return Result(table, run.meter)


def finish(model: LoadedModel, config: QuantizationConfig, work: Path, data: DataSet | None = None) -> None:
    """Remove the intermediate results of a finished calibration; its rows stay."""
    Calibration(model, config.for_model(model), work, Console(quiet=True), data).folder.delete()


class Calibration:
    """One run: its plan, its folders, and how far it has come."""

    def __init__(
        self, model: LoadedModel, config: QuantizationConfig, work: Path, console: Console, data: DataSet | None
    ) -> None:
        self.model, self.config, self.console, self.data = model, config, console, data
        self.device = model.device
        self.plans = plan(model.network, config)
        self.stages = Stages(model.network)
        self.meter = Meter(multiply_adds(model))
        self.spec = sampling_of(model, config)
        row_facts = {
            "fingerprint": model.fingerprint, "sampling": self.spec.to_json(), "versions": versions(self.device),
            "data": data.sha256 if data else None, "renoised": config.fisher == "loss" or data is not None,
            "config": [config.groups, config.boundaries, config.rows_per_group, config.chains, config.guidance_scale,
                       config.seed],
        }  # fmt: skip
        self.rows_name = f"rows-{digest(row_facts)}"
        self.root = WorkFolder(work, self.device)
        self.folder = open_search(work, {"rows": row_facts, "config": config.to_json()}, self.device)

    # phase 1 ---------------------------------------------------------------------------------------------------------

    def rows(self) -> CalibrationRows:
        """The calibration rows, from disk where an earlier run has left them."""
        found = self.root.load_or_none(self.rows_name)
        if found is not None:
            self.console.say(f"calibration rows: {len(found['x'])}, kept from an earlier run in {self.root.path}")
            return CalibrationRows(**found)
        rows = data_rows(self.model, self.spec, self.config, self.data) if self.data else self._sample_rows()
        self.root.save(self.rows_name, rows.tensors())
        self.root.remove(f"{self.rows_name}-chains")
        return rows

    def _sample_rows(self) -> CalibrationRows:
        measured = self.config.boundaries == "drift"
        picks = every_state(self.spec, self.config) if measured else pick(self.spec, self.config)
        chains = Chains(self.model, self.spec, self.config, picks)
        state_name = f"{self.rows_name}-chains"
        state = self.root.load_or_none(state_name)
        if state is not None:
            chains.load_state_dict(state)
        self.meter.forward("rows", 2 * self.config.chains * (chains.next_step + 1))
        save_every = max(1, self.spec.steps // SAVES_PER_TRAJECTORY)
        with self.console.bar(self.spec.steps, "1/3 rows from guided chains", "steps") as bar:
            bar.update(self.spec.steps - 1 - chains.next_step)
            trajectory(chains, lambda tensors: self.root.save(state_name, tensors), save_every, bar.update)
        if measured:
            chains.place_boundaries()
        return chains.renoised_rows() if self.config.fisher == "loss" else chains.rows()

    # phase 2, forward ------------------------------------------------------------------------------------------------

    def batches(self, rows: CalibrationRows) -> list[tuple[int, Batch]]:
        """Batches of fixed size with the index of their first row."""
        size = self._batch_size()
        return [
            (start, Batch(*(t[start : start + size] for t in (rows.x, rows.timestep, rows.label))))
            for start in range(0, len(rows), size)
        ]

    def _batch_size(self) -> int:
        config: Any = self.model.network.config
        return int(max(1, min(64, BATCH_ELEMENTS // (config.num_tokens * config.mlp_hidden_size))))

    @torch.no_grad()
    def forward(self, rows: CalibrationRows) -> None:
        """Store the tokens that enter each stage, and the shared conditioning."""
        if self.folder.has(f"table-{self.stages.last}"):
            return  # done before, and partly used up
        with self.console.bar(self.stages.last, "2/3 inputs of the blocks", "blocks") as bar:
            for stage in range(self.stages.last):
                if not self.folder.has(f"tokens-{stage + 1}"):
                    self._forward_stage(stage, rows)
                bar.update()

    def _forward_stage(self, stage: int, rows: CalibrationRows) -> None:
        outputs: dict[str, Tensor] = {}
        for start, batch in self.batches(rows):
            if stage == 0:
                tokens, shared = self.stages.embed(batch)
                parts = {"tokens": tokens} | ({} if shared is None else {"shared": shared})
            else:
                parts = {"tokens": self.stages.run(stage, *self._inputs(stage, start, batch), batch)}
            for name, part in parts.items():
                if name not in outputs:
                    outputs[name] = torch.empty(len(rows), *part.shape[1:], device=part.device)
                outputs[name][start : start + len(part)] = part
        if "shared" in outputs:
            self.folder.save("shared", {"shared": outputs.pop("shared")})
        self.folder.save(f"tokens-{stage + 1}", outputs)
        self.meter.forward("inputs", len(rows), self._layers_of(stage))

    def _inputs(self, stage: int, start: int, batch: Batch) -> tuple[Tensor, Tensor | None]:
        stop = start + len(batch.x)
        shared = self.folder.load_rows("shared", "shared", start, stop) if self.folder.has("shared") else None
        return self.folder.load_rows(f"tokens-{stage}", "tokens", start, stop), shared

    # phase 2, backward, and phase 3 ----------------------------------------------------------------------------------

    def search(self, stage: int, rows: CalibrationRows) -> None:
        """Capture one stage, pass its gradient on, and search its layers."""
        plans = tuple(entry for entry in self.plans if self.stages.of(entry.name) == stage)
        if not self.folder.has(f"table-{stage}"):
            divisors = self._divisors(stage, rows, plans)
            network = fold_divisors(self.model.network, divisors)
            recorder = self._capture(network, stage, rows, plans)
            sites: list[Site] = []
            errors: dict[str, float] = {}
            for layer_plan in plans:
                name = layer_plan.name
                weight = _weight(network, name)
                found, errors[name] = self._solve(layer_plan, recorder.samples(name), weight, rows)
                divided = array(divisors[name]) if name in divisors else None
                sites += [replace(site, divisor=divided) if site.role == "input" else site for site in found]
                self.bar.update()
            self.folder.save_table(f"table-{stage}", self._table(sites, errors, rows))
        else:
            self.bar.update(len(plans))
        self.folder.remove(f"tokens-{stage}")
        self.folder.remove(f"gradient-{stage}")

    def _divisors(self, stage: int, rows: CalibrationRows, plans: tuple[LayerPlan, ...]) -> dict[str, Tensor]:
        """What the inputs of a stage's layers are divided by, where that helps and costs nothing at run time."""
        network = self.model.network
        equalizable = tuple(
            entry for entry in plans if set(entry.operands) == {"weight", "input"} and source_of(network, entry.name)
        )
        if not self.config.equalize or not equalizable:
            return {}
        recorder = self._capture(network, stage, rows, equalizable)
        found = {}
        for entry in equalizable:
            weight = _weight(network, entry.name)
            assert weight is not None
            samples = recorder.samples(entry.name)
            divisor, multiply_adds = choose_divisor(entry, samples, weight, rows.group, self.config)
            self.meter.add("search", multiply_adds)
            if divisor is not None:
                found[entry.name] = divisor
        return found

    @cached_property
    def bar(self) -> Any:
        """The progress over layers, shown from the first use on."""
        return self.console.bar(len(self.plans), "3/3 scales", "layers")

    def _capture(self, network: nn.Module, stage: int, rows: CalibrationRows, plans: tuple[LayerPlan, ...]) -> Recorder:
        config: Any = network.config
        tokens = choose_tokens(len(rows), config.num_tokens, self.config.token_share, self.config.seed)
        modules, stages = dict(network.named_modules()), Stages(network)
        heads = choose_heads(len(rows), config.num_heads, self.config.seed)
        recorder = Recorder(modules, plans, tokens.to(self.device), heads.to(self.device))
        passed_on: dict[str, Tensor] = {}
        for start, batch in self.batches(rows):
            for name, gradient in self._backward(stages, stage, rows, start, batch, recorder).items():
                if name not in passed_on:
                    passed_on[name] = torch.empty(len(rows), *gradient.shape[1:], device=gradient.device)
                passed_on[name][start : start + len(gradient)] = gradient
        if stage and not self.folder.has(f"gradient-{stage - 1}"):  # the capture for the divisors has left it
            self.folder.save(f"gradient-{stage - 1}", passed_on)
        layers = self._layers_of(stage)
        self.meter.forward("gradients", len(rows), layers)
        self.meter.backward("gradients", len(rows), layers)
        return recorder

    def _backward(
        self, stages: Stages, stage: int, rows: CalibrationRows, start: int, batch: Batch, recorder: Recorder
    ) -> dict[str, Tensor]:
        """Record one batch; returns the gradients of what entered the stage."""
        inputs: list[Tensor] = []
        with torch.enable_grad(), recorder.listen(start):
            if stage == 0:
                outputs = [output for output in stages.embed(batch) if output is not None]
            else:
                inputs = [tensor.requires_grad_() for tensor in self._inputs(stage, start, batch) if tensor is not None]
                outputs = [stages.run(stage, inputs[0], inputs[1] if len(inputs) > 1 else None, batch)]
            cotangents = self._cotangents(stage, rows, start, outputs)
            wanted = list(recorder.outputs.values()) + inputs
            filled = _gradients(outputs, wanted, cotangents)
        recorder.gradients(filled[: len(wanted) - len(inputs)])
        return self._pass_on(stage, start, filled[len(wanted) - len(inputs) :])

    def _cotangents(self, stage: int, rows: CalibrationRows, start: int, outputs: list[Tensor]) -> list[Tensor]:
        stop = start + len(outputs[0])
        if stage == self.stages.last:
            fisher = FISHERS[self.config.fisher]
            return [
                fisher(
                    rows,
                    torch.arange(start, stop, device=self.device),
                    outputs[0].detach(),
                    self.spec,
                    self.config.seed,
                )
            ]
        names = ("tokens", "shared")[: len(outputs)]
        return [self.folder.load_rows(f"gradient-{stage}", name, start, stop) for name in names]

    def _pass_on(self, stage: int, start: int, gradients: list[Tensor]) -> dict[str, Tensor]:
        """Gradients for the stage before; that of the shared conditioning adds up over the stages."""
        passed = dict(zip(("tokens", "shared"), gradients, strict=False))
        if "shared" in passed and stage < self.stages.last:
            stop = start + len(gradients[0])
            passed["shared"] = passed["shared"] + self.folder.load_rows(f"gradient-{stage}", "shared", start, stop)
        return passed

    def _solve(
        self, layer_plan: LayerPlan, samples: Samples, weight: Tensor | None, rows: CalibrationRows
    ) -> tuple[list[Site], float]:
        problem, solution = self._solve_plan(layer_plan, samples, weight, rows)
        one_region = with_one_region(layer_plan, self.config.for_layer(layer_plan.name))
        if one_region is not None:
            other, uniform = self._solve_plan(one_region, samples, weight, rows)
            if solution.history[-1] > TWO_REGIONS_PAY * uniform.history[-1]:
                problem, solution = other, uniform
        error = problem.relative(solution.history[-1])
        sites = []
        for role, operand in problem.operands.items():
            quantizer = operand.quantizer(solution.parameters[role])
            codes = None
            if role == "weight" and solution.weight_codes is not None and weight is not None:
                codes = solution.weight_codes.reshape(weight.shape).to(torch.int8).cpu().numpy()
            sites.append(Site(layer_plan.name, role, quantizer, codes))
        return sites, error

    @torch.no_grad()
    def _solve_plan(
        self, layer_plan: LayerPlan, samples: Samples, weight: Tensor | None, rows: CalibrationRows
    ) -> tuple[Problem, Solution]:
        problem = make_problem(layer_plan, samples, weight, rows.group, self.config)
        solution = self.solve_problem(layer_plan, problem)
        self.meter.add("search", solution.multiply_adds)
        return problem, solution

    def solve_problem(self, layer_plan: LayerPlan, problem: Problem) -> Solution:  # noqa: ARG002 (for overriding)
        """One layer by the configured method."""
        return METHODS[self.config.method](problem, self.config)

    # the result ------------------------------------------------------------------------------------------------------

    def _layers_of(self, stage: int) -> list[str]:
        return [name for name in self.meter.per_row if self.stages.of(name) == stage]

    def table(self, rows: CalibrationRows) -> ScaleTable:
        """The whole table, from the partial ones; sites in the order of the network's modules."""
        parts = [self.folder.load_table(f"table-{stage}") for stage in range(len(self.stages))]
        sites = [site for part in parts for site in part.sites]
        errors = {name: error for part in parts for name, error in part.errors.items()}
        return self._table(sites, errors, rows)

    def _table(self, sites: list[Site], errors: dict[str, float], rows: CalibrationRows) -> ScaleTable:
        assert self.config.guidance_scale is not None
        return ScaleTable(
            model=self.model.source,
            fingerprint=self.model.fingerprint,
            boundaries=rows.boundaries.cpu().numpy().astype(np.float64),
            sites=tuple(sites),
            seed=self.config.seed,
            guidance_scale=self.config.guidance_scale,
            settings=self.config.to_json(),
            versions=versions(self.device),
            errors=errors,
        )


def _weight(network: nn.Module, name: str) -> Tensor | None:
    """The weight of a linear layer or a convolution; products of attention have none."""
    module = network.get_submodule(name)
    return module.weight if isinstance(module, nn.Linear | nn.Conv2d) else None


def _gradients(outputs: list[Tensor], wanted: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Gradients of `wanted`, zero where nothing depends on them.

    An output of the first stage that comes from no recorded layer needs none and is left out.
    """
    reached = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not reached or not wanted:
        return [torch.zeros_like(tensor) for tensor in wanted]
    found = torch.autograd.grad([o for o, _ in reached], wanted, [c for _, c in reached], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
