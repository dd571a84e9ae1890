"""What each ingredient is worth: error of quantized chains against float ones from the same noise.

    python scripts/ingredients.py                           W8A8, then the rows of Table III at W6A6
    python scripts/ingredients.py --bits 6 6 --presets ho tq-dit --seeds 0 1 2 --json rows.json
    python scripts/ingredients.py text --presets tq-dit best --bits 8 8      the text demo, captions never trained on
    python scripts/ingredients.py --tokens 64 1024 4608     attention on random logits: schemes of the softmax

Columns, all relative squared errors against the float model, averaged over seeds of the calibration:
    eps    predicted noise, on rows of chains that no calibration saw
    step   the same, each row weighted by what its eps error does to the sampler's next state
    x0     final samples of whole chains; the mean over images with its standard error over images and seeds
    median of x0 over images: the mean belongs to the few images whose content flips

With --tokens no model runs. The table has the error of P V, relative and squared, with the best scale of each scheme
at A of --bits: logits N(0, s^2), V N(m, 1) in 64 columns, 64 queries a seed, mean over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation_subjects import STEPS, SUBJECTS, Subject
from numpy.typing import NDArray
from torch import Tensor

from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.calibration.rows import CalibrationRows, random_requests, sampling_of
from tqdit.calibration.work import versions
from tqdit.engines.run.sampler import Sampler
from tqdit.evaluate.chains import run
from tqdit.evaluate.paired import relative_errors
from tqdit.models.loaded import LoadedModel
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.schemes.softmax_numerator import SoftmaxNumerator
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax
from tqdit.sampling.correction import Correction

TABLE_III = ["min-max", "mse", "ho", "ho+mrq", "tq-dit"]
QUERIES, SLICE = 64, 16  # of --tokens: in all, and at a time, which keeps memory small
HELD_OUT_SEED = 10_000  # of chains that judge, away from every calibration


@dataclass(frozen=True)
class Row:
    """One preset at one pair of bits under one seed."""

    name: str
    bits: tuple[int, int]
    seed: int
    eps: float
    step: float
    x0: tuple[float, ...]  # per image
    seconds: float


class Judge:
    """Float references: held-out rows and final samples."""

    def __init__(self, subject: Subject, images: int) -> None:
        self.subject, self.model, label = subject, subject.model, subject.model.signature.label
        config = QuantizationConfig(rows_per_group=16, chains=4, seed=HELD_OUT_SEED).for_model(self.model)
        self.rows: CalibrationRows = subject.held_out(config)
        weights = sampling_of(self.model, config).schedule.error_weights
        self.factor = torch.from_numpy(weights[self.rows.step.cpu()]).square()
        self.job = replace(subject.job, seed=HELD_OUT_SEED)
        if label is not None:
            drawn = random_requests(self.model.signature, images, HELD_OUT_SEED)[label.name]
            self.job = replace(self.job, classes=tuple(drawn.tolist()))
        self.samples = self._samples(self.model)
        self.eps = self._eps(self.model)

    @torch.no_grad()
    def _eps(self, model: LoadedModel) -> Tensor:
        return model.call(self.rows.inputs)[:, : model.signature.channels].double()

    def _samples(self, model: LoadedModel, correction: Correction | None = None) -> NDArray[np.float32]:
        """x_0 of chains with seeded noise and requests, (images, C, ...)."""
        card = replace(model.card(), correction=correction)
        sampler = Sampler(card, model, None, self.job.shard_size)
        return run(sampler, self.job, lambda *_: None, self.subject.prompts).latents

    def judge(
        self, quantized: LoadedModel, correction: Correction | None = None
    ) -> tuple[float, float, tuple[float, ...]]:
        energy = self.eps.square().flatten(1).sum(1).cpu()
        error = (self._eps(quantized) - self.eps).square().flatten(1).sum(1).cpu()
        found = self._samples(quantized, correction)
        step = float((self.factor * error).sum() / (self.factor * energy).sum())
        return float(error.sum() / energy.sum()), step, tuple(relative_errors(self.samples, found).tolist())


def measure(judge: Judge, name: str, config: QuantizationConfig, work: Path) -> Row:
    start = time.monotonic()
    table = calibrate(judge.model, config, work, data=judge.subject.calls).table
    seconds = time.monotonic() - start
    bits = (config.weight_bits, config.activation_bits)
    return Row(name, bits, config.seed, *judge.judge(apply(judge.model, table), table.correction), seconds)


def show(rows: list[Row]) -> None:
    """One line for all seeds of one preset."""
    x0 = np.array([row.x0 for row in rows])
    error = x0.std(ddof=1) / x0.size**0.5
    first = rows[0]
    print(
        f"{first.name:<16} W{first.bits[0]}A{first.bits[1]}  {np.mean([r.eps for r in rows]):.2e}  "
        f"{np.mean([r.step for r in rows]):.2e}  {x0.mean():.4f} +- {error:.4f}  {np.median(x0):.5f}   "
        + " ".join(f"{np.median(row.x0):.5f}" for row in rows),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=list(SUBJECTS), default="demo")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), metavar="PRESET", default=None)
    parser.add_argument("--bits", nargs=2, type=int, metavar=("W", "A"), default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, help="of the judging chains (default: 100, and 28 of the text demo)")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE", help="change a knob of every preset")
    parser.add_argument("--work", type=Path, help="keep calibration rows there (default: a temporary folder)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", nargs="+", type=int, help="of attention on random logits, without a model")
    args = parser.parse_args()
    facts: dict[str, Any] = {"versions": versions(torch.device(args.device))}
    if args.tokens:
        found = show_attention(args.tokens, (args.bits or (8, 8))[1], args.seeds)
        if args.json:
            args.json.write_text(json.dumps(facts | {"rows": found}, indent=1) + "\n")
        return
    jobs = [(name, tuple(args.bits or (6, 6))) for name in args.presets or TABLE_III]
    if args.bits is None and args.presets is None:
        jobs.insert(0, ("tq-dit", (8, 8)))
    changes = dict(entry.split("=", 1) for entry in args.set)
    steps = args.steps or {"demo": 100, "text": STEPS["text"]}[args.model]
    subject = SUBJECTS[args.model](steps, args.images, args.images)
    judge = Judge(replace(subject, model=subject.model.to(args.device)), args.images)
    print("preset           bits  eps       step      x0                 median    median of each seed")
    done: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, (weight_bits, activation_bits) in jobs:
            config = replace(PRESETS[name], weight_bits=weight_bits, activation_bits=activation_bits)
            config = QuantizationConfig(**{**config.to_json(), **_typed(changes)})
            label = name + "".join(f" {key}={value}" for key, value in changes.items())
            work = args.work or Path(temporary)
            rows = [measure(judge, label, replace(config, seed=seed), work) for seed in args.seeds]
            show(rows)
            done += rows
    if args.json:
        facts |= {"model": args.model, "steps": steps, "rows": [asdict(row) for row in done]}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def attention_errors(tokens: int, spread: float, mean: float, bits: int, seed: int) -> dict[str, float]:
    """Name of a scheme -> squared error of P V with its best scale, relative to P V."""
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, Tensor] = {}
    energy = 0.0
    v = mean + torch.randn(tokens, 64, generator=generator)
    for _ in range(QUERIES // SLICE):
        p = torch.softmax(spread * torch.randn(SLICE, tokens, generator=generator), -1)
        energy += float((p @ v).square().sum())
        for name, found in _rounded(p, bits):
            error = torch.stack([((each - p) @ v).square().sum() for each in found])
            errors[name] = errors.get(name, 0) + error
    return {name: float(error.min()) / energy for name, error in errors.items()}


def _rounded(p: Tensor, bits: int) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """P^ with each scale that a search tries, for each scheme."""
    one, fixed = torch.ones(1), TwoRegionSoftmax.fixed(bits)
    low = TwoRegionSoftmax.candidates("low_scale", one, one, bits, fixed)
    regions = [{"low_scale": each, "high_scale": torch.tensor(fixed["high_scale"])} for each in low]
    steps = torch.linspace(0.01, 1.2, 25) * p.max() / ((1 << (bits - 1)) - 1)
    largest = p.amax(-1, keepdim=True)
    yield "one scale", (Symmetric.fake_quantize(p, bits, {"scale": step}) for step in steps)
    yield "probabilities", (TwoRegionSoftmax.fake_quantize(p, bits, each) for each in regions)
    yield "numerators", (SoftmaxNumerator.fake_quantize(p, bits, each) for each in regions)
    numerators = (TwoRegionSoftmax.fake_quantize(p / largest, bits, each) for each in regions)
    yield "numerators over their rounded sum", (each / each.sum(-1, keepdim=True) for each in numerators)


def show_attention(tokens: list[int], bits: int, seeds: list[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    deviation = np.zeros(4)
    for count, spread, mean in itertools.product(tokens, (1.0, 3.0), (0.0, 1.0)):
        found = [attention_errors(count, spread, mean, bits, seed) for seed in seeds]
        if not rows:
            print(f"A{bits}\n| tokens | s | m | " + " | ".join(found[0]) + " |\n" + "|---" * (3 + len(found[0])) + "|")
        rows.append({"tokens": count, "spread": spread, "mean": mean, "bits": bits, "seeds": seeds, "errors": found})
        errors = np.array([list(each.values()) for each in found])  # (seeds, schemes)
        average = errors.mean(0)
        deviation = np.maximum(deviation, np.abs(errors / average - 1).max(0))
        cells = " | ".join(f"{error:.1e}" for error in average)
        print(f"| {count} | {spread:g} | {mean:g} | {cells} |", flush=True)
    print("| a seed's largest deviation | | | " + " | ".join(f"{share:.0%}" for share in deviation) + " |")
    return rows


def _typed(changes: dict[str, str]) -> dict[str, Any]:
    """Values of knobs, of the type that the knob has."""
    default, typed = QuantizationConfig(), {}
    for knob, text in changes.items():
        name = knob.replace("-", "_")
        kind = {"steps": int, "mean_columns": int, "guidance_scale": float}.get(name) or type(getattr(default, name))
        typed[name] = text.lower() == "true" if kind is bool else kind(text)
    return typed


if __name__ == "__main__":
    main()
