#!/usr/bin/env python
"""Whether scales for placed steps should be found on rows of these steps: both tables on the placed chain.

    python scripts/placed_rows.py --scales scales.safetensors       of the demo model, by tqdit-calibrate --calls N
    python scripts/placed_rows.py text --scales text.safetensors    of the text demo, on captions never trained on

|x - x_ref|^2 / |x_ref|^2 of the fake-quantized network's chain against the float one from the same noise, with scales
of rows of the placed chain and of the model's own. Fewer groups than usual, so that each has steps of the placed chain.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ablation_subjects import STEPS, SUBJECTS
from numpy.typing import NDArray

from tqdit.calibration.config import TQ_DIT
from tqdit.calibration.flow import calibrate
from tqdit.golden import relative_errors
from tqdit.models.loaded import LoadedModel
from tqdit.models.recording import Recording
from tqdit.ports import check_requests
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import read_scale_table
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.schedule import SamplingSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=list(SUBJECTS), default="demo")
    parser.add_argument("--scales", type=Path, required=True)
    parser.add_argument("-n", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=3, help="of the noise (default: %(default)s)")
    args = parser.parse_args()
    table = read_scale_table(args.scales)
    if table.placed is None:
        parser.error(f"{args.scales} has no placed steps; calibrate with --calls.")
    subject = SUBJECTS[args.model](STEPS[args.model], args.n, args.n)
    model, calls = subject.model, subject.calls
    if table.fingerprint != model.fingerprint:
        parser.error(f"{args.scales} has scales of {table.model}, expected {args.model}. Pass a table of this model.")
    _, requests = check_requests(model.signature, subject.job.requests(0, subject.prompts))
    placed = model.sampling.choose(None, table.placed.sampler, table.placed.timesteps)
    expected = sample(model, placed, requests, args.n, args.seed)
    for spec in (placed, model.sampling):
        data = calls if calls is None or spec is model.sampling else along(calls, model, spec)
        with tempfile.TemporaryDirectory() as work:
            config = replace(TQ_DIT, groups=args.groups)
            found = calibrate(replace(model, sampling=spec), config, Path(work), data=data).table
        errors = relative_errors(sample(apply(model, found), placed, requests, args.n, args.seed), expected)
        print(f"rows of {spec}: median {np.median(errors):.1e}, mean {errors.mean():.1e}", flush=True)


def sample(
    model: LoadedModel, spec: SamplingSpec, requests: Mapping[str, NDArray[Any]], count: int, seed: int
) -> NDArray[np.float32]:
    """The ends of guided chains, (count, ...)."""
    return run(chains_of(model, spec, requests, count, seed), model).copy()


def along(calls: Recording, model: LoadedModel, spec: SamplingSpec) -> Recording:
    """The same requests, in the states of another chain."""
    chains = chains_of(model, spec, calls.requests, len(calls), 0)
    states = np.empty((len(calls), spec.steps, *model.signature.state.row_shape), np.float32)

    def keeping(inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        states[:, chains.step_of(0)] = chains.x
        return model(inputs)

    run(chains, keeping)
    return Recording(replace(calls.interface, sampling=spec), states, calls.requests)


def chains_of(
    model: LoadedModel, spec: SamplingSpec, requests: Mapping[str, NDArray[Any]], count: int, seed: int
) -> Chains:
    chains, scale = Chains(model.signature, model.guidance, count), check_scale(model.guidance, None)
    for image in range(count):
        chains.add(spec.schedule, {name: values[image] for name, values in requests.items()}, scale, seed, image)
    return chains


if __name__ == "__main__":
    main()
