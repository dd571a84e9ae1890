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
from tqdit.engines.run.backend import Engine, open_engine
from tqdit.errors import FileFormatError, OutputError, UsageError, VerificationError
from tqdit.files import cache_folder, read_npz, whole_file
from tqdit.golden import GoldenCalls, Verdict, verify
from tqdit.ports import check_call


def verify_bundle(folder: Path, manifest: Manifest, device: int | None = None) -> Verdict:
    """Load the engine and run its golden calls. Raises VerificationError if there are none, BackendError if it cannot
    run here.
    """
    engine = open_engine(folder, manifest, manifest.entry, device=device)
    try:
        return verify_engine(folder, manifest, engine)
    finally:
        engine.close()


def verify_once(folder: Path, manifest: Manifest, engine: Engine) -> None:
    """Run the golden calls of an engine that was built where it could not run, if they have not been run here before.

    Only engines of GPUs are built elsewhere; they have a `place`: the GPU and the library. That they were right is
    recorded in $XDG_CACHE_HOME/tqdit/verified. Raises VerificationError if they are wrong.
    """
    place = getattr(engine, "place", None)
    if place is None or manifest.verified is not None or CALLS_FILE not in manifest.files:
        return
    parts = [manifest.files[name].sha256 for name in (manifest.entry, CALLS_FILE)]
    name = hashlib.sha256(" ".join([*parts, place]).encode()).hexdigest()[:32]
    record = cache_folder("verified") / f"{name}.json"
    if record.is_file():
        return
    verdict = verify_engine(folder, manifest, engine)
    verdict.check(str(folder))
    with suppress(OSError, OutputError):  # then they run again at the next opening
        record.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(record) as temporary:
            temporary.write_text(json.dumps({"place": place, "found": Verified.of(verdict).line}) + "\n")


def verify_engine(folder: Path, manifest: Manifest, engine: Engine) -> Verdict:
    """The same with an engine that is open."""
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
    on_gpu = getattr(engine, "place", None) is not None
    return verify(calls, network, "fp16" if on_gpu and manifest.float_type == "fp32" else manifest.float_type)
