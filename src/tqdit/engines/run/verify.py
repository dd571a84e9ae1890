"""The golden calls of a bundle, run where the engine runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.bundle import CALLS_FILE, FORECAST, Manifest, Verified
from tqdit.engines.gpu import GpuChoice
from tqdit.engines.run.backend import Engine, OpenEngine, open_engine
from tqdit.errors import FileFormatError, OutputError, UsageError, VerificationError
from tqdit.files import cache_folder, read_npz, whole_file
from tqdit.golden import GoldenCalls, Verdict, relative_errors, verify
from tqdit.ports import check_call
from tqdit.sampling.forecasts import RESIDUAL

# Of a forecast with the true residual against the full call: the rounding of a difference, a sum, and codes at ties.
FORECAST_ERRORS = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-2}


def open_verified(
    folder: Path, manifest: Manifest, load: Callable[[str], OpenEngine], refused: ExitStack, verify: bool | None = None
) -> tuple[OpenEngine, OpenEngine | None]:
    """The engine of a bundle, and that of its forecasts if it has them, after their checks.

    load: of `open_bundle`. refused: closes them if the caller cannot use them. verify: as for `Sampler.open`. Raises
    VerificationError if they are wrong.
    """
    network = load(manifest.entry)
    refused.callback(network.close)
    if verify:
        verify_engine(folder, manifest, network).check(str(folder))
    elif verify is None:
        verify_once(folder, manifest, network)
    if not manifest.forecast:
        return network, None
    forecast = load(f"{FORECAST}/{manifest.forecast}")
    refused.callback(forecast.close)
    if verify or (verify is None and network.place is not None):  # on a CPU where it was built
        check_forecast(folder, manifest, network, forecast)
    return network, forecast


def verify_bundle(folder: Path, manifest: Manifest, device: GpuChoice = None) -> Verdict:
    """Load the engine and run its golden calls. Raises VerificationError if there are none, BackendError if it cannot
    run here.
    """
    engine = open_engine(folder, manifest, manifest.entry, device=device)
    try:
        return verify_engine(folder, manifest, engine)
    finally:
        engine.close()


def verify_once(folder: Path, manifest: Manifest, engine: Engine) -> None:
    """Run the golden calls of an engine of a GPU, unless they were right on this GPU with this library before.

    Engines of CPUs are verified where they are built. Raises VerificationError if they are wrong.
    """
    record = _record(manifest, engine)
    if record is not None and CALLS_FILE in manifest.files and not record.is_file():
        verify_engine(folder, manifest, engine).check(str(folder))


def _computed_in(manifest: Manifest, engine: Engine) -> str:
    """The float type whose errors are to be expected: GPUs multiply float32 in TF32, which has the significant bits of
    float16.
    """
    on_gpu = getattr(engine, "place", None) is not None
    return "fp16" if on_gpu and manifest.float_type == "fp32" else manifest.float_type


def _record(manifest: Manifest, engine: Engine) -> Path | None:
    """Where it is kept that an engine was right at its `place`; None on a CPU."""
    place = getattr(engine, "place", None)
    if place is None or not {manifest.entry, CALLS_FILE} <= manifest.files.keys():
        return None
    parts = [manifest.files[name].sha256 for name in (manifest.entry, CALLS_FILE)]
    name = hashlib.sha256(" ".join([*parts, place]).encode()).hexdigest()[:32]
    return cache_folder("verified") / f"{name}.json"


def _remember(record: Path, place: str, verdict: Verdict) -> None:
    with suppress(OSError, OutputError):  # then they run again at the next opening
        record.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(record) as temporary:
            temporary.write_text(json.dumps({"place": place, "found": Verified.of(verdict).line}) + "\n")


def verify_engine(folder: Path, manifest: Manifest, engine: Engine) -> Verdict:
    """The same with an engine that is open. That one of a GPU was right is recorded, for `verify_once`."""
    if CALLS_FILE not in manifest.files:
        raise VerificationError(
            f"{folder}: holds no golden calls. Export a quantized denoiser graph with a scale table of this version."
        )
    calls = GoldenCalls.of(read_npz(folder / CALLS_FILE))
    signature = manifest.card.signature
    try:
        check_call(signature, calls.inputs)
    except UsageError as error:
        raise FileFormatError(f"{folder / CALLS_FILE}: {error} Build the engine again.") from error
    if calls.prediction.shape[1:] != signature.output_shape:
        raise FileFormatError(
            f"{folder / CALLS_FILE}: predictions {calls.prediction.shape[1:]}, expected {signature.output_shape}. "
            "Build the engine again."
        )
    images = 1 if manifest.batch is None else manifest.batch.least
    rows = images * manifest.card.rows_per_image

    def network(inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One call at a time, so that each is computed alike whatever batches the engine was built for."""
        found = []
        for call in range(len(calls)):
            repeated = {name: np.repeat(array[call : call + 1], rows, axis=0) for name, array in inputs.items()}
            found.append(engine(repeated)[0].copy())  # an engine may reuse its output
        return np.stack(found)

    verdict = verify(calls, network, _computed_in(manifest, engine))
    record = _record(manifest, engine)
    if record is not None and verdict.passes:
        _remember(record, str(getattr(engine, "place", None)), verdict)
    return verdict


def check_forecast(folder: Path, manifest: Manifest, full: Engine, forecast: Engine) -> None:
    """Raise VerificationError unless a forecast with the residual of a full call gives the prediction of that call.

    The inputs are those of a golden call, or normal numbers if there is none.
    """
    card = manifest.card
    rows = card.rows_per_image * (1 if manifest.batch is None else manifest.batch.least)
    if CALLS_FILE in manifest.files:
        golden = GoldenCalls.of(read_npz(folder / CALLS_FILE))
        inputs = {name: np.repeat(array[:1], rows, axis=0) for name, array in golden.inputs.items()}
    else:
        generator = np.random.default_rng(0)
        inputs = card.signature.zeros(rows)
        for name in (card.signature.state.name, *(port.name for port in card.signature.requests)):
            if inputs[name].dtype == np.float32:
                inputs[name] = generator.standard_normal(inputs[name].shape, np.float32)
        middle = sum(card.sampling.process.span) / 2
        time = inputs[card.signature.time.name]
        time[...] = middle if np.isfinite(middle) else 1
    prediction, residual = full.outputs(inputs)
    found = relative_errors(forecast({**inputs, RESIDUAL: residual}), prediction).max()
    limit = FORECAST_ERRORS[_computed_in(manifest, full)]
    if not found <= limit:
        raise VerificationError(
            f"{folder}: a forecast with the residual of a full call is {found:.1e} from that call's prediction, "
            f"expected at most {limit:.0e}. Export the model without --forecast."
        )
