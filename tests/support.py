"""Small models that take the whole flow in seconds."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import reference
from tqdit.sampling.noise import INITIAL, Normals

if TYPE_CHECKING:
    import onnx_ir as ir
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    from tqdit.card import GraphCard
    from tqdit.exporter.graph import ExportConfig
    from tqdit.models.dit import DiT, DiTConfig
    from tqdit.models.loaded import LoadedModel
    from tqdit.models.products import Product
    from tqdit.quantization.table import ScaleTable
    from tqdit.sampling.schedule import SamplingSpec


TOYS = Path(__file__).parent / "toys"  # one of each kind that a user may add
ALL = "TQDIT_TEST_ALL" in os.environ  # set by `scripts/test --all`


def rounds(full: int) -> int:
    """How often a test repeats itself: `full` times with `scripts/test --all`, else a tenth of it, at least twice."""
    return full if ALL else min(full, max(2, full // 10))


def few(cases: Iterable[object], *kept: object) -> list[object]:
    """The cases of a parametrised test with a mark on those that are not kept: they take the code of a case that is,
    and only `scripts/test --all` runs them.
    """
    cases = list(cases)
    unknown = [case for case in kept if case not in cases]
    assert not unknown, f"no cases: {unknown}"
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
        for case in cases
    ]


def wait_until(met: Callable[[], object], seconds: float = 60) -> None:
    """Fails if a condition is not met in time."""
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


@functools.cache
def tiny_config() -> DiTConfig:
    """Two blocks of width 16."""
    from tqdit.models.dit import DiTConfig

    return DiTConfig(
        input_size=8, patch_size=2, in_channels=4, out_channels=8, hidden_size=16, depth=2, mlp_hidden_size=64,
        num_classes=5, num_heads=2,
    )  # fmt: skip


def __getattr__(name: str) -> DiTConfig:
    """TINY on first use, since its class stands in a module that imports torch."""
    if name == "TINY":
        return tiny_config()
    raise AttributeError(f"module 'support' has no attribute '{name}'")


def tiny_model(origin: str = "published", steps: int = 20, pixels: bool = False, seed: int = 0) -> LoadedModel:
    """Two blocks of width 16 with random non-zero weights: our DiT, or `diffusers` for diffusers' own module."""
    from tqdit.models.dit import DiT, randomize
    from tqdit.models.families import diffusers, published

    channels = 3 if pixels else 4
    if origin == "diffusers":
        # Larger weights amplify rounding: then the last bit of a sine moves more codes than tests allow for.
        model = diffusers.describe(randomize(diffusers_dit(channels), seed, scale=0.1), "tiny")
    else:
        config = replace(tiny_config(), in_channels=channels, out_channels=2 * channels)
        network = randomize(DiT(config), seed, scale=0.2).eval().requires_grad_(False)
        model = published.describe(network, "tiny")
    latents = None if pixels else model.latents
    return replace(model, sampling=model.sampling.choose(steps), latents=latents)


def diffusers_dit(channels: int = 4) -> DiTTransformer2DModel:
    """The tiny model as diffusers' own module; its embedders differ between the blocks."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=channels, out_channels=2 * channels, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=5,
    )  # fmt: skip


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills in the first worker of a test run that asks for it; the others wait, then read it.

    It lies in $TQDIT_TEST_SHARED, which `conftest.py` makes.
    """
    from filelock import FileLock

    folder = Path(os.environ["TQDIT_TEST_SHARED"], name)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            try:
                make(folder)
            except BaseException:
                shutil.rmtree(folder)
                raise
    return folder


def trace_once(trace: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
    """`trace_graph` that traces a network once in a test run: torch needs seconds for the tiniest.

    A trace is used again if everything that it can depend on is equal. Modules that tests write, weights that stay in
    their file and a torch.onnx that a test replaced are traced anew.
    """
    import onnx
    import onnx_ir as ir
    import torch

    whole = torch.onnx.export

    def digest_of(model: LoadedModel, config: ExportConfig, table: ScaleTable | None) -> str:
        network, digest = model.network, hashlib.sha256()
        own = getattr(network, "config", None)
        if isinstance(own, Mapping):  # diffusers notes where it was loaded from
            own = sorted((key, repr(value)) for key, value in own.items() if not key.startswith("_"))
        chain = () if config.graph == "denoiser" else (config.sampling(model, table), config.guidance(model, table))
        for values in vars(chain[0].schedule).values() if chain else ():
            digest.update(repr(None if values is None else np.asarray(values).tolist()).encode())
        constants = sorted((*model.constants.items(), *model.alike.items()), key=lambda item: item[0])
        residual = config.returns_residual(model, table)
        facts = (config.graph, config.opset, residual, chain, model.signature, type(network), network, own)
        digest.update(repr(facts).encode())
        for name, value in (*network.named_parameters(), *network.named_buffers(), *constants):
            digest.update(f"{name} {type(value)}".encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
            else:
                digest.update(repr(value).encode())
        return digest.hexdigest()

    def once(model: LoadedModel, config: ExportConfig, table: ScaleTable | None = None) -> ir.Model:
        ours = type(model.network).__module__.startswith(("tqdit.models.", "diffusers."))
        if not ours or model.weights.made or torch.onnx.export is not whole:
            return trace(model, config, table)

        def make(folder: Path) -> None:  # not by onnx.save, which some tests replace
            graph = trace(model, config, table)
            (folder / "trace.onnx").write_bytes(ir.to_proto(graph).SerializeToString())

        content = (made_once(f"trace-{digest_of(model, config, table)}", make) / "trace.onnx").read_bytes()
        return ir.from_proto(onnx.ModelProto.FromString(content))

    return once


def products_once(products_of: Callable[[DiT], tuple[Product, ...]]) -> Callable[[DiT], tuple[Product, ...]]:
    """`products_of` that observes one DiT of each configuration: half a second for the tiniest."""
    found: dict[DiTConfig, tuple[Product, ...]] = {}

    def once(network: DiT) -> tuple[Product, ...]:
        if network.config not in found:
            found[network.config] = products_of(network)
        return found[network.config]

    once.__module__ = __name__
    return once


def structure_of(value: object, values: bool = False) -> object:
    """What the shapes in a call of a network can depend on, to compare: of tensors the shape and the type, and what
    they hold if `values`; of modules their parts, settings and hooks.
    """
    import torch

    if isinstance(value, torch.nn.Module):
        return tuple(
            (name, code_of(type(part).forward), structure_of(vars(part), values))
            for name, part in value.named_modules(remove_duplicate=False)
        )
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if values else b""
        return tuple(value.shape), value.dtype, value.requires_grad, content
    if isinstance(value, Mapping):
        return tuple(
            (key, [*map(structure_of_hook, each.values())]) if str(key).endswith("_hooks")
            else (key, structure_of(each, values))
            for key, each in value.items() if key != "_modules" and "_hooks_" not in str(key)
        )  # fmt: skip
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(structure_of(each, values) for each in value)
    if value is None or isinstance(value, str | int | float | torch.dtype | torch.device):
        return type(value), value
    return code_of(value) if isinstance(value, FunctionType) else type(value)


def code_of(function: Any) -> object:
    """Which function it is: one that is defined anew, as in each call of another, is the same."""
    code = getattr(function, "__code__", None)
    return function if code is None else (code.co_filename, code.co_firstlineno, code.co_qualname)


def structure_of_hook(hook: object) -> object:
    """Arguments that a hook gives to its network count with their values, which the network's Python may read."""
    if isinstance(hook, MethodType):
        return code_of(hook), structure_of(vars(hook.__self__), values=True)
    return structure_of(hook)


def once_for_a_structure(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a network, or of a loaded model, and of arguments, that calls the network with tensors without
    memory: one call for all whose structure is the same. Networks that tests write are observed anew.
    """
    found: dict[object, Any] = {}

    def once(first: Any, *arguments: Any) -> Any:
        network = getattr(first, "network", first)
        if not type(network).__module__.startswith(("tqdit.models.", "diffusers.")):
            return function(first, *arguments)
        facts = [structure_of(network), structure_of(arguments, values=function.__name__ == "_read")]
        if network is not first:
            facts += [repr((first.signature, first.products, first.constants)), structure_of(first.alike, values=True)]
        key = repr(facts)
        if key not in found:
            found[key] = function(first, *arguments)
        return found[key]

    once.__module__ = __name__
    return once


def exported(
    config: ExportConfig | None = None,
    origin: str = "published",
    steps: int = 20,
    pixels: bool = False,
    seed: int = 0,
    table: ScaleTable | None = None,
) -> tuple[ir.Model, GraphCard]:
    """The graph and card of a tiny model, or of the demo model (origin `demo`); float or quantized."""
    from tqdit.exporter import graph
    from tqdit.models.load import load_model

    config = config or graph.ExportConfig()
    model = load_model("demo") if origin == "demo" else tiny_model(origin, steps, pixels, seed)
    if table is not None:
        model, table = graph.fold(model, table)
    return graph.finish_graph(graph.trace_graph(model, config, table), model, config, table)


def save_vae(folder: Path, latent_channels: int = 4) -> AutoencoderKL:
    """A small decoder of random weights, whose images have sides of twice the latents': scale 0.5, shift 0.1."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=latent_channels,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, scaling_factor=0.5,
        shift_factor=0.1,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval()


def file_with_decoder() -> Path:
    """The file of the tiny latent model of diffusers, 4 steps, with the decoder that lies beside it in `vae`."""

    def export(folder: Path) -> None:
        import tqdit

        save_vae(folder / "vae")
        with pytest.warns(tqdit.errors.TqditWarning, match=r"scale 0\.5, shift 0\.1, those of tiny scale 0\.18215\."):
            tqdit.export(tiny_model("diffusers"), folder / "model.onnx", vae=folder / "vae", steps=4)

    return made_once("file-with-decoder", export) / "model.onnx"


def demo_file() -> Path:
    """The ONNX file that `tqdit-export` without arguments writes, made once: the demo model in float32."""
    from tqdit.cli.main import run

    def export(folder: Path) -> None:
        with contextlib.chdir(folder):
            assert run("export", ["-q"]) == 0

    return made_once("demo-file", export) / "model.onnx"


def normal_rows(seed: int, images: Sequence[int] | np.ndarray, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """The noise of several images at one step, stacked: (len(images), *shape)."""
    values = np.empty((len(images), *shape), np.float32)
    Normals(shape).fill_rows(values, [(seed, int(image), step) for image in images])
    return values


def reference_chain(
    model: LoadedModel, spec: SamplingSpec, labels: np.ndarray, scale: float | None, seed: int
) -> reference.Float64:
    """A chain of a DiT as the papers write it, from the project's own noise: the PyTorch network in float32, everything
    else in float64 NumPy.
    """
    shape, images = model.signature.state.row_shape, np.arange(len(labels))
    x = normal_rows(seed, images, INITIAL, shape).astype(np.float64)
    for step in reversed(range(spec.steps)):
        x = reference_step(model, spec, x, step, labels, scale, normal_rows(seed, images, step, shape))
    return x


def reference_step(
    model: LoadedModel, spec: SamplingSpec, x: np.ndarray, step: int, labels: np.ndarray, scale: float | None,
    noise: np.ndarray,
) -> reference.Float64:  # fmt: skip
    """One step of such a chain; all rows stand at `step`."""
    process, state, time = spec.process, model.signature.state.name, model.signature.time
    timesteps = reference.timesteps(spec.steps, process.spacing, process.steps_offset)

    def network(y: np.ndarray) -> reference.Float64:
        told = np.full(len(x), timesteps[step], time.dtype)
        return model({state: x.astype(np.float32), time.name: told, "class_labels": y}).astype(np.float64)

    output = network(labels)
    if scale is not None:
        assert model.guidance is not None
        null = np.full_like(labels, model.signature.requests[0].null)
        output = reference.guide(output, network(null), scale, model.guidance.channels or x.shape[1])
    if spec.sampler == "ddim":
        return reference.ddim_step(timesteps, x, output, step)
    return reference.ddpm_step(timesteps, x, output, step, noise)


def read_picture(path: Path | str) -> np.ndarray:
    """A PNG as uint8 (H, W, 3), with its file closed again."""
    with Image.open(path) as image:
        return np.asarray(image)


def assert_agrees(out: np.ndarray, expected: np.ndarray, bits: int = 8) -> None:
    """Images agree to 1e-5 of the largest value, except for one and one in ten, which may be 3 % off (relative L2).

    Quantized graphs agree bit for bit or nearly so, except where the last bit of a float operation decides a rounding
    tie: then one code of that image is the neighbouring one. That is 1 % of the images here, and which ones depends on
    the processor; wrong scales move all of them. With fewer bits of activations a code is worth more.
    """
    off = np.abs(out - expected).reshape(len(out), -1).max(axis=1) > 1e-5 * np.abs(expected).max()
    assert off.sum() <= 1 + len(out) // 10
    for row in np.flatnonzero(off):
        limit = 0.03 * 2 ** (8 - bits)
        assert np.linalg.norm(out[row] - expected[row]) <= limit * np.linalg.norm(expected[row])


def listen_to_ctrl_c() -> None:
    """For `preexec_fn`: a shell's background job, as this test run may be one, has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
