"""The text demo's judge counts the fields that a caption names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tqdit.demo import text_judge
from tqdit.demo.captions import Scene, caption, draw_scenes
from tqdit.demo.text_judge import CHOICES, TextJudge, recognised, truth


def test_a_field_that_a_caption_leaves_open_is_not_judged():
    scenes = draw_scenes(8, np.random.default_rng(0))
    scenes[2:4] = [replace(scene, weight="") for scene in scenes[2:4]]
    assert (truth(scenes)["weight"] < 0).tolist() == [False, False, True, True, False, False, False, False]
    found = recognised(torch.zeros(8, 3, 24, 24), scenes, TextJudge())
    assert {name: len(right) for name, right in found.items()} == dict.fromkeys(CHOICES, 8) | {"weight": 6}


def test_a_judge_of_one_opinion_recognises_what_agrees_with_it(tmp_path, monkeypatch, capsys):
    judge = TextJudge()
    for name, head in judge.heads.items():
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.eye(len(CHOICES[name]))[0]  # sees the first choice of each field
    monkeypatch.setattr(text_judge, "load_text_judge", lambda: judge)
    scenes = [
        Scene("0", "thin", "red", "blue"), Scene("0", "bold", "red", "blue"), Scene("7", "", "green", "red", "two"),
    ]  # fmt: skip
    (tmp_path / "captions.txt").write_text("\n".join(caption(scene, 0) for scene in scenes), encoding="utf-8")
    numbers = np.array([0, 1, 2, 1])
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((4, 24, 24, 3), np.uint8), arr_1=numbers)
    text_judge.main(tmp_path / "s.npz", tmp_path / "captions.txt")
    shares = {line.split()[0]: line.split()[1:4] for line in capsys.readouterr().out.splitlines()}
    assert shares == {
        "letter": ["75.0%", "of", "4"], "weight": ["33.3%", "of", "3"], "ink": ["75.0%", "of", "4"],
        "ground": ["25.0%", "of", "4"], "count": ["75.0%", "of", "4"], "place": ["100.0%", "of", "4"],
    }  # fmt: skip


def test_a_line_that_is_no_caption_is_named(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((2, 24, 24, 3), np.uint8), arr_1=np.array([0, 1]))
    for text in ("a red A on blue", "a red A on blue\na red", "a red A on blue\non blue and red"):
        (tmp_path / "captions.txt").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"captions\.txt: line 2 "):
            text_judge.main(tmp_path / "s.npz", tmp_path / "captions.txt")
