"""`tqdit-inspect FILE`: what any of our files is, in a few lines.

One function per kind of file; the first whose file it is answers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from tqdit import safetensors_file
from tqdit.card import SHIPPED, GraphCard
from tqdit.console import Console
from tqdit.engines.bundle import MANIFEST, Verified, check_parts, read_manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.gpu import GpuShare
from tqdit.engines.run.sampler import has_pixels
from tqdit.engines.run.shards import INDEX, read_index
from tqdit.engines.run.verify import verify_bundle
from tqdit.errors import FileFormatError, LintError, MissingLibraryError, UsageError
from tqdit.extras import need, need_part
from tqdit.files import NPZ, NPZ_ERRORS, SAFETENSORS, check_writable, npz_headers, reading
from tqdit.interface import RECORDING_KEY, REQUEST, RecordingHeader
from tqdit.onnx_header import OnnxHeader
from tqdit.ports import Port, Signature
from tqdit.quantization import summary as scale_table_summary
from tqdit.quantization.table import is_scale_table, read_scale_table
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.schedule import SamplingSpec, samplers_of
from tqdit.text import TextCard

SUMMARY = "say what a file is: checkpoint, recorded calls, scale table, ONNX file, engine bundle or samples"
EXAMPLES = """\
examples:
  tqdit-inspect model.onnx
  tqdit-inspect model.engine      also checks every checksum
  tqdit-inspect --verify model.engine   its golden calls, on this machine
  tqdit-inspect --lint any.onnx   what loses INT8 or does not build, and what to do
  tqdit-inspect scales.safetensors --plot scales.png
  tqdit-inspect DiT-XL-2-256x256.pt"""

CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin", ".index.json")
PICTURES = (".png", ".svg", ".pdf")
Facts = list[tuple[str, object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a file or folder, or 'demo' or 'text'")
    parser.add_argument("--heads", type=int, metavar="N", help="attention heads of a checkpoint of unusual width")
    parser.add_argument("--lint", action="store_true", help="say what in an ONNX file makes a backend lose INT8, "
        "compute something else or refuse; exit code 1 if there are errors")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="run the golden calls of an engine on this machine; exit "
        "code 1 if the engine is wrong")  # fmt: skip
    parser.add_argument("--device", type=int, metavar="N", help="with --verify: index of the GPU (default: the current "
        "one)")  # fmt: skip
    parser.add_argument("--weight-budget", type=float, metavar="MIB", help="with --verify: weights on the GPU at most, "
        "if the engine was built with --weight-streaming (default: all)")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="IMAGE", help="draw a scale table: scales against the group "
        "of timesteps, and the error of each layer")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> Path | None:
    if args.lint:
        _lint(Path(args.file))
        return None
    if args.verify:
        folder = Path(args.file)
        manifest = read_manifest(folder)
        check_parts(folder, manifest)
        verdict = verify_bundle(folder, manifest, GpuShare.with_budget(args.device, args.weight_budget))
        verdict.check(str(folder))
        print(Verified.of(verdict).line)
        return None
    if args.plot is not None:
        _check_plot(Path(args.file), args.plot)
    facts = inspect(args.file, args.heads)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")
    plot: Path | None = args.plot
    if plot is not None:
        scale_table_summary.plot(read_scale_table(Path(args.file)), plot)
    return plot


def _check_plot(file: Path, plot: Path) -> None:
    if (str(file) in SHIPPED or file.exists()) and not is_scale_table(file):
        raise UsageError(f"{file}: is not a scale table. --plot draws what tqdit-calibrate wrote.")
    if plot.suffix not in PICTURES:
        raise UsageError(f"--plot {plot}: unknown kind of picture. Name a file with {', '.join(PICTURES)}.")
    check_writable(plot)


def inspect(file: str, heads: int | None = None) -> Facts:
    """The facts about one file as (name, value) pairs. Raises TqditError if it is damaged or unknown."""
    path = Path(file)
    if file not in SHIPPED and not path.exists():
        raise UsageError(f"{file}: no such file or folder. Pass a file, a folder, 'demo' or 'text'.")
    if (path / MANIFEST).is_file():
        return _bundle(path)
    if (path / INDEX).is_file():
        return _shards(path)
    readers: dict[str, Callable[[Path], Facts]] = {".onnx": _onnx, ".npz": _samples}
    if path.suffix in readers:
        return readers[path.suffix](path)
    if path.is_file() and not file.endswith(CHECKPOINTS):
        raise UsageError(
            f"{file}: a file of unknown kind; known are {', '.join([*readers, *CHECKPOINTS])}, engine bundles and "
            "diffusers directories."
        )
    if path.is_dir() and not any((path / name).is_file() for name in ("model_index.json", "config.json")):
        raise UsageError(
            f"{file}: a folder of unknown kind; known are engine bundles ({MANIFEST}), folders of shards ({INDEX}) and "
            "diffusers directories (model_index.json or config.json). Pass one of these."
        )
    if path.suffix == ".safetensors" and is_scale_table(path):
        return scale_table_summary.facts(read_scale_table(path))
    if path.suffix == ".safetensors" and (calls := _calls(path)):
        return calls
    return _checkpoint(file, heads)


def _bundle(path: Path) -> Facts:
    manifest = read_manifest(path)
    check_parts(path, manifest)
    size = sum(part.size_bytes for part in manifest.files.values())
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return [
        ("kind", "engine bundle; the checksum of every part is right"),
        ("backend", f"{manifest.backend}, {manifest.precision}"),
        ("built by", versions),
        ("runs on", ", ".join(manifest.target.values())),
        *([] if manifest.batch is None else [("batch", _batch(manifest.batch))]),
        *(
            [("custom ops", ", ".join(f"{op}: {what}" for op, what in manifest.plugins.items()))]
            * bool(manifest.plugins)
        ),
        *([] if manifest.weights == "fixed" else [("weights", manifest.weights)]),
        *[(f"{timing.median_ms:.2f} ms", f"{timing.rows} rows, {timing.file}") for timing in manifest.measured],
        ("files", f"{len(manifest.files)}, {size / 1e6:.1f} MB"),
        ("decoder", "inside" if manifest.decoder else "none"),
        *([] if manifest.card.text is None else _text(manifest.card.text)),
        *([] if manifest.audit is None else [("audit", manifest.audit.line)]),
        *([] if manifest.verified is None else [("verified", manifest.verified.line)]),
        *_card(manifest.card),
    ]


def _text(text: TextCard) -> Facts:
    return [("text encoders", text.summary), ("prompts", "tqdit-sample --prompt TEXT, tqdit-evaluate --prompts FILE")]


def _batch(batch: BatchRange) -> str:
    return f"{batch.least} to {batch.most} images per call, tuned for {batch.best}"


def _onnx(path: Path) -> Facts:
    header = OnnxHeader.read(path)
    card = header.card
    facts: Facts = [("kind", "ONNX file"), *_graph(path)]
    if card is not None:
        return [*facts, *_card(card)]
    return [*facts, ("written by", header.producer or "unknown, not by tqdit")]


def _graph(path: Path) -> Facts:
    """What only the parsed graph tells; one line if onnx is not installed."""
    try:
        from tqdit.onnx_file import OnnxFile
    except MissingLibraryError as error:
        return [("nodes", f"not counted: {error}")]
    file = OnnxFile.read(path)
    model = file.model
    operators = Counter(node.op_type for node in model.graph.node)
    opsets = ", ".join(f"{entry.domain or 'onnx'} {entry.version}" for entry in model.opset_import)
    return [
        ("size", f"{file.size_bytes / 1e6:.1f} MB"),
        ("opsets", opsets),
        ("nodes", ", ".join(f"{count} {name}" for name, count in operators.most_common(6)) + ", ..."),
        ("inputs", ", ".join(value.name for value in model.graph.input)),
        ("outputs", ", ".join(value.name for value in model.graph.output)),
    ]


def _lint(path: Path) -> None:
    """Print findings and a count; raises LintError if one of them is an error."""
    need_part("tqdit.lint", "the lint")
    need("onnx_ir", "build", "the lint")
    from tqdit.lint import lint
    from tqdit.onnx_file import OnnxFile

    if not path.is_file():
        raise UsageError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}. Pass an ONNX file with --lint.")
    model = OnnxFile.read(path).model
    try:
        findings = lint(model, folder=path.parent)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error
    for finding in findings:
        print(finding)
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{_count(errors, 'error')}, {_count(len(findings) - errors, 'warning')}")
    if errors:
        raise LintError(f"{path}: the lint found errors. Each names its remedy above; docs/lint.md explains the rules.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _samples(path: Path) -> Facts:
    """From the headers alone: fifty thousand images need not fit into memory."""
    with reading(path, NPZ, "Sample again.", *NPZ_ERRORS), path.open("rb") as file:
        headers = npz_headers(str(path), file)
    return [("kind", "samples"), *((name, f"{dtype} {shape}") for name, (dtype, shape) in headers.items())]


def _shards(path: Path) -> Facts:
    """The job of a folder of shards, from its index alone."""
    folder = read_index(path)
    job = folder.job
    classes = f" of {len(set(job.classes))} class(es)" if job.classes else ""
    guidance = "none" if job.guidance_scale is None else f"scale {job.guidance_scale:g}"
    if job.guidance_interval is not None:
        guidance += " from timestep {:g} to {:g}".format(*job.guidance_interval)
    full = f", {len(job.full_calls)} of them with full calls" if job.full_calls else ""
    return [
        ("kind", "samples in shards"),
        ("shards", f"{folder.done} of {job.shards} done, of {job.shard_size} {job.content} each"),
        ("samples", f"{job.count}{classes}, seed {job.seed}"),
        (
            "sampled with",
            f"{job.steps}{' placed' * bool(job.timesteps)} steps {'as' if job.sampler == 'recorded' else 'of'} "
            f"{job.sampler}{full}, guidance: {guidance}",
        ),
        ("engine", f"manifest {job.engine}"),
    ]


def _calls(path: Path) -> Facts:
    """Calls that tqdit.record recorded; nothing for another file."""
    again = "Record the pipeline again."
    with reading(path, SAFETENSORS, again, ValueError, msgspec.MsgspecError):
        metadata = safetensors_file.read_metadata(path)
        if RECORDING_KEY not in metadata:
            return []
        shapes = safetensors_file.read_shapes(path)
        found = msgspec.json.decode(metadata[RECORDING_KEY], type=RecordingHeader).interface
    prompts = [] if found.text is None else [("prompts kept", "; ".join(found.text.prompts))]
    counts = sorted({shape[0] for name, shape in shapes.items() if name.startswith(REQUEST)})
    return [
        ("kind", f"recorded calls of a {found.signature.family}"),
        ("requests", " or ".join(str(count) for count in counts)),
        *_call(found.signature),
        *_chain(found.sampling, found.guidance),
        *prompts,
        ("for", "tqdit-calibrate --rows, tqdit-sample --embeddings"),
    ]


def _checkpoint(file: str, heads: int | None) -> Facts:
    need_part("tqdit.models", "the inspection of a model")
    for library in ("torch", "safetensors"):
        need(library, "export", "inspecting a checkpoint")
    from tqdit.models.directories import class_name, folder_of
    from tqdit.models.load import load_model, needs_calls
    from tqdit.models.recorded import RECORD

    if needs_calls(file):
        family = class_name(folder_of(file))
        return [("kind", f"diffusers directory of a {family}"), ("next", RECORD)]
    model = load_model(file, heads)
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    return [
        ("kind", f"diffusion transformer, origin '{model.origin}'"),
        ("configuration", _settings(getattr(model.network, "config", "not known"))),
        ("parameters", f"{parameters / 1e6:.2f} million"),
        *_sampled(model.card(sampling=model.proposed)),
        ("fingerprint", model.fingerprint),
    ]


def _settings(config: object) -> str:
    """Of our dataclass as it is; diffusers has a dict of another name."""
    return ", ".join(f"{name}={value}" for name, value in config.items()) if isinstance(config, dict) else str(config)


def _card(card: GraphCard) -> Facts:
    return [
        ("graph", f"{card.graph} of {card.model} (origin '{card.origin}')"),
        *_sampled(card),
        ("quantization", "none" if card.quantization is None else card.quantization.summary),
        ("fingerprint", card.fingerprint),
        ("written by", f"tqdit {card.written_by}"),
    ]


def _sampled(card: GraphCard) -> Facts:
    """The network's call, and how it is sampled."""
    signature = card.signature
    label = signature.label
    classes = [] if label is None else [("classes", _classes(label.choices or 0, card.class_names))]
    chain = _chain(card.sampling, card.guidance, choice=card.graph != "step")
    published = [] if card.published is None else [("as published", str(card.published))]
    correction = [] if card.correction is None else [("correction", str(card.correction))]
    residual = [] if card.residual is None else [("forecasts", f"of tokens {card.residual}: tqdit-sample --full-calls")]
    return [*_call(signature), ("state", _space(card)), *classes, *chain, *published, *correction, *residual]


def _call(signature: Signature) -> Facts:
    ports = ((f"port {port.name}", _port(port)) for port in signature.ports)
    return [*ports, ("prediction", _shape(signature.output))]


def _chain(sampling: SamplingSpec, guidance: Guidance | None, choice: bool = True) -> Facts:
    """choice: whether another sampler can be chosen."""
    samplers = ", ".join(samplers_of(sampling.process))
    others = ", as recorded" if samplers == "recorded" else f"; any of {samplers}" * bool(samplers) * choice
    timesteps = ", ".join(f"{timestep:g}" for timestep in sampling.timesteps)
    return [
        ("sampled with", f"{sampling}{others}"),
        *([("", f"at timesteps {timesteps}")] if timesteps else []),
        ("guidance", _guidance(guidance)),
    ]


def _port(port: Port) -> str:
    values = "" if port.values is None else f", 0..{port.values - 1}"
    own = "its own value" if isinstance(port.null, str) else f"{port.null or 0:g}"
    null = "" if port.null is None else f", {own} in an unconditional row"
    return f"{port.kind}, {port.dtype} {_shape(port.shape)}{values}{null}"


def _shape(shape: tuple[int | None, ...]) -> str:
    return " x ".join("rows" if size is None else str(size) for size in shape)


def _space(card: GraphCard) -> str:
    if card.latents is None:
        return "pixels" if has_pixels(card) else "values as they are"
    return f"latents of {card.latents}"


def _guidance(guidance: Guidance | None) -> str:
    if guidance is None:
        return "none"
    channels = "" if guidance.channels is None else f" of the first {guidance.channels} channels"
    return f"classifier-free{channels}, scale {guidance.scale:g} unless chosen"


def _classes(count: int, names: tuple[str, ...]) -> str:
    return f"{count}" + (f": {' '.join(names)}" if names else "")
