#!/usr/bin/env python
"""Whether scales for placed steps should be found on rows of these steps: both tables on the placed chain.

    python scripts/placed_rows.py scales.safetensors     a table of the demo model that tqdit-calibrate --calls N wrote

|x - x_ref|^2 / |x_ref|^2 of the fake-quantized network's chain against the float one from the same noise, with scales
of rows of the placed chain and of the model's own. Fewer groups than usual, so that each has steps of the placed chain.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tqdit.calibration.config import TQ_DIT
from tqdit.calibration.flow import calibrate
from tqdit.calibration.rows import random_requests
from tqdit.golden import relative_errors
from tqdit.models.load import load_model
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import read_scale_table
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.schedule import SamplingSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("-n", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=3, help="of the noise (default: %(default)s)")
    args = parser.parse_args()
    table = read_scale_table(args.table)
    if table.placed is None:
        parser.error(f"{args.table} has no placed steps; calibrate with --calls.")
    model = load_model(table.model)
    placed = model.sampling.choose(None, table.placed.sampler, table.placed.timesteps)
    expected = sample(model, placed, args.n, args.seed)
    for spec in (placed, model.sampling):
        with tempfile.TemporaryDirectory() as work:
            found = calibrate(replace(model, sampling=spec), replace(TQ_DIT, groups=args.groups), Path(work)).table
        errors = relative_errors(sample(apply(model, found), placed, args.n, args.seed), expected)
        print(f"rows of {spec}: median {np.median(errors):.1e}, mean {errors.mean():.1e}", flush=True)


def sample(model: LoadedModel, spec: SamplingSpec, count: int, seed: int) -> NDArray[np.float32]:
    """The ends of guided chains, (count, ...)."""
    assert model.guidance is not None
    chains, requests = Chains(model.signature, model.guidance, count), random_requests(model.signature, count, seed)
    for image in range(count):
        request = {name: values[image] for name, values in requests.items()}
        chains.add(spec.schedule, request, model.guidance.scale, seed, image)
    return run(chains, model).copy()


if __name__ == "__main__":
    main()
