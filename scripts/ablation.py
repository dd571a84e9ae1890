"""The paper's Table III, sweeps over bits and groups of timesteps, and every preset at every width: the demo models.

    scripts/ablation                         every row that is not there yet, then tables and plots into docs/results
    scripts/ablation --model text            the text demo, on captions that it was never trained on
    scripts/ablation --only III --images 64  a part of it, smaller
    scripts/ablation --list                  what there is to do
    scripts/ablation --only presets --engines     also each preset as engines: integer products, milliseconds per step

Each row is one calibration (preset, bits, groups, seed), sampled as the fake-quantized model on the noise of its seed,
and one file in --rows, its scale table beside it: a run that is stopped goes on where it was. Rows in the JSON of an
earlier run, of the same versions and sizes, are not measured again. Adjacent rows of Table III differ in one
ingredient. Sweeps over groups keep the number of calibration rows. --engines times calls; let nothing else run beside
it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ablation_engines import BACKENDS, IMAGES, EngineBench, EngineRow
from ablation_subjects import STEPS, SUBJECTS, Subject
from numpy.typing import NDArray

from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.calibration.rows import CalibrationRows
from tqdit.calibration.work import digest, versions
from tqdit.console import Console
from tqdit.engines.run.sampler import Sampler, to_pixels
from tqdit.errors import TqditError, UsageError
from tqdit.evaluate.bootstrap import Measure, Z, number, of_mean
from tqdit.evaluate.chains import SampledChains, run
from tqdit.evaluate.evaluation import MetricChoice, Metrics, ReferenceFeatures, describe_reference
from tqdit.evaluate.observe import Observed, observe
from tqdit.evaluate.paired import psnr, relative_errors
from tqdit.evaluate.samples import Images, Reference
from tqdit.evaluate.tools import processor
from tqdit.extras import need
from tqdit.files import whole_file
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import write_scale_table
from tqdit.sampling.correction import Correction

NOISE = 1000  # seed s samples with noise NOISE + s
HELD_OUT = 10_000  # seed of the chains whose states judge the predicted noise
TOTAL_ROWS = 320  # of a calibration, whatever its groups
METRICS = ("frechet_distance", "accuracy", "inception_score")
PAPER = {"float": 4.62, "mse": 28.86, "ho": 22.47, "ho+mrq": 9.31, "tq-dit": 8.58}  # FID, Table III, ImageNet 256
WORDS = {"demo": "demo model", "text": "text demo, captions of combinations that were never trained on"}
LABELS = {
    "float": "float",
    "mse": "uniform, MSE search",
    "ho": "+ HO",
    "ho+mrq": "+ HO + MRQ",
    "tq-dit": "+ HO + MRQ + TGQ",
}


@dataclass(frozen=True)
class Job:
    """One configuration without its seed; the same one can stand in several tables."""

    preset: str  # or 'float'
    weight_bits: int = 6
    activation_bits: int = 6
    groups: int = 10

    @property
    def bits(self) -> str:
        return "float" if self.preset == "float" else f"W{self.weight_bits}A{self.activation_bits}"

    @property
    def name(self) -> str:
        return "float" if self.preset == "float" else f"{self.preset}-{self.bits}-g{self.groups}".replace("+", "-")

    def config(self, steps: int, seed: int) -> QuantizationConfig:
        return replace(
            PRESETS[self.preset], weight_bits=self.weight_bits, activation_bits=self.activation_bits, steps=steps,
            groups=self.groups, rows_per_group=TOTAL_ROWS // self.groups, seed=seed,
        )  # fmt: skip


BITS = ((8, 8), (6, 6), (4, 8), (4, 4))
TABLES: dict[str, tuple[Job, ...]] = {
    "III": (Job("float"), Job("mse"), Job("ho"), Job("ho+mrq"), Job("tq-dit")),
    "bits": tuple(Job("tq-dit", *bits) for bits in BITS),
    "groups": tuple(Job("tq-dit", groups=groups) for groups in (1, 2, 5, 10, 20)),
    "presets": tuple(Job(preset, *bits) for bits in BITS for preset in PRESETS),
}


@dataclass(frozen=True)
class Size:
    """What every row is judged by."""

    steps: int = 50
    images: int = 192
    batch: int = 32


@dataclass(frozen=True)
class Row:
    """What one job gave under one seed."""

    job: Job
    seed: int
    measures: dict[str, Measure]
    cpu_seconds: float
    seconds: float
    calibration_cpu_seconds: float = 0.0
    forward_equivalents: float = 0.0  # of the calibration
    processor: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "measures": {name: measure.to_json() for name, measure in self.measures.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        measures = {name: Measure(**entry) for name, entry in values["measures"].items()}
        return cls(**{**values, "job": Job(**values["job"]), "measures": measures})


class Store:
    """Rows on disk, one file each, named by all that they depend on; and those of a document that a run wrote."""

    def __init__(
        self, folder: Path, size: Size, fingerprint: str, kinds: dict[str, str], document: Path | None = None
    ) -> None:
        self.folder, self._facts = folder, [asdict(size), fingerprint, kinds]
        self._written: dict[str, Any] = {}
        if document is not None and document.is_file():
            rows = json.loads(document.read_text(encoding="utf-8"))["rows"]
            self._written = {row["file"]: row["row"] for row in rows if "file" in row}  # earlier versions had none

    def path(self, job: Job, seed: int) -> Path:
        default = QuantizationConfig().to_json()  # a knob that comes later leaves the rows of presets without it
        settings = None
        if job.preset != "float":
            settings = {name: value for name, value in job.config(1, seed).to_json().items() if value != default[name]}
        return self.folder / f"{job.name}-s{seed}-{digest([*self._facts, settings])}.json"

    def table(self, job: Job, seed: int) -> Path:
        """Where the scale table of a row lies."""
        return self.path(job, seed).with_suffix(".safetensors")

    def load(self, job: Job, seed: int) -> Row | None:
        """None where the row is not there, or is not whole."""
        path = self.path(job, seed)
        try:
            return Row.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            written = self._written.get(path.name)
            return None if written is None else Row.from_json(written)

    def save(self, row: Row) -> None:
        with whole_file(self.path(row.job, row.seed)) as temporary:
            temporary.write_text(json.dumps(row.to_json(), indent=1) + "\n", encoding="utf-8")

    def entry(self, row: Row) -> dict[str, Any]:
        """A row in a document."""
        return {"file": self.path(row.job, row.seed).name, "row": row.to_json()}


class Bench:
    """How a row is measured on one subject."""

    def __init__(self, subject: Subject, size: Size, work: Path, console: Console) -> None:
        self.subject, self.size, self.work, self.console = subject, size, work, console
        work.mkdir(parents=True, exist_ok=True)
        extractor, data = subject.extractor, subject.data
        self.target: ReferenceFeatures = describe_reference(Reference(data.source, data), extractor, console)
        self._metrics = Metrics(extractor, self.target, MetricChoice(METRICS, required=True))
        self._float: dict[int, SampledChains] = {}

    def chains(self, model: LoadedModel, seed: int, what: str, correction: Correction | None = None) -> SampledChains:
        card = replace(model.card(), correction=correction)
        sampler, job = Sampler(card, model, None, self.size.batch), self.subject.job
        with self.console.bar(job.shards * job.steps, what, "steps") as bar:
            return run(sampler, replace(job, seed=NOISE + seed), bar.update, self.subject.prompts)

    def float_chains(self, seed: int) -> SampledChains:
        """Those of the float model, kept in memory for the rows that follow."""
        if seed not in self._float:
            self._float[seed] = self.chains(self.subject.model, seed, f"float, seed {seed}")
        return self._float[seed]

    def measure(self, job: Job, seed: int, table: Path | None = None) -> Row:
        """Calibrate, sample and judge one row. table: where its scale table is kept."""
        started, cpu = time.monotonic(), time.process_time()
        calibration = forwards = 0.0
        reference = self.float_chains(seed)
        measures: dict[str, Measure] = {}
        found = reference
        if job.preset != "float":
            config = job.config(self.size.steps, seed)
            model = self.subject.model
            begun = time.process_time()
            with tempfile.TemporaryDirectory(dir=self.work) as work:  # of its own, so that all of its cost is counted
                result = calibrate(model, config, Path(work), self.console, self.subject.calls)
            calibration = time.process_time() - begun
            forwards = sum(result.meter.forward_equivalents.values())
            if table is not None:
                write_scale_table(table, result.table)
            quantized = apply(model, result.table)
            measures["eps_error"] = self._eps_error(quantized)
            found = self.chains(quantized, seed, f"{job.name}, seed {seed}", result.table.correction)
            errors = relative_errors(reference.latents, found.latents)
            measures["final_error"] = of_mean(errors)
            measures["final_error_median"] = Measure(float(np.median(errors)), None, None, len(errors), "none")
        images = self._observe(found, job.name)
        measures |= self._metrics.measure(images)
        if job.preset != "float":
            floating = self._observe(reference, "float")
            excess = self._metrics.excess(images, floating)
            assert excess is not None
            measures["frechet_excess"] = excess
            measures["psnr_db"] = psnr(to_pixels(reference.latents), to_pixels(found.latents))
            measures["feature_distance"] = of_mean(cosine_distances(floating, images))
        spent = time.process_time() - cpu, time.monotonic() - started
        return Row(job, seed, measures, *spent, calibration, forwards, processor())

    def _observe(self, chains: SampledChains, name: str) -> Observed:
        pixels = to_pixels(chains.latents)  # the state of both demo models is an image
        return observe(self.subject.extractor, Images(pixels, self.subject.labels, name), self.console)

    def _eps_error(self, quantized: LoadedModel) -> Measure:
        """Step-weighted error of the predicted noise on states that no calibration saw, by pairs of rows."""
        rows, weights = self._held_out
        eps = [_predict(model, rows) for model in (self.subject.model, quantized)]
        energy, wrong = (
            (weights * np.square(x).reshape(len(weights), -1).sum(axis=1)).reshape(-1, 2).sum(axis=1)
            for x in (eps[0], eps[1] - eps[0])
        )
        return of_mean(wrong / energy.mean())

    @cached_property
    def _held_out(self) -> tuple[CalibrationRows, NDArray[np.float64]]:
        """Rows (R,) that no calibration saw, and the weights of their squared errors."""
        model = self.subject.model
        config = QuantizationConfig(steps=self.size.steps, groups=1, rows_per_group=160, chains=4, seed=HELD_OUT)
        rows = self.subject.held_out(config.for_model(model))
        return rows, np.square(model.sampling.choose(self.size.steps).schedule.error_weights[rows.step.cpu().numpy()])


def cosine_distances(reference: Observed, found: Observed) -> NDArray[np.float64]:
    """1 - cos of the angle between the judge's features of each pair of images (N,): near LPIPS in kind, whose weights
    are not at hand."""
    a, b = (each.features.pooled.astype(np.float64) for each in (reference, found))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return 1 - cosines


def _predict(model: LoadedModel, rows: CalibrationRows) -> NDArray[np.float64]:
    import torch

    with torch.no_grad():
        output = model.call(rows.inputs)[:, : model.signature.channels]
    found: NDArray[np.float64] = output.double().cpu().numpy()
    return found


def sweep(
    jobs: Sequence[Job], seeds: Sequence[int], store: Store, measure: Callable[[Job, int, Path], Row], console: Console,
    limit: int | None = None,
) -> list[Row]:  # fmt: skip
    """Every job under every seed; what the store holds is not measured again. At most `limit` new rows."""
    rows, new = [], 0
    for job in dict.fromkeys(jobs):
        for seed in seeds:
            row = store.load(job, seed)
            if row is None:
                if limit is not None and new >= limit:
                    continue
                row = measure(job, seed, store.table(job, seed))
                store.save(row)
                new += 1
                console.say(f"{job.name}, seed {seed}: {row.cpu_seconds:.0f} s of CPU")
            rows.append(row)
    return rows


# what is written -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One job over its seeds."""

    job: Job
    seeds: int
    measures: dict[str, Measure]  # means; an interval joins those of the seeds
    calibration_cpu_seconds: float
    forward_equivalents: float

    @classmethod
    def of(cls, job: Job, rows: Sequence[Row]) -> Line:
        measures = {name: _join(name, [row.measures[name] for row in rows]) for name in rows[0].measures}
        seconds = float(np.mean([row.calibration_cpu_seconds for row in rows]))
        return cls(job, len(rows), measures, seconds, float(np.mean([row.forward_equivalents for row in rows])))


REAL = (-math.inf, math.inf)
BOUNDS = {"frechet_excess": REAL, "psnr_db": REAL, "accuracy": (0.0, 1.0)}  # of intervals; others are positive


def _join(name: str, measures: Sequence[Measure]) -> Measure:
    """The mean over seeds, with the standard error that those of the seeds give."""
    values = [measure.value for measure in measures if measure.value is not None]
    errors = [measure.standard_error for measure in measures if measure.standard_error is not None]
    mean, count = float(np.mean(values)), sum(measure.count for measure in measures)
    if len(errors) < len(values):
        return Measure(mean, None, None, count, "mean over seeds")
    error = math.sqrt(sum(value * value for value in errors)) / len(values)
    least, most = BOUNDS.get(name, (0.0, math.inf))
    return Measure(mean, max(least, mean - Z * error), min(most, mean + Z * error), count, "mean over seeds", error)


def lines_of(jobs: Sequence[Job], rows: Sequence[Row]) -> list[Line]:
    """The jobs of one table that have a row, in its order."""
    held = {job: [row for row in rows if row.job == job] for job in jobs}
    return [Line.of(job, found) for job, found in held.items() if found]


COLUMNS = {
    "frechet_distance": "Frechet distance to the data", "frechet_excess": "above float, same noise",
    "accuracy": "recognised", "final_error": "error of x_0, mean",
    "final_error_median": "median", "eps_error": "error of eps, step-weighted",
}  # fmt: skip
MORE_COLUMNS = {"psnr_db": "PSNR to float, dB", "feature_distance": "distance of the judge's features to float"}


def markdown(
    rows: Sequence[Row], size: Size, kinds: dict[str, str], model: str = "demo", chain: str = "DDPM",
    engines: Mapping[Job, Sequence[EngineRow]] | None = None,
) -> str:  # fmt: skip
    """All tables as one document. chain: the steps and the sampler, in words. engines: what was built of a job."""
    seeds, processors = sorted({row.seed for row in rows}), sorted({row.processor for row in rows})
    parts = [
        f"# Ablation and sweep, {WORDS[model]}\n",
        f"Made by `scripts/ablation --model {model}`. {size.images} images of {chain} per row and seed, seeds "
        f"{', '.join(map(str, seeds))}, fake-quantized PyTorch model; {' and '.join(processors)}; "
        + ", ".join(f"{name} {version}" for name, version in kinds.items())
        + ". Errors are squared, relative to the float model from the same noise. Means over seeds, 95 % intervals; a "
        "Frechet distance (features of the judge) is biased by the number of images, equally in every row.\n",
    ]
    floats = [row.measures["frechet_distance"].value for row in rows if row.job.preset == "float"]
    if len(floats) > 1:
        parts.append("Float model, one seed each: " + ", ".join(number(value or 0) for value in floats) + ".\n")
    titles = {
        "III": "Rows of the paper's Table III",
        "bits": "Bits, full method",
        "groups": "Groups, full method, W6A6",
        "presets": "Presets",
    }
    for name, jobs in TABLES.items():
        lines = lines_of(jobs, rows)
        if not lines:
            continue
        table = _presets_table(lines, engines or {}) if name == "presets" else _markdown_table(name, lines, model)
        parts += [f"## {titles[name]}\n", table, ""]
    return "\n".join(parts)


def _presets_table(lines: Sequence[Line], engines: Mapping[Job, Sequence[EngineRow]]) -> str:
    """Every preset at every width: errors, what the calibration cost, and what became of it as an engine."""
    columns = {**COLUMNS, **MORE_COLUMNS}
    head = ["", "bits", *columns.values(), "calibration, CPU s", "forward-equivalents of one row"]
    for backend in BACKENDS:
        head += [f"{backend}: products", f"ms per step of {IMAGES} images", "times faster than float"]
    body = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        cells = [str(line.measures[column]) if column in line.measures else "" for column in columns]
        cells += [f"{line.calibration_cpu_seconds:.0f}", f"{line.forward_equivalents:,.0f}"]
        built = {row.backend: row for row in engines.get(line.job, ())}
        for backend in BACKENDS:
            row = built.get(backend)
            cells.append(row.audit.removeprefix("quantized products: ") if row else "")
            times = (row.milliseconds, row.against_float) if row else (None, None)
            cells += ["" if value is None else number(value) for value in times]
        body.append("| " + " | ".join([line.job.preset, line.job.bits, *cells]) + " |")
    return "\n".join(body)


def _markdown_table(name: str, lines: Sequence[Line], model: str) -> str:
    third = name == "III"
    paper = third and model == "demo"  # which has classes, as the paper's model has
    head = ["", "bits", "groups", *COLUMNS.values(), *(["paper's FID, ImageNet 256"] if paper else [])]
    body = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        label = LABELS.get(line.job.preset, line.job.preset) if third else line.job.preset
        groups = str(line.job.groups) if line.job.preset == "tq-dit" else ""
        cells = [str(line.measures[column]) if column in line.measures else "" for column in COLUMNS]
        last = [number(PAPER[line.job.preset])] if paper else []
        body.append("| " + " | ".join([label, line.job.bits, groups, *cells, *last]) + " |")
    return "\n".join(body)


def to_json(
    rows: Sequence[Row], store: Store, facts: Mapping[str, Any], engines: Mapping[Job, Sequence[EngineRow]]
) -> str:
    """Every row, seed by seed, and the engines of the jobs that were built."""
    built = [{"job": asdict(job), **asdict(row)} for job, found in engines.items() for row in found]
    document = {**facts, "rows": [store.entry(row) for row in rows], "engines": built}
    return json.dumps(document, indent=1) + "\n"


def plot_front(rows: Sequence[Row], engines: Mapping[Job, Sequence[EngineRow]], path: Path) -> None:
    """Error of eps against milliseconds per step of each preset, one panel a backend; the front is a line."""
    need("matplotlib", "evaluate", "the plots")
    from matplotlib.figure import Figure

    lines = lines_of(TABLES["presets"], rows)
    figure = Figure(figsize=(7 * len(BACKENDS), 6), layout="constrained")
    panels = figure.subplots(1, len(BACKENDS), squeeze=False)[0]
    for axis, backend in zip(panels, BACKENDS, strict=True):
        for bits in BITS:
            points = [
                (row.milliseconds, line.measures["eps_error"].value or 0.0, line.job.preset)
                for line in lines if (line.job.weight_bits, line.job.activation_bits) == bits
                for row in engines.get(line.job, ()) if row.backend == backend and row.milliseconds is not None
            ]  # fmt: skip
            if not points:
                continue
            drawn = axis.plot(*zip(*[point[:2] for point in points], strict=True), "o", label="W{}A{}".format(*bits))
            front = [p for p in sorted(points) if all(q[1] >= p[1] for q in points if q[0] <= p[0])]
            axis.plot(*zip(*[p[:2] for p in front], strict=True), "-", lw=1, color=drawn[0].get_color())
            for milliseconds, error, preset in points:
                axis.annotate(preset, (milliseconds, error), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(title=backend, xlabel=f"ms per step of {IMAGES} images", ylabel=COLUMNS["eps_error"], yscale="log")
        if axis.lines:
            axis.legend()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Distance above float and error of eps of each table, with intervals."""
    need("matplotlib", "evaluate", "the plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(TABLES), 7), layout="constrained")
    panels = figure.subplots(2, len(TABLES), squeeze=False)
    for column, (name, jobs) in enumerate(TABLES.items()):
        lines = [line for line in lines_of(jobs, rows) if line.job.preset != "float"]
        for axis, metric in zip(panels[:, column], ("frechet_excess", "eps_error"), strict=True):
            _panel(axis, name, metric, lines)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


TICKS: dict[str, Callable[[Job], str]] = {
    "III": lambda job: LABELS[job.preset],
    "bits": lambda job: job.bits,
    "groups": lambda job: str(job.groups),
    "presets": lambda job: f"{job.preset} {job.bits}",
}


def _panel(axis: Any, name: str, metric: str, lines: Sequence[Line]) -> None:
    """One measure of one table."""
    found = [line.measures[metric] for line in lines]
    held = [(m.value, m.low, m.high) for m in found if m.value is not None and m.low is not None and m.high is not None]
    if held:
        values, low, high = np.array(held).T
        axis.errorbar(range(len(values)), values, yerr=[values - low, high - values], fmt="o", capsize=3)
    ticks = [TICKS[name](line.job) for line in lines]
    axis.set_xticks(range(len(ticks)), ticks, rotation={"III": 20, "presets": 75}.get(name, 0))
    title = "Frechet distance above float" if metric == "frechet_excess" else COLUMNS[metric]
    axis.set(title=f"{name}: {title}", yscale="log" if metric == "eps_error" and held else "linear")
    if metric == "frechet_excess":
        axis.axhline(0, lw=1, color="grey")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/ablation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="tables (default: all)")
    add("--bits", nargs="+", choices=[Job("", *bits).bits for bits in BITS], help="of the presets (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--model", choices=list(SUBJECTS), default="demo", help="default: %(default)s")
    add("--steps", type=int, help="of chains and calibrations (default: 50, and 28 of the text demo)")
    add("--images", type=int, default=Size.images, help="per row and seed (default: %(default)s)")
    add("--batch", type=int, default=Size.batch, help="images per forward pass (default: %(default)s)")
    add("--rows", type=Path, default=Path("build/ablation"), help="folder of the rows (default: %(default)s)")
    add("-o", "--output", type=Path, default=Path("docs/results"), help="default: %(default)s")
    add("--engines", action="store_true", help="also build the presets' tables of the first seed, and time them")
    add("--limit", type=int, metavar="N", help="measure at most N rows that are not there yet")
    add("--list", action="store_true", help="say which rows there are to do, and stop")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("-q", "--quiet", action="store_true")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except TqditError as error:
        sys.stderr.write(f"scripts/ablation: {error}\n")
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("\nscripts/ablation: interrupted; every finished row is kept. Run the same command again.\n")
        return 130


def _run(args: argparse.Namespace) -> int:
    need("matplotlib", "evaluate", "drawing the demo models' data")
    console, size = Console(args.quiet), Size(args.steps or STEPS[args.model], args.images, args.batch)
    subject = SUBJECTS[args.model](size.steps, size.images, size.batch)
    subject = replace(subject, model=subject.model.to(args.device))
    kinds = versions(subject.model.device)
    name = "ablation" if args.model == "demo" else f"ablation-{args.model}"
    store = Store(args.rows, size, subject.model.fingerprint, kinds, args.output / f"{name}.json")
    jobs = [job for name in args.only for job in TABLES[name]
            if args.bits is None or name != "presets" or job.bits in args.bits]  # fmt: skip
    missing = [(job, seed) for job in dict.fromkeys(jobs) for seed in args.seeds if store.load(job, seed) is None]
    console.say(f"{len(missing)} of {len(set(jobs)) * len(args.seeds)} rows are to do")
    if args.list:
        for job, seed in missing:
            sys.stdout.write(f"{job.name} seed {seed}\n")
        return 0
    bench = Bench(subject, size, args.rows / "work", Console(quiet=True))
    rows = sweep(jobs, args.seeds, store, bench.measure, console, args.limit)
    engines = _engines(subject, store, args, console)
    chain = str(subject.model.sampling.choose(size.steps))
    facts = {"size": asdict(size), "versions": kinds, "chain": chain}
    text = markdown(rows, size, kinds, args.model, chain, engines)
    for suffix, content in ((".md", text), (".json", to_json(rows, store, facts, engines))):
        with whole_file(args.output / f"{name}{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    plot(rows, args.output / f"{name}.png")
    if engines:
        plot_front(rows, engines, args.output / f"{name}-front.png")
    sys.stdout.write(f"{args.output / name}.md\n")
    return 0


def _engines(subject: Subject, store: Store, args: argparse.Namespace, console: Console) -> dict[Job, list[EngineRow]]:
    """Of each preset whose table of the first seed is there."""
    bench = EngineBench(subject, args.rows / f"engines-{args.model}")
    found = {}
    for job in TABLES["presets"]:
        table = store.table(job, args.seeds[0])
        if table.is_file() and (args.engines or bench.is_kept(table)):
            found[job] = bench.rows(table)
            console.say(f"{job.name}: " + "; ".join(f"{row.backend}: {row.audit}" for row in found[job]))
    return found


if __name__ == "__main__":
    sys.exit(main())
