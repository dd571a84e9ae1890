"""The two demo models as the ablation sees them: what calibrates them, what is sampled, and who judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.rows import CalibrationRows, Trajectory, pick, recorded_rows
from tqdit.demo import captions
from tqdit.demo.weights import shipped_pipeline
from tqdit.engines.run.requests import Prompts, PromptSource
from tqdit.engines.run.shards import SamplingJob
from tqdit.evaluate.extractors import Extractor
from tqdit.evaluate.judges import JUDGES, letters
from tqdit.evaluate.samples import Images
from tqdit.evaluate.tools import DATA_COUNT, DATA_SEED
from tqdit.models.directories import open_pipeline
from tqdit.models.load import load_model
from tqdit.models.loaded import LoadedModel
from tqdit.models.model_card import read_pipeline_card
from tqdit.models.recorder import Recorder
from tqdit.models.recording import Recording

STEPS = {"demo": 50, "text": 28}


@dataclass(frozen=True, eq=False)
class Subject:
    """A float model with all that its rows are measured by."""

    model: LoadedModel
    job: SamplingJob  # without its seed
    prompts: Prompts | None  # of the job
    labels: NDArray[np.int64] | None  # (N,), what the judge should recognise in each image
    calls: Recording | None  # what calibration takes its rows from; None: the model's own chains
    held_out: Callable[[QuantizationConfig], CalibrationRows]  # rows of chains that no calibration saw
    extractor: Extractor
    data: Images  # of the data set that the model was trained on


def class_demo(steps: int, images: int, batch: int) -> Subject:
    model = load_model("demo")
    label = model.signature.label
    assert label is not None
    job = SamplingJob(
        engine=model.fingerprint, steps=steps, sampler=model.sampling.sampler, classes=tuple(range(label.choices or 0)),
        guidance_scale=None, seed=0, count=images, shard_size=batch,
    )  # fmt: skip
    labels = np.resize(np.array(job.classes), images)

    def held_out(config: QuantizationConfig) -> CalibrationRows:
        trajectory = Trajectory(model, config, pick(model, config))
        trajectory.run()
        return trajectory.rows()

    judge = JUDGES["demo"]
    data = judge.draw(DATA_COUNT, DATA_SEED)
    return Subject(model, job, None, labels, None, held_out, judge.extractor(), data)


def text_demo(steps: int, images: int, batch: int) -> Subject:
    """Calibrated with the prompts of its card; judged on captions of combinations that were never trained on."""
    folder = shipped_pipeline()
    card = read_pipeline_card(folder)
    calls = _record(folder, card.prompts, steps)
    texts = captions.draw_captions(images, held_out=True)
    model = load_model("text", interface=calls.interface)
    asked = _record(folder, texts, 2)  # for the embeddings alone
    few = _record(folder, texts[:8], steps, first_seed=10_000)
    prompts = Prompts(PromptSource(images, texts), asked.requests)
    job = SamplingJob(
        engine=model.fingerprint, steps=steps, sampler=model.sampling.sampler, classes=(), guidance_scale=None, seed=0,
        count=images, shard_size=batch, prompts=prompts.source,
    )  # fmt: skip
    judge = JUDGES["text"]
    return Subject(
        model, job, prompts, letters(texts), calls, lambda config: recorded_rows(model, config, few),
        judge.extractor(), judge.draw(DATA_COUNT, DATA_SEED),
    )  # fmt: skip


def _record(folder: Path, texts: tuple[str, ...], steps: int, first_seed: int = 0) -> Recording:
    """Calls of the text demo's pipeline, one chain for each text."""
    pipeline = open_pipeline(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    call = {**read_pipeline_card(folder).call, "num_inference_steps": steps}
    with Recorder(pipeline) as calls:
        for number, text in enumerate(texts):
            pipeline(text, **call, generator=torch.Generator().manual_seed(first_seed + number), output_type="latent")
    return calls.recording()


SUBJECTS = {"demo": class_demo, "text": text_demo}
