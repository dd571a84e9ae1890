"""The golden calls of a bundle, run where the engine runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.engines.bundle import CALLS_FILE, Manifest
from tqdit.engines.run.backend import Engine, open_engine
from tqdit.files import read_npz
from tqdit.golden import GoldenCalls, Verdict, verify


def verify_bundle(folder: Path, manifest: Manifest) -> Verdict | None:
    """Load the engine and run its golden calls; None if the bundle holds none. Raises BackendError if it cannot run."""
    if CALLS_FILE not in manifest.files:
        return None
    engine = open_engine(folder, manifest)
    try:
        return verify_engine(folder, manifest, engine)
    finally:
        engine.close()


def verify_engine(folder: Path, manifest: Manifest, engine: Engine) -> Verdict | None:
    """The same with an engine that is open."""
    if CALLS_FILE not in manifest.files:
        return None
    calls = GoldenCalls.of(read_npz(folder / CALLS_FILE))
    images = 1 if manifest.batch is None else manifest.batch.least
    rows = images * manifest.card.rows_per_image

    def network(inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One call at a time, so that each is computed alike whatever batches the engine was built for."""
        found = [engine({name: np.repeat(array[k : k + 1], rows, 0) for name, array in inputs.items()})[0]
                 for k in range(len(calls))]  # fmt: skip
        return np.stack(found)

    return verify(calls, network, manifest.float_type)
