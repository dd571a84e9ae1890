"""Several files of one network, such as its forms of attention: build each, time them here, keep the fastest.

Which form is the fastest depends on the machine, the backend and the batch, so nothing chooses one unmeasured.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from tqdit.card import GraphCard
from tqdit.engines.build.backend import builder, choose_backend
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import Manifest, Timing, check_overwrite, write_manifest
from tqdit.engines.config import LAYERS_FILE, BuildConfig, Progress, silent
from tqdit.engines.gpu import GpuShare
from tqdit.engines.run.backend import Engine, open_engine
from tqdit.errors import BackendError, TqditWarning, UsageError, first_line
from tqdit.files import temporary_folder, whole_folder
from tqdit.onnx_file import read_card

ROUNDS, WARM_UPS = 11, 3


def build_fastest(
    sources: Sequence[str | Path],
    output: str | Path,
    backend: str = "onnxruntime",
    config: BuildConfig | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Compile each file into an engine of `backend` and leave the fastest one of them at `output`, whole or not at all.

    Time is that of a call with the batch that the engines are tuned for (one image if they take any), arrays of the
    host in and out; the median of 11 rounds in which the engines take turns. The manifest holds all of them
    (`measured`). If such an engine cannot run here, the first file is built alone, with a TqditWarning: it was not
    measured.
    Raises UsageError if the files are of different networks, and what `build_engine` raises.
    """
    files, output, config = [Path(source) for source in sources], Path(output), config or BuildConfig()
    if len(files) == 1:
        return build_engine(files[0], output, backend, config, progress)
    _check_alike(files)
    if config.refit:
        raise UsageError(f"--refit takes one file; {len(files)} are given. Build each into an engine of its own.")
    if backend == "auto":
        backend, _ = choose_backend()
    fitness = builder(backend).fitness()
    if not fitness.score and config.provider not in ("cuda", "tensorrt"):
        _not_measured(files, fitness.reason)
        return build_engine(files[0], output, backend, config, progress)
    with (
        whole_folder(output, check_overwrite) as folder,
        temporary_folder(output.with_name(f"{output.name}.forms")) as place,
    ):
        folders = [place / str(number) for number in range(len(files))]
        with _layers_kept(place, output):
            manifests = [
                build_engine(file, made, backend, config, progress) for file, made in zip(files, folders, strict=True)
            ]
        best = 0
        measured: tuple[Timing, ...] = ()
        try:
            measured = _timed(files, folders, manifests, config)
            best = min(range(len(files)), key=lambda number: measured[number].median_ms)
        except BackendError as error:  # built for other GPUs than the one that is here
            _not_measured(files, first_line(error))
        for name in manifests[best].files:
            (folder / name).parent.mkdir(exist_ok=True)  # that of the forecast
            (folders[best] / name).rename(folder / name)
        manifest = replace(manifests[best], measured=measured)
        write_manifest(folder, manifest)
    return manifest


@contextmanager
def _layers_kept(place: Path, output: Path) -> Iterator[None]:
    """What a compiler said of a refused engine goes from the temporary folder to where a build of one file keeps it."""
    try:
        yield
    except BackendError as error:
        for file in place.glob(f"*.{LAYERS_FILE}"):
            kept = file.replace(output.with_name(f"{output.name}.{LAYERS_FILE}"))
            raise BackendError(str(error).replace(str(file), str(kept))) from error
        raise


def _check_alike(files: Sequence[Path]) -> None:
    cards = [read_card(file) for file in files]
    first = (cards[0].fingerprint, cards[0].signature, cards[0].graph)
    for file, card in zip(files, cards, strict=True):
        if (card.fingerprint, card.signature, card.graph) != first:
            raise UsageError(
                f"{file}: of another network than {files[0]}. Several files are forms of one network, of which the "
                "fastest is kept; build others one by one."
            )
        if card.residual != cards[0].residual:
            known = [files[number] for number, each in enumerate(cards) if each.residual is not None]
            raise UsageError(
                f"{known[0]}: returns what forecasts need, and other files do not. Export all of them with --forecast, "
                "or none."
            )


def _not_measured(files: Sequence[Path], why: str) -> None:
    text = f"not measured ({why.rstrip('.')}): keeping {files[0]}, the first of {len(files)} files."
    warnings.warn(text, TqditWarning, stacklevel=3)


def _timed(
    files: Sequence[Path], folders: Sequence[Path], manifests: Sequence[Manifest], config: BuildConfig
) -> tuple[Timing, ...]:
    """Milliseconds of a call of each engine."""
    device = GpuShare(config.device) if config.device is not None else None
    rows = _rows(manifests[0])
    inputs = _inputs(manifests[0].card, rows)
    with ExitStack() as stack:
        engines: list[Engine] = [
            stack.enter_context(closing(open_engine(folder, manifest, manifest.entry, device=device)))
            for folder, manifest in zip(folders, manifests, strict=True)
        ]
        seconds: list[list[float]] = [[] for _ in engines]
        for _ in range(WARM_UPS + ROUNDS):
            for engine, found in zip(engines, seconds, strict=True):
                started = time.perf_counter()
                engine(inputs)
                found.append(time.perf_counter() - started)
    medians = [1000 * statistics.median(found[WARM_UPS:]) for found in seconds]
    return tuple(
        Timing(
            file.name, None if manifest.card.quantization is None else manifest.card.quantization.attention, ms, rows
        )
        for file, manifest, ms in zip(files, manifests, medians, strict=True)
    )


def _rows(manifest: Manifest) -> int:
    images = 1 if manifest.batch is None else manifest.batch.best
    return manifest.card.rows or images * manifest.card.rows_per_image


def _inputs(card: GraphCard, rows: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Noise, and zeros for everything else: speed does not depend on values."""
    types = {port.name: port.dtype for port in card.signature.ports} | {"step": "int64"}  # the rest is float32
    zeros = {name: np.zeros((rows, *shape), types.get(name, "float32")) for name, shape in card.inputs.items()}
    state = card.signature.state.name if card.graph == "denoiser" else "x"
    return zeros | {state: np.random.default_rng(0).standard_normal(zeros[state].shape, np.float32)}
