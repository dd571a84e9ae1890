"""Each shipped model has its judge and its data; the text demo is asked for captions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tqdit.console import Console
from tqdit.demo import captions
from tqdit.engines.run.requests import PromptSource
from tqdit.engines.run.shards import SamplingJob
from tqdit.errors import UsageError
from tqdit.evaluate import tools
from tqdit.evaluate.extractors import JudgeExtractor
from tqdit.evaluate.judges import JUDGES, TextJudgeExtractor, letters
from tqdit.evaluate.subjects import shown
from tqdit.evaluate.tools import MeasurementOptions, choose_metrics

QUIET = Console(quiet=True)


@pytest.mark.parametrize("model", list(JUDGES))
def test_a_judge_knows_the_data_of_its_model(model):
    judge = JUDGES[model]
    images = judge.draw(64, 5)
    assert images.shape == (judge.image_size, judge.image_size, 3)
    found = judge.extractor()(images.pixels)
    assert found.pooled.shape == (64, judge.extractor().size)
    assert (found.probabilities.argmax(1) == images.labels).mean() > 0.95


def test_the_model_of_an_engine_names_the_judge(monkeypatch):
    monkeypatch.setattr(tools, "DATA_COUNT", 64)
    for model, size in (("text", 24), ("demo", 16)):
        make_metrics = choose_metrics(MeasurementOptions(), QUIET, (size, size, 3), SimpleNamespace(model=model))
        metrics = make_metrics()
        assert type(metrics.extractor) is JUDGES[model].extractor
        assert metrics.target.source == JUDGES[model].draw(64, tools.DATA_SEED).source


def test_prompts_of_files_are_not_known_so_their_images_have_no_judge():
    assert choose_metrics(MeasurementOptions(), QUIET, (24, 24, 3), None) is None
    assert choose_metrics(MeasurementOptions(), QUIET, (24, 24, 3), SimpleNamespace(model="demo")) is None


def test_images_of_another_size_are_refused():
    with pytest.raises(UsageError, match="the text demo's judge knows images of 24x24, these are 20x16"):
        TextJudgeExtractor()(np.zeros((1, 16, 20, 3), np.uint8))


def test_the_letter_of_a_caption_is_what_its_image_should_show():
    texts = captions.draw_captions(40, held_out=True)
    assert texts == captions.draw_captions(40, held_out=True)
    assert all(captions.is_held_out(*(getattr(scene, name) for name in ("letter", "weight", "ink", "ground")))
               for scene in map(captions.parse, texts))  # fmt: skip
    assert [captions.CLASSES[place] for place in letters(texts)] == [captions.parse(text).letter for text in texts]
    assert letters([*texts, "a mauve dog"]) is None


def test_a_judge_is_told_letters_and_others_the_numbers_of_prompts():
    source = PromptSource(2, ("a bold red A on blue", "two green 7s on black"))
    job = SamplingJob(
        engine="", steps=1, sampler="euler", classes=(), guidance_scale=None, seed=0, count=3, shard_size=2,
        prompts=source,
    )  # fmt: skip
    a, seven = captions.CLASSES.index("A"), captions.CLASSES.index("7")
    assert shown(job, TextJudgeExtractor()).tolist() == [a, seven, a]
    assert shown(job, SimpleNamespace(is_judge=False)).tolist() == [0, 1, 0]
    other = replace(job, prompts=PromptSource(1, ("a picture of something",)))
    assert shown(other, TextJudgeExtractor()) is None
    assert shown(replace(job, prompts=None, classes=(4, 2)), JudgeExtractor()).tolist() == [4, 2, 4]
