"""`scripts/ingredients.py --tokens`: the schemes of the softmax on random logits, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_error_of_each_scheme_is_written_for_each_seed(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "ingredients.py", "--tokens", "64", "512", "--seeds", "0", "1"]
    done = subprocess.run([*command, "--json", tmp_path / "rows.json"], capture_output=True, text=True, check=True)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["tokens"], row["spread"], row["mean"]) for row in rows] == [
        (tokens, spread, mean) for tokens in (64, 512) for spread in (1, 3) for mean in (0, 1)
    ]
    assert sum(line.startswith(("| 64 |", "| 512 |")) for line in done.stdout.splitlines()) == len(rows)
    for row in rows:
        first, second = row["errors"]
        assert first != second
        for errors in (first, second):
            assert 0 < 2 * errors["numerators"] < errors["probabilities"] < errors["one scale"] * 2
