"""What `tensorrt` and `tensorrt-rtx` share: inline, compile, audit, describe."""

from __future__ import annotations

import platform
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx.inliner

from tqdit.card import GraphCard, QuantizationCard
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt.compiler import run_worker
from tqdit.engines.backends.tensorrt.constants import fold_numbers
from tqdit.engines.backends.tensorrt.half_products import TYPES, halve_products, probabilities
from tqdit.engines.backends.tensorrt.layers import Layer
from tqdit.engines.backends.tensorrt.library import Library
from tqdit.engines.backends.tensorrt.refit import Content, Record, open_base, settings_of
from tqdit.engines.backends.tensorrt.weights import spell_out_weights
from tqdit.engines.backends.tensorrt.worker import FIRST_FP8, Compiled, Job
from tqdit.engines.build.audit import audit, check_audit
from tqdit.engines.build.backend import Fitness
from tqdit.engines.bundle import Artefact, Audit
from tqdit.engines.config import BatchRange, BuildConfig, FloatType, Progress
from tqdit.errors import BackendError, TqditError, TqditWarning, UsageError, first_line
from tqdit.extras import need
from tqdit.files import temporary_folder
from tqdit.graph_names import Scopes, scope_of
from tqdit.onnx_file import OnnxFile
from tqdit.plugins import tensorrt as plugins
from tqdit.plugins.aot import PORTABLE, best_capability

PLAN_FILE = "engine.plan"
DECODER_FILE = "decoder.plan"
KINDS = {"int8": "Int8", "fp8": "FP8"}  # precision -> type of a product's operands
PRODUCTS = ("MatMul", "Gemm", "Conv")
DOMAIN = "tqdit"  # of the custom ops
Custom = dict[str, list[str]]  # custom op -> names of its nodes
BLACKWELL_ULTRA = "10.3"  # B300: INT8 0.15, BF16 2.25, FP8 4.5 POPS dense, by NVIDIA's data sheet
CAUSE = "a scale that is computed at run time, or a form that is not fused; run tqdit-inspect --lint on the file"


def fitness(library: Library, score: int) -> Fitness:
    """Whether an engine of this library can run here; names the first thing that is missing."""
    if not library.installed:
        return Fitness(0, f"{library.module} is not installed")
    elsewhere = "; it builds here for machines with one" if library.cross_compiles else ""
    if not cuda.installed():
        return Fitness(0, f"cuda-core, which runs its engines, is not installed{elsewhere}", library.cross_compiles)
    try:
        device = cuda.find_device()
        known = library.targets(library.load("choosing a backend")) if library.cross_compiles else (device.capability,)
    except (TqditError, ImportError, OSError) as error:
        return Fitness(0, f"{str(error).split('. ')[0]}{elsewhere}", library.cross_compiles)
    if device.capability not in known:
        return Fitness(0, f"{library.title} has no kernels for compute capability {device.capability}",
                       library.cross_compiles)  # fmt: skip
    return Fitness(score, f"GPU of compute capability {device.capability}")


def float_types(library: Library, config: BuildConfig) -> tuple[FloatType, ...]:
    """float16 first. Turing (7.5) has no bfloat16, and TensorRT-RTX no float32 products there."""
    if not library.cross_compiles:
        return ("fp16", "bf16", "fp32")
    return ("fp16",) if "7.5" in _checked(config.targets) else ("fp16", "bf16", "fp32")


def place(library: Library, config: BuildConfig) -> str:
    """Plans of TensorRT-RTX are compiled without a GPU, for any."""
    return platform.machine() if library.cross_compiles else cuda.find_device(config.device).kind


def build(
    library: Library, source: OnnxFile, decoder: OnnxFile | None, card: GraphCard, folder: Path, config: BuildConfig,
    progress: Progress,
) -> Artefact:  # fmt: skip
    """Compile the graph and the decoder; find out from the layers what stayed integer."""
    if not library.installed:  # found here and not loaded: the compiler's process does that
        library.load(f"--backend {library.backend}")
    need("polygraphy", library.backend, f"--backend {library.backend}")
    check_settings(config)
    config = replace(config, targets=_checked(config.targets))
    device = None if library.cross_compiles else cuda.find_device(config.device)
    if config.precision == "int8" and card.graph != "forecast":  # it is said of the full call
        for remark in _slow_int8(source, card, device):
            warnings.warn(remark, TqditWarning, stacklevel=2)
    _check_fp8(config, device)
    batch = None if card.rows else config.batch or BatchRange()
    rows = (card.rows or 1,) * 3 if batch is None else batch.rows(card.rows_per_image)
    no_plugins = _why_no_plugins(library, config)
    halved = halved_type(card, config)
    job = Job(library.backend, "", str(folder / PLAN_FILE), rows, config, None, device.index if device else None)
    if config.base is not None:
        replaced = _refitted(library, source, card, folder, config, halved, job, progress)
        if replaced is not None:
            return replaced
    record: Record | None = None

    def compile_graph(
        plugins_for: str | None, spelled_out: Collection[str] = ()
    ) -> tuple[Compiled, Audit | None, Custom] | None:
        nonlocal record
        with prepared_file(source, folder, plugins_for is None, halved, spelled_out, config.refit) as prepared:
            if prepared is None:
                return None
            compiled = _compile(replace(job, plugins_for=plugins_for), prepared.file, progress)
            report = audit_layers(
                compiled.layers, card.quantization, source.scopes, prepared.products, config.precision
            )
            if prepared.content is not None:
                settings = settings_of(config, rows)
                record = Record(**vars(prepared.content), settings=settings, plugins_for=plugins_for,
                                spelled_out=tuple(spelled_out))  # fmt: skip
            return compiled, report, prepared.custom

    targets_of_plugins = () if no_plugins or device is None else _plugin_targets(source, device.capability)
    plugins_for: str | None = None
    for plugins_for in (*targets_of_plugins, None):
        try:
            first = compile_graph(plugins_for)
            break
        except BackendError as error:
            if plugins_for is None:
                raise
            no_plugins = f"with plugins: {first_line(error)}"
            warnings.warn(f"plugins made for {plugins_for} were refused; trying without: {error}", TqditWarning,
                          stacklevel=2)  # fmt: skip
    assert first is not None
    compiled, report, custom = first
    if report is not None and report.fallen_back and config.precision == "int8":
        # once more, with weights that the compiler treats otherwise
        compiled, report, custom = compile_graph(plugins_for, report.fallen_back) or first
    if report is not None and not config.allow_fallback:
        check_audit(report, library.backend, CAUSE)
    if decoder is not None:
        with prepared_file(decoder, folder, inline=True) as inlined:
            assert inlined is not None
            # one image at a time, in float32: decoders of this kind overflow float16
            plain = replace(config, refit=False, weight_streaming=False)
            _compile(
                replace(job, plan=str(folder / DECODER_FILE), batch=(1, 1, 1), config=plain), inlined.file, progress
            )
    if record is not None:
        record.write(folder)
    targets = compiled.targets if device is None else (device.capability,)
    return Artefact(
        entry=PLAN_FILE,
        decoder=None if decoder is None else DECODER_FILE,
        versions={library.module: compiled.version},
        target=_target(library, targets, config) | (device.facts if device is not None else {}),
        audit=report,
        batch=batch,
        plugins=_kernels(custom, compiled.plugins, no_plugins),
        weights="fixed" if record is None else "refittable",
        streams_weights=config.weight_streaming,
    )


def check_settings(config: BuildConfig) -> None:
    """Raise UsageError for those that do not go together."""
    if config.lean_runtime == "exclude" and not config.version_compatible:
        raise UsageError("--exclude-lean-runtime goes with --version-compatible.")
    if config.refit and config.version_compatible:
        raise UsageError("--refit does not go with --version-compatible. Leave one of them out.")


def _refitted(
    library: Library, source: OnnxFile, card: GraphCard, folder: Path, config: BuildConfig, halved: str | None,
    job: Job, progress: Progress,
) -> Artefact | None:  # fmt: skip
    """The engine at `config.base` with the weights of `source`; None, with a warning, if it has to be compiled."""
    assert config.base is not None
    try:
        base = open_base(config.base, library.backend, card, config.device)
        manifest, before = base.manifest, base.record
        with prepared_file(source, folder, before.plugins_for is None, halved, before.spelled_out, True) as prepared:
            if prepared is None or prepared.content is None:
                raise BackendError("the file holds another graph")
            record, changed = before.replaced_by(prepared.content, settings_of(config, job.batch))
            plan = str(config.base / manifest.entry)
            refit = replace(job, plugins_for=before.plugins_for, base=plan, changed=changed)
            compiled = run_worker(replace(refit, source=str(prepared.file)), progress)
    except TqditError as error:
        warnings.warn(f"{config.base}: its weights are not replaced, since {str(error).rstrip('.')}. Compiling it.",
                      TqditWarning, stacklevel=2)  # fmt: skip
        return None
    if manifest.audit is not None and not config.allow_fallback:
        check_audit(manifest.audit, library.backend, CAUSE)
    if manifest.decoder is not None:
        shutil.copyfile(config.base / manifest.decoder, folder / manifest.decoder)  # no link: it may be written again
    record.write(folder)
    facts = {field.name: getattr(manifest, field.name) for field in fields(Artefact)}
    return Artefact(**facts | {"versions": {library.module: compiled.version}, "verified": None, "weights": "refitted"})


def _check_fp8(config: BuildConfig, device: cuda.Device | None) -> None:
    """Refuse FP8 for GPUs without it."""
    targets = config.targets if device is None else (device.capability,)
    without = [target for target in targets if tuple(map(int, target.split("."))) < FIRST_FP8]
    if config.precision == "fp8" and without:
        raise UsageError(f"--precision fp8: compute capability {', '.join(without)} has no FP8 products; 8.9 and later "
                         "have. Leave it out, or build with --precision int8.")  # fmt: skip


def _plugin_targets(source: OnnxFile, capability: str) -> tuple[str, ...]:
    """Compute capabilities of PTX for the custom ops of a file, the best first: this GPU's, then the portable one."""
    if all(node.domain != DOMAIN for node in source.model.graph.node):
        return ()
    major, minor = map(int, capability.split("."))
    return tuple(dict.fromkeys(".".join(map(str, each)) for each in (best_capability((major, minor)), PORTABLE)))


def _compile(job: Job, source: Path, progress: Progress) -> Compiled:
    try:
        return run_worker(replace(job, source=str(source)), progress)
    except BackendError as error:
        raise BackendError(f"{source.name}: {error}") from error


def halved_type(card: GraphCard, config: BuildConfig) -> str | None:
    """The type that integer products write: that of the float parts, if it is half as wide as float32."""
    return None if card.quantization is None or config.float_type not in TYPES else config.float_type


class Prepared(NamedTuple):
    """A file as the compiler takes it."""

    file: Path
    products: list[str]  # names of its products
    custom: Custom
    content: Content | None = None  # for --refit


@contextmanager
def prepared_file(
    source: OnnxFile, folder: Path, inline: bool, halved: str | None = None, spelled_out: Collection[str] = (),
    digest: bool = False,
) -> Iterator[Prepared | None]:  # fmt: skip
    """The file with its functions inlined and its integer products rewritten to the type `halved`. Those of the modules
    `spelled_out` keep theirs and have their weights spelled out; None if they have none. digest: describe its content.

    Functions are inlined beforehand: TensorRT-RTX reads attributes of nested ones as 0 without a word.
    """
    model = source.model
    custom: Custom = {}
    for node in model.graph.node:
        if node.domain == DOMAIN:
            custom.setdefault(node.op_type, []).append(node.name)
    if not ((inline and model.functions) or halved or spelled_out):
        content = Content.of(model, source.path.parent) if digest else None
        yield Prepared(source.path, _products(model), custom, content)
        return
    model = onnx.inliner.inline_local_functions(model) if inline else source.copy()
    fold_numbers(model)
    if halved:
        halve_products(model, source.path.parent, probabilities(source.model), halved, spelled_out)
    if spelled_out and not spell_out_weights(model, source.path.parent, spelled_out):
        yield None
        return
    products = _products(model)
    content = Content.of(model, source.path.parent) if digest else None
    with temporary_folder(folder.with_name(f"{folder.name}.inlined")) as place:
        path = source.save_copy(model, place)
        del model  # its weights are read again by the compiler
        yield Prepared(path, products, custom, content)


def audit_layers(
    layers: Sequence[Layer], card: QuantizationCard | None, scopes: Scopes, products: Iterable[str],
    precision: str | None = "int8",
) -> Audit | None:  # fmt: skip
    """What became of the quantized products. `products` are the names of all MatMul, Gemm and Conv nodes of the graph:
    one that no multiplying layer names counts as float, since nothing proves otherwise."""
    if card is None:
        return None
    integer: set[str] = set()
    floating: set[str] = set()
    for layer in layers:
        if layer.multiplies:
            (integer if layer.multiplies_in(KINDS[precision or "int8"]) else floating).update(layer.nodes)
    wanted = set(products)
    report = audit(card, scopes, integer & wanted, (floating | (wanted - integer)) & wanted)
    return replace(report, number=precision or "int8")


def _products(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type in PRODUCTS]


def _slow_int8(source: OnnxFile, card: GraphCard, device: cuda.Device | None) -> Iterator[str]:
    """What would make an int8 engine of this file slower than it need be."""
    if device is not None and device.capability == BLACKWELL_ULTRA:
        yield (
            f"{device.name or 'this GPU'} (compute capability {BLACKWELL_ULTRA}) multiplies int8 at a fifteenth of the "
            "speed of bfloat16. Build it with --precision fp8 or bf16 and compare."
        )
    quantized = card.quantization.quantized if card.quantization is not None else frozenset[str]()
    if any(node.op_type == "ReduceMax" and scope_of(node) in quantized for node in source.model.graph.node):
        yield (
            "scales per token: the compiler keeps float32 tensors and more kernels for them. tqdit-calibrate --backend "
            "tensorrt finds static scales, which need neither."
        )


def _checked(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Compute capabilities in the form '8.9', each once."""
    for target in targets:
        major, dot, minor = target.partition(".")
        if not (major.isdigit() and dot and minor.isdigit()):
            raise UsageError(f"--target {target}: expected a compute capability such as 8.9 or 12.0.")
    return tuple(dict.fromkeys(targets))


def _target(library: Library, targets: tuple[str, ...], config: BuildConfig) -> dict[str, str]:
    """What the engine asks of a machine. Those of TensorRT-RTX also move between operating systems."""
    target = {"compute_capabilities": ",".join(targets)}
    if not library.is_rtx:
        target["machine"] = platform.machine()
    return target | ({"version_compatible": config.lean_runtime} if config.version_compatible else {})


def _why_no_plugins(library: Library, config: BuildConfig) -> str | None:
    """None if the custom ops' plugins can be used."""
    if not library.takes_plugins:
        return f"{library.title} takes no plugins"
    if not config.plugins:
        return "--no-plugins"
    return plugins.why_unavailable()


def _kernels(custom: Custom, plugins: tuple[str, ...], no_plugins: str | None) -> dict[str, str]:
    """What computes each custom op: 'plugin', or 'body' and why."""
    why = no_plugins or "TensorRT took none for it"
    return {op: "plugin" if set(nodes) <= set(plugins) else f"body: {why}" for op, nodes in custom.items()}
