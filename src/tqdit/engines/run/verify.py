"""The golden calls of a bundle, run where the engine runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.bundle import CALLS_FILE, Manifest, Verified
from tqdit.engines.gpu import GpuChoice
from tqdit.engines.run.backend import Engine, open_engine
from tqdit.errors import FileFormatError, OutputError, UsageError, VerificationError
from tqdit.files import cache_folder, read_npz, whole_file
from tqdit.golden import GoldenCalls, Verdict, verify
from tqdit.ports import check_call


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

    # GPUs multiply float32 in TF32, which has the significant bits of float16
    place = getattr(engine, "place", None)
    verdict = verify(calls, network, "fp16" if place and manifest.float_type == "fp32" else manifest.float_type)
    record = _record(manifest, engine)
    if record is not None and verdict.passes:
        _remember(record, str(place), verdict)
    return verdict
