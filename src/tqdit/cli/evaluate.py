"""`tqdit-evaluate [SAMPLES|ENGINE]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.console import Console
from tqdit.engines.bundle import MANIFEST, Manifest, read_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import MissingLibraryError, UsageError
from tqdit.evaluate.names import METRICS
from tqdit.evaluate.tables import summary
from tqdit.extras import need
from tqdit.files import check_writable, whole_file
from tqdit.quantization.table import even_boundaries

if TYPE_CHECKING:
    from tqdit.evaluate.chains import Request, SampledChains
    from tqdit.evaluate.evaluation import Pairs
    from tqdit.evaluate.extractors import Extractor
    from tqdit.evaluate.observe import Observed
    from tqdit.evaluate.tools import MeasurementOptions
    from tqdit.quantization.table import ScaleTable

SUMMARY = "say what quantization cost: distances to a reference, same-noise errors, a report"
EXAMPLES = """\
examples:
  tqdit-evaluate                                      model.engine of the demo model, against its float model and data
  tqdit-evaluate int8.engine --against float.engine -n 256 --report report.html
  tqdit-evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights inception.pth
  tqdit-evaluate samples/ --reference reference/ --inception-weights inception.pth
                                                      folders of shards; the same command continues after a stop
  tqdit-evaluate --layers                             which layers cost most, and what would mend them

Numbers are written as JSON, each with its sample count and 95 % interval. Nothing is downloaded: Inception's weights
come from a local file. docs/evaluation.md explains every number and has the recipe for ImageNet."""

SCALES = "scales.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("subject", nargs="?", type=Path, default=Path("model.engine"), metavar="SAMPLES|ENGINE", help="an .npz, a "
        "folder of images or of shards, or an engine bundle (default: %(default)s)")  # fmt: skip
    add("--reference", type=Path, metavar="REF", help="samples (arr_0) or statistics (mu, sigma, mu_s, sigma_s) as "
        ".npz, or a folder of images or of shards (default for the demo model: fresh drawings of its data "
        "set)")  # fmt: skip
    add("--against", type=Path, metavar="ENGINE", help="float engine to compare with on the same noise (default: one "
        "that is built from the checkpoint, if it is available)")  # fmt: skip
    add("--alone", action="store_true", help="do not compare with a float model")
    add("-n", type=int, metavar="N", help="images (default: 64 from an engine, all of a file or folder; the first "
        "N of a sampling job need not wait for the others)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--float-seeds", type=int, default=1, metavar="K", help="other seeds of the float model, which show its own "
        "noise (default: %(default)s)")  # fmt: skip
    add("--guidance-scale", type=float, metavar="S", help="default: the engine's own")
    add("--batch", type=int, default=16, help="images per engine call at most (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: the backend's choice)")
    add("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"of {', '.join(METRICS)} (default: all that "
        "can be had; one that is named and cannot be had is an error)")  # fmt: skip
    add("--inception-weights", type=Path, metavar="FILE", help="torch-fidelity's InceptionV3 weights, a local .pth")
    add("--lpips-weights", type=Path, nargs=2, metavar=("VGG", "LIN"), help="torchvision's VGG16 and LPIPS' linear "
        "weights, local .pth files, for LPIPS between pairs")  # fmt: skip
    add("--bootstrap", type=int, metavar="N", help="resamples of a distance's interval (default: 200 for the judge, 20 "
        "for Inception, whose 2048 features make one slow)")  # fmt: skip
    add("--write-reference", type=Path, metavar="FILE", help="also keep the statistics of the samples as a reference")
    add("--layers", action="store_true", help="also find what each layer adds to the error and what would mend it, and "
        "write diagnosis.json beside the output")  # fmt: skip
    add(
        "--diagnosed", type=int, default=8, metavar="N", help="layers that remedies are tried on (default: %(default)s)"
    )
    add("--scales", type=Path, metavar="FILE", help=f"scale table of the engine, for step sizes and --layers (default: "
        f"{SCALES} beside the engine, if it fits)")  # fmt: skip
    add("--report", type=Path, metavar="HTML", help="also write one self-contained page")
    add("-o", "--output", type=Path, default=Path("evaluation.json"), help="default: %(default)s")


def run(args: argparse.Namespace, console: Console) -> Path:
    for library in ("torch", "safetensors", "torchmetrics", *(("jinja2", "matplotlib") if args.report else ())):
        need(library, "evaluate", "tqdit-evaluate")
    _check(args)
    output: Path = args.output
    for path in (output, args.report, args.write_reference):
        if path is not None:
            check_writable(path)
    is_engine = (args.subject / MANIFEST).is_file() or not args.subject.exists()
    evaluation = _evaluate_engine(args, console) if is_engine else _evaluate_files(args, console)
    if args.report is not None:
        from tqdit.evaluate.report import write_report

        write_report(args.report, evaluation.facts, evaluation.pictures)
        console.say(f"report: {args.report}")
    _write_json(output, evaluation.facts)
    print(summary(evaluation.facts))
    return output


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _options(args: argparse.Namespace) -> MeasurementOptions:
    from tqdit.evaluate.tools import MeasurementOptions

    metrics = None if not args.metrics else tuple(args.metrics)
    return MeasurementOptions(
        args.reference, args.inception_weights, metrics, args.bootstrap, args.seed, args.write_reference
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("seed", "float_seeds", "batch", "threads", "guidance_scale")
    return {name: getattr(args, name) for name in names}


def _check(args: argparse.Namespace) -> None:
    for name, least in (("n", 1), ("batch", 1), ("seed", 0), ("float_seeds", 0), ("bootstrap", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = "-n" if name == "n" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is {value}; it must be at least {least}.")
    if args.alone and args.against is not None:
        raise UsageError("--alone and --against ENGINE exclude each other. Pass one of them.")


@dataclass(eq=False)
class Evaluation:
    """What is written: facts as JSON, and pictures for the report by name, uint8 (N, H, W, 3)."""

    facts: dict[str, Any]
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


# images from files -------------------------------------------------------------------------------------------------


def _evaluate_files(args: argparse.Namespace, console: Console) -> Evaluation:
    from tqdit.evaluate.evaluation import verdict
    from tqdit.evaluate.observe import observe
    from tqdit.evaluate.samples import read_images
    from tqdit.evaluate.tools import choose_tools, describe, write_reference

    for flag, given in (("--against", args.against), ("--layers", args.layers), ("--scales", args.scales)):
        if given:
            raise UsageError(f"{flag} needs an engine; {args.subject} holds images. Pass the engine that made them.")
    images = read_images(args.subject, args.n)
    tools = choose_tools(_options(args), console, images.shape, None)
    if tools is None:
        raise UsageError(
            f"{args.subject}: {images.shape[1]}x{images.shape[0]} images need an extractor. Pass --inception-weights "
            "FILE."
        )
    console.say(f"measuring {len(images)} images of {args.subject} with {tools.extractor.name}")
    pictures = {"samples": images.shown}
    observed = observe(tools.extractor, images, console)
    found = tools.metrics.measure(observed)
    if args.write_reference is not None:
        write_reference(args.write_reference, observed)
    facts = describe(_settings(args), tools) | {
        "subject": {"name": str(args.subject), "kind": "images", "count": len(images)},
        "verdict": verdict(str(args.subject), found, [], None, None),
        "sets": {"samples": {name: measure.to_json() for name, measure in found.items()}},
    }
    return Evaluation(facts, pictures)


# an engine ---------------------------------------------------------------------------------------------------------


def _evaluate_engine(args: argparse.Namespace, console: Console) -> Evaluation:
    from tqdit.evaluate.tools import check_reference

    manifest = read_manifest(args.subject)
    card = manifest.card
    check_reference(_options(args), card)
    table = _scale_table(args, card, console)
    with contextlib.ExitStack() as stack:
        sampler = stack.enter_context(Sampler.open(args.subject, batch=args.batch, threads=args.threads))
        floating = None if args.alone else stack.enter_context(_float_engine(args, manifest, console))
        return _Engines(args, console, manifest, sampler, floating, table).evaluate()


@dataclass(frozen=True, eq=False)
class _Float:
    sampler: Sampler
    manifest: Manifest
    name: str


@contextlib.contextmanager
def _float_engine(args: argparse.Namespace, manifest: Manifest, console: Console) -> Iterator[_Float | None]:
    """The engine to compare with: the one given, one built from the checkpoint if it is available, or none."""
    from tqdit.evaluate.chains import check_comparable, float_engine

    card = manifest.card
    with contextlib.ExitStack() as stack:
        path = args.against
        if path is None:
            if card.quantization is None:
                yield None  # it is float itself
                return
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            console.say(f"building a float engine of {card.model} to compare with")
            try:
                path = float_engine(card, folder, manifest.backend)
            except MissingLibraryError as error:
                raise MissingLibraryError(f"{error} Or pass a float engine with --against, or --alone.") from error
        sampler = stack.enter_context(Sampler.open(path, batch=args.batch, threads=args.threads))
        check_comparable(sampler.card, card)
        yield _Float(sampler, read_manifest(path), str(args.against or "built from the checkpoint"))


class _Engines:
    """One engine, the float one beside it, and what is sampled with both."""

    def __init__(
        self, args: argparse.Namespace, console: Console, manifest: Manifest, sampler: Sampler, floating: _Float | None,
        table: ScaleTable | None,
    ) -> None:  # fmt: skip
        from tqdit.evaluate.lpips import Lpips

        self.args, self.console, self.manifest = args, console, manifest
        self.sampler, self.floating, self.table = sampler, floating, table
        self.card = manifest.card
        self.lpips = None if args.lpips_weights is None else Lpips(*args.lpips_weights)  # refuses a bad file at once
        self.count = 64 if args.n is None else int(args.n)
        self.labels = np.arange(self.count, dtype=np.int64) % self.card.num_classes

    def evaluate(self) -> Evaluation:
        from tqdit.evaluate.evaluation import seed_noise, verdict
        from tqdit.evaluate.samples import SHOWN
        from tqdit.evaluate.tools import choose_tools, describe, write_reference

        runs, pairs = self._sample()
        tools = None
        sets: dict[str, dict[str, Any]] = {}
        measured = {}
        if runs["subject"].pixels is not None:
            tools = choose_tools(_options(self.args), self.console, runs["subject"].pixels.shape[1:], self.card)
        if tools is not None:
            self.console.say(f"measuring with {tools.extractor.name}")
            seen = {name: self._observe(chains, tools.extractor) for name, chains in runs.items()}
            for name, observed in seen.items():
                measured[name] = tools.metrics.measure(observed)
                sets[name] = {key: measure.to_json() for key, measure in measured[name].items()}
            if pairs is not None and "float" in seen:
                excess = tools.metrics.excess(seen["subject"], seen["float"])
                if excess is not None:
                    pairs = replace(pairs, measures={"frechet_excess": excess, **pairs.measures})
            if self.args.write_reference is not None:
                write_reference(self.args.write_reference, seen["subject"])
        floats = [found for name, found in measured.items() if name.startswith("float")]
        distances = [found["frechet_distance"] for found in floats if "frechet_distance" in found]
        subject = measured.get("subject", {})
        noise = None
        if "frechet_distance" in subject:
            noise = seed_noise(subject["frechet_distance"], distances)
        facts = describe(_settings(self.args), tools) | {
            "subject": self._describe(),
            "verdict": verdict(self._name(), subject, floats, noise, pairs),
            "sets": sets,
            "seed_noise": None if noise is None else asdict(noise),
            "paired": None if pairs is None else {name: m.to_json() for name, m in pairs.measures.items()},
            "groups": [] if pairs is None else list(pairs.groups),
            "steps": [] if pairs is None else [float(value) for value in pairs.steps],
            "timesteps": self.card.sampling.schedule.timesteps.tolist(),
            "engines": self._engines(runs),
        }
        facts |= self._look_inside()
        pictures = {name: run.pixels[:SHOWN] for name, run in runs.items() if run.pixels is not None}
        return Evaluation(facts, {name: pictures[name] for name in ("float", "subject") if name in pictures})

    def _name(self) -> str:
        bits = self.card.quantization
        what = "float" if bits is None else f"W{bits.weight_bits}A{bits.activation_bits}"
        return f"{self.args.subject} ({what})"

    def _describe(self) -> dict[str, Any]:
        card = self.card
        return {
            "name": str(self.args.subject), "kind": "engine", "count": self.count, "model": card.model,
            "fingerprint": card.fingerprint, "sampler": card.sampling.sampler, "steps": card.sampling.steps,
            "guidance_scale": card.guidance_scale if self.args.guidance_scale is None else self.args.guidance_scale,
            "quantization": None if card.quantization is None else card.quantization.summary,
        }  # fmt: skip

    def _observe(self, chains: SampledChains, extractor: Extractor) -> Observed:
        from tqdit.evaluate.observe import observe
        from tqdit.evaluate.samples import Images

        assert chains.pixels is not None
        return observe(extractor, Images(chains.pixels, self.labels, str(self.args.subject)), self.console)

    def _request(self, seed: int) -> Request:
        from tqdit.evaluate.chains import Request

        return Request(self.labels, self.args.guidance_scale, seed)

    def _sample(self) -> tuple[dict[str, SampledChains], Pairs | None]:
        from tqdit.evaluate import chains
        from tqdit.evaluate.evaluation import pair_up

        seeds = [self.args.seed + 1 + k for k in range(self.args.float_seeds)]
        of_float = self.floating.sampler if self.floating is not None else self.sampler
        total = self.sampler.steps_for(self.count) * (1 + (self.floating is not None) + len(seeds))
        with self.console.bar(total, "sampling", "steps") as bar:
            if self.floating is None:
                runs = {"subject": chains.run(self.sampler, self._request(self.args.seed), bar.update)}
                if self.card.quantization is not None:
                    seeds = []
            else:
                reference, found = chains.run_pair(
                    of_float, self.sampler, self._request(self.args.seed), bar.update
                )  # fmt: skip
                runs = {"subject": found, "float": reference}
            for seed in seeds:
                runs[f"float, seed {seed}"] = chains.run(of_float, self._request(seed), bar.update)
        if self.floating is None:
            return runs, None
        quantization = self.card.quantization
        boundaries = quantization.boundaries if quantization is not None else ()
        timesteps = self.card.sampling.schedule.timesteps
        groups = boundaries or even_boundaries(10).tolist()
        return runs, pair_up(runs["float"], runs["subject"], timesteps, groups, self.lpips)

    def _engines(self, runs: dict[str, SampledChains]) -> list[dict[str, Any]]:
        """Size and speed of each engine that ran."""
        found = [("subject", str(self.args.subject), self.manifest)]
        if self.floating is not None:
            found.append(("float", self.floating.name, self.floating.manifest))
        return [
            {
                "set": name, "name": source, "backend": manifest.backend, "precision": manifest.precision,
                "float_type": manifest.float_type,
                "size_mb": sum(part.size_bytes for part in manifest.files.values()) / 1e6,
                "ms_per_image_and_step": 1000 * runs[name].seconds / self.count / self.card.sampling.steps,
                "batch": self.args.batch, "audit": None if manifest.audit is None else manifest.audit.line,
                "versions": manifest.versions,
            }
            for name, source, manifest in found
        ]  # fmt: skip

    def _look_inside(self) -> dict[str, Any]:
        """Scales over time, layer errors and the diagnosis, if there is a scale table. Writes diagnosis.json."""
        from tqdit.evaluate.layers import look_inside, scale_steps

        args = self.args
        facts: dict[str, Any] = {"scale_steps": [], "layers": None, "diagnosis": None}
        if self.table is None:
            return facts
        facts["scale_steps"] = scale_steps(self.table)
        if args.layers or args.report is not None:
            scales = args.scales or args.subject.parent / SCALES
            kept_rows = scales.with_suffix(".safetensors.work")
            facts |= look_inside(
                self.table, self.card, kept_rows, args.diagnosed if args.layers else None, self.console
            )  # fmt: skip
        if args.layers:
            path = args.output.with_name("diagnosis.json")
            _write_json(path, facts["diagnosis"])
            self.console.say(f"diagnosis: {path}")
        return facts


def _scale_table(args: argparse.Namespace, card: GraphCard, console: Console) -> ScaleTable | None:
    """The table that was named, or the one beside the engine where it is for this model."""
    from tqdit.quantization.table import is_scale_table, read_scale_table

    beside = args.subject.parent / SCALES
    if args.scales is not None:
        table = read_scale_table(args.scales)
        table.check_model(card.fingerprint, card.model)
        return table
    if card.quantization is not None and beside.is_file() and is_scale_table(beside):
        table = read_scale_table(beside)
        if table.fingerprint == card.fingerprint:
            return table
        console.say(f"{beside} is for another model and is left out")
    if args.layers:
        raise UsageError(f"--layers needs the scale table of the engine, and {beside} is none. Pass it with --scales.")
    return None
