"""What can be evaluated, images from files or an engine, and what is written about it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import check_memory
from tqdit.card import GraphCard
from tqdit.console import Console
from tqdit.demo import captions
from tqdit.demo.weights import TEXT
from tqdit.engines.bundle import Manifest, read_manifest
from tqdit.engines.run.requests import Prompts, encode, read_embeddings
from tqdit.engines.run.sampler import Sampler, bytes_per_image, image_size
from tqdit.engines.run.shards import SamplingJob, describe_job
from tqdit.errors import MissingLibraryError, UsageError
from tqdit.evaluate import chains
from tqdit.evaluate.bootstrap import Measure
from tqdit.evaluate.calls import check_calls, measure_calls, to_json
from tqdit.evaluate.chains import SampledChains
from tqdit.evaluate.evaluation import Metrics, Pairs, pair_up, plain, seed_noise, verdict
from tqdit.evaluate.extractors import Extractor
from tqdit.evaluate.judges import letters
from tqdit.evaluate.layers import look_inside, scales_over_time
from tqdit.evaluate.lpips import Lpips
from tqdit.evaluate.observe import Observed, Outline, observe
from tqdit.evaluate.samples import SHOWN, Images, read_images
from tqdit.evaluate.tools import MeasurementOptions, choose_metrics, describe, write_reference
from tqdit.interface import Interface
from tqdit.models.load import needs_calls
from tqdit.models.recording import Recording
from tqdit.quantization.table import ScaleTable, even_boundaries, is_scale_table, read_scale_table
from tqdit.sampling.schedule import SamplingSpec, samplers_of

SCALES = "scales.safetensors"
CAPTIONS = 1024  # of the text demo at most, in turn, if no prompts are given
GROUPS = 10  # of timesteps that errors are shown for, if the engine has none of its own

Facts = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is written: facts as JSON, and pictures for the report by name, uint8 (N, H, W, 3)."""

    facts: Facts
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


# images from files -------------------------------------------------------------------------------------------------


def evaluate_images(path: Path, count: int | None, measurement: MeasurementOptions, console: Console) -> Evaluation:
    """Measure the first `count` images of a file or a folder, or all."""
    images = read_images(path, count)
    make_metrics = choose_metrics(measurement, console, images.shape, None)
    if make_metrics is None:
        raise UsageError(
            f"{path}: {images.shape[1]}x{images.shape[0]} images need an extractor. Pass --inception-weights FILE."
        )
    metrics = make_metrics()
    console.say(f"measuring {len(images)} images of {path} with {metrics.extractor.name}")
    shown = images.shown
    metrics.choose(Outline(str(path), len(images), images.labels is not None))  # before the work
    observed = observe(metrics.extractor, images, console)
    found = metrics.measure(observed)
    if measurement.write_reference is not None:
        write_reference(measurement.write_reference, observed)
    facts = describe({"seed": measurement.seed}, metrics) | {
        "subject": {"name": str(path), "kind": "images", "count": len(images)},
        "verdict": verdict(str(path), found, [], None, None),
        "sets": {"samples": _to_json(found)},
    }
    return Evaluation(facts, {"samples": shown})


# an engine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is compared with, and what both sample. None: what the engine's card proposes."""

    against: Path | None = None  # a float engine; None: one that is built from the checkpoint
    alone: bool = False  # no float engine
    count: int = 64
    seed: int = 0
    float_seeds: int = 1  # other seeds of the float model
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    steps: int | None = None
    sampler: str | None = None
    batch: int = 16
    threads: int | None = None
    lpips_weights: tuple[Path, Path] | None = None
    scales: Path | None = None  # None: the table beside the engine, if it is for this model
    calls: tuple[int, ...] = ()  # numbers of network calls that samplers and spacings are compared at
    layer_errors: bool = False
    diagnosed: int | None = None  # layers that remedies are tried on; None: no diagnosis
    prompts: tuple[str, ...] = ()  # of an engine with text encoders, in turn
    embeddings: Path | None = None  # what an engine of text takes of each prompt, in turn
    rows: Path | None = None  # recorded calls; None: those that the calibration kept beside the table

    @property
    def settings(self) -> dict[str, Any]:
        """Those that the sampling depends on."""
        names = ("seed", "float_seeds", "batch", "threads", "guidance_scale", "guidance_interval", "steps", "sampler")
        return {name: getattr(self, name) for name in names}


def evaluate_engine(
    path: Path, options: EngineOptions, measurement: MeasurementOptions, console: Console
) -> Evaluation:
    """Sample an engine beside its float model, and measure both."""
    manifest = read_manifest(path)
    card, size = manifest.card, image_size(manifest.card)
    prompts = _prompts(path, card, options)
    job = describe_job(
        path, manifest, prompts, options.seed, options.count, options.batch,
        guidance_scale=options.guidance_scale, steps=options.steps, sampler=options.sampler,
        guidance_interval=options.guidance_interval,
    )  # fmt: skip
    _check_memory(card, job, options)
    if options.calls:
        check_calls(card.sampling, options.calls)
    if remark := card.remark(card.sampling.choose(**job.chain)):
        console.say(remark)
    table = _scale_table(path, manifest, options, console)
    calls = _recorded_calls(path, card, options)
    interface = next((each.interface for each in (calls, table) if each is not None), None)
    lpips = None if options.lpips_weights is None else Lpips(*options.lpips_weights)  # refuses a bad file at once
    make_metrics = None if size is None else choose_metrics(measurement, console, size, card)
    with contextlib.ExitStack() as stack:
        sampler = stack.enter_context(Sampler.open(path, batch=options.batch, threads=options.threads))
        subject = _Engine(str(path), manifest, sampler)
        floating = None if options.alone else stack.enter_context(_float_engine(options, manifest, interface, console))
        metrics = None if make_metrics is None else make_metrics()
        if metrics is not None:
            metrics.choose(Outline(str(path), job.count, shown(job, metrics.extractor) is not None))
        comparison = _Comparison(subject, floating, options, job, prompts, console, lpips, metrics)
        evaluation = comparison.evaluate(measurement.write_reference)
    return replace(evaluation, facts=evaluation.facts | _look_inside(path, manifest, table, calls, options, console))


def _prompts(path: Path, card: GraphCard, options: EngineOptions) -> Prompts | None:
    """What the images of an engine of text show; None: of another engine."""
    if options.prompts:
        return encode(path, card, options.prompts)
    if options.embeddings is not None:
        return read_embeddings(options.embeddings, card.signature)
    if card.text is not None and card.model == TEXT:
        return encode(path, card, captions.draw_captions(min(options.count, CAPTIONS), held_out=True))
    if card.text is not None and card.signature.label is None:
        raise UsageError(f"{path}: images of this engine show prompts. Pass --prompts FILE, one in each line.")
    return None


def shown(job: SamplingJob, extractor: Extractor) -> NDArray[np.int64] | None:
    """What each image should show (N,): its class, or the number of its prompt, for a judge the letter of its caption.

    None if there is no such thing, or a judge does not know it.
    """
    numbers = replace(job, shard_size=job.count).labels(0)
    if job.prompts is None or numbers is None or not extractor.is_judge:
        return numbers
    wanted = letters(job.prompts.texts)
    return None if wanted is None else wanted[numbers]


def _recorded_calls(path: Path, card: GraphCard, options: EngineOptions) -> Recording | None:
    """The calls that rows of a recorded model are taken from: of --rows, or the latest that a calibration kept; None
    if neither is there, and for any other model."""
    if options.rows is not None:
        return Recording.load(options.rows)
    if not needs_calls(card.model):
        return None
    folder = _work_folder(path, options)
    kept = sorted(folder.glob("calls-*.safetensors"), key=lambda file: file.stat().st_mtime)
    if options.diagnosed is not None and not kept:
        raise UsageError(
            f"--layers needs recorded calls of {card.model}; there are none in {folder}. Pass --rows FILE."
        )
    return Recording.load(kept[-1]) if kept else None


def _work_folder(path: Path, options: EngineOptions) -> Path:
    """Where the calibration kept its rows, unless it was told another place."""
    return (options.scales or path.parent / SCALES).with_suffix(".safetensors.work")


def _check_memory(card: GraphCard, job: SamplingJob, options: EngineOptions) -> None:
    """Every set stays in memory, and so do the states after each step of a batch of the float chains."""
    sets, steps = 2 + options.float_seeds, job.steps * min(job.count, job.shard_size)
    size = sets * job.count * bytes_per_image(card)[0] + steps * 4 * math.prod(card.state_shape)
    check_memory(f"{sets} sets of {job.count} images", size, "Pass a smaller -n or --float-seeds.")


@dataclass(frozen=True, eq=False)
class _Engine:
    name: str
    manifest: Manifest
    sampler: Sampler

    @property
    def title(self) -> str:
        bits = self.manifest.card.quantization
        return f"{self.name} ({'float' if bits is None else f'W{bits.weight_bits}A{bits.activation_bits}'})"


@contextlib.contextmanager
def _float_engine(
    options: EngineOptions, manifest: Manifest, interface: Interface | None, console: Console
) -> Iterator[_Engine | None]:
    """The engine to compare with: the one given, one built from the checkpoint, or none for a float engine."""
    card = manifest.card
    with contextlib.ExitStack() as stack:
        path = options.against
        if path is None:
            if card.quantization is None:
                yield None
                return
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            console.say(f"building a float engine of {card.model} to compare with")
            try:
                path = chains.float_engine(card, folder, manifest.backend, interface)
            except MissingLibraryError as error:
                raise MissingLibraryError(f"{error} Or pass a float engine with --against, or --alone.") from error
        sampler = stack.enter_context(Sampler.open(path, batch=options.batch, threads=options.threads))
        chains.check_comparable(sampler.card, card)
        yield _Engine(str(options.against or "built from the checkpoint"), read_manifest(path), sampler)


@dataclass(frozen=True, eq=False)
class _Comparison:
    """One engine, the float one beside it, and what is sampled with both."""

    subject: _Engine
    floating: _Engine | None
    options: EngineOptions
    job: SamplingJob
    prompts: Prompts | None  # of the job
    console: Console
    lpips: Lpips | None
    metrics: Metrics | None

    def evaluate(self, reference: Path | None) -> Evaluation:
        """reference: where the statistics of the samples go."""
        runs, pairs = self._sample()
        metrics, measured = self.metrics, dict[str, dict[str, Measure]]()
        if metrics is not None:
            measured, pairs = self._measure(runs, pairs, metrics, reference)
        subject = measured.get("subject", {})
        floats = [found for name, found in measured.items() if name.startswith("float")]
        distances = [found["frechet_distance"] for found in floats if "frechet_distance" in found]
        noise = seed_noise(subject["frechet_distance"], distances) if "frechet_distance" in subject else None
        facts = describe(self.options.settings, metrics) | {
            "subject": self._describe(),
            "verdict": verdict(self.subject.title, subject, floats, noise, pairs),
            "sets": {name: _to_json(found) for name, found in measured.items()},
            "seed_noise": None if noise is None else asdict(noise),
            "paired": None if pairs is None else _to_json(pairs.measures),
            "groups": [] if pairs is None else list(pairs.groups),
            "steps": [] if pairs is None else [float(value) for value in pairs.steps],
            "timesteps": [plain(timestep) for timestep in self._timesteps],
            "engines": self._engines(runs),
            "calls": self._calls("frechet_distance" in subject),
        }
        pictures = {name: run.pixels[:SHOWN] for name, run in runs.items() if run.pixels is not None}
        return Evaluation(facts, {name: pictures[name] for name in ("float", "subject") if name in pictures})

    def _calls(self, has_distance: bool) -> list[Facts]:
        """Error and distance of each sampler and spacing against network calls, if they are asked for.

        Samplers that add noise end with other images, which a distance alone compares."""
        if not self.options.calls:
            return []
        metrics, floating = self.metrics, self.floating or self.subject
        process = self._spec.process.noising
        samplers = samplers_of(process) if has_distance and process is not None else ()

        def distance(run: SampledChains) -> Measure | None:
            if metrics is None or run.pixels is None:
                return None
            return metrics.distance(self._observe(run, metrics.extractor))

        points = measure_calls(
            self.subject.sampler, floating.sampler, self.job, self.options.calls, self.console, distance,
            samplers=samplers, prompts=self.prompts,
        )  # fmt: skip
        return to_json(points)

    @property
    def _spec(self) -> SamplingSpec:
        return self.subject.manifest.card.sampling.choose(**self.job.chain)

    @property
    def _timesteps(self) -> NDArray[np.float64]:
        return self._spec.schedule.timesteps

    def _sample(self) -> tuple[dict[str, SampledChains], Pairs | None]:
        """The chains of each set by name, and the pairs of both engines."""
        job, subject = self.job, self.subject.sampler
        full = job.full_calls if self.floating is None else ()  # of the float model, as in pairs
        others = {f"float, seed {seed}": replace(job, seed=seed, full_calls=full) for seed in self._other_seeds}
        total = job.shards * job.steps * (1 + (self.floating is not None) + len(others))
        with self.console.bar(total, "sampling", "steps") as bar:
            if self.floating is None:
                runs = {"subject": chains.run(subject, job, bar.update, self.prompts)}
            else:
                reference, found = chains.run_pair(self.floating.sampler, subject, job, bar.update, self.prompts)
                runs = {"subject": found, "float": reference}
            of_float = subject if self.floating is None else self.floating.sampler
            runs |= {name: chains.run(of_float, other, bar.update, self.prompts) for name, other in others.items()}
        runs = {name: self._with_images(found) for name, found in runs.items()}
        return runs, self._pair_up(runs) if self.floating is not None else None

    def _with_images(self, found: SampledChains) -> SampledChains:
        """A float engine that was built for this, or was exported without --vae, has no decoder: the subject's has."""
        if found.pixels is not None or not self.subject.sampler.makes_images:
            return found
        return replace(found, pixels=self.subject.sampler.to_images(found.latents))

    @property
    def _other_seeds(self) -> range:
        """Of the float model, if there is one."""
        has_float = self.floating is not None or self.subject.manifest.card.quantization is None
        return range(self.job.seed + 1, self.job.seed + 1 + self.options.float_seeds * has_float)

    def _pair_up(self, runs: Mapping[str, SampledChains]) -> Pairs:
        card = self.subject.manifest.card
        groups = () if card.quantization is None else card.quantization.boundaries
        boundaries = groups or even_boundaries(GROUPS, card.sampling.process.span)
        return pair_up(runs["float"], runs["subject"], self._timesteps, boundaries, self.lpips)

    def _measure(
        self, runs: Mapping[str, SampledChains], pairs: Pairs | None, metrics: Metrics, reference: Path | None
    ) -> tuple[dict[str, dict[str, Measure]], Pairs | None]:
        """The metrics of each set, and the pairs with the distance above float."""
        self.console.say(f"measuring with {metrics.extractor.name}")
        seen = {name: self._observe(run, metrics.extractor) for name, run in runs.items()}
        measured = {name: metrics.measure(observed) for name, observed in seen.items()}
        if pairs is not None and "float" in seen:
            excess = metrics.excess(seen["subject"], seen["float"])
            if excess is not None:
                pairs = replace(pairs, measures={"frechet_excess": excess, **pairs.measures})
        if reference is not None:
            write_reference(reference, seen["subject"])
        return measured, pairs

    def _observe(self, run: SampledChains, extractor: Extractor) -> Observed:
        assert run.pixels is not None
        return observe(extractor, Images(run.pixels, shown(self.job, extractor), self.subject.name), self.console)

    def _describe(self) -> Facts:
        card, job = self.subject.manifest.card, self.job
        return {
            "name": self.subject.name, "kind": "engine", "count": job.count, "model": card.model,
            "fingerprint": card.fingerprint, "sampler": job.sampler, "steps": job.steps, "chain": str(self._spec),
            "guidance_scale": job.guidance_scale, "prompts": None if job.prompts is None else str(job.prompts),
            "quantization": None if card.quantization is None else card.quantization.summary,
        }  # fmt: skip

    def _engines(self, runs: Mapping[str, SampledChains]) -> list[Facts]:
        """Size and speed of each engine that ran."""
        engines = {"subject": self.subject} | ({} if self.floating is None else {"float": self.floating})
        return [
            {
                "set": name, "name": engine.name, "backend": engine.manifest.backend,
                "precision": engine.manifest.precision, "float_type": engine.manifest.float_type,
                "size_mb": sum(part.size_bytes for part in engine.manifest.files.values()) / 1e6,
                "ms_per_image_and_step": 1000 * runs[name].seconds / self.job.count / self.job.steps,
                "batch": self.options.batch,
                "audit": None if engine.manifest.audit is None else engine.manifest.audit.line,
                "versions": engine.manifest.versions,
            }
            for name, engine in engines.items()
        ]  # fmt: skip


def _to_json(measures: Mapping[str, Measure]) -> Facts:
    return {name: measure.to_json() for name, measure in measures.items()}


def _look_inside(
    path: Path, manifest: Manifest, table: ScaleTable | None, calls: Recording | None, options: EngineOptions,
    console: Console,
) -> Facts:  # fmt: skip
    """Scales over time, layer errors and the diagnosis, if there is a scale table."""
    facts: Facts = {"scales": [], "layers": None, "diagnosis": None}
    if table is None:
        return facts
    facts["scales"] = scales_over_time(table)
    card, kept = manifest.card, _work_folder(path, options)
    if calls is None and needs_calls(card.model) and options.diagnosed is None:
        return facts  # the report goes without errors of layers
    if options.layer_errors or options.diagnosed is not None:
        facts |= look_inside(table, card, kept, options.diagnosed, console, calls)
    return facts


def _scale_table(path: Path, manifest: Manifest, options: EngineOptions, console: Console) -> ScaleTable | None:
    """The table that was named, or the one beside the engine if it is for this model."""
    card, beside = manifest.card, path.parent / SCALES
    if options.scales is not None:
        table = read_scale_table(options.scales)
        table.check_model(card.fingerprint, card.model)
        return table
    if card.quantization is not None and beside.is_file() and is_scale_table(beside):
        table = read_scale_table(beside)
        if table.fingerprint == card.fingerprint:
            return table
        console.say(f"{beside} is for another model and is left out")
    if options.diagnosed is not None:
        raise UsageError(
            f"--layers needs the scale table of the engine, and {beside} is not one. Pass it with --scales."
        )
    return None
