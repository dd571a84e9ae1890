"""scripts/families.py takes one class through the flow, and its page holds what it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "PriorTransformer"


@pytest.mark.slow
def test_a_class_goes_through_the_flow_and_its_row_says_so(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "families.py", "--folder", tmp_path, "--only", NAME]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "demo-weights")))}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (row,) = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert (row["name"], row["stage"], row["problem"]) == (NAME, "", None)
    for backend in ("onnxruntime", "openvino"):
        built = row["built"][backend]
        assert built["integer"] > 5
        assert built["fallen_back"] == []
        assert built["error"] < 1e-2
    assert done.stdout.splitlines()[-1].startswith(f"| {NAME} | {row['products']} |")


def test_the_page_counts_its_rows():
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if re.match(r"\| \w+(Model|Decoder|Transformer) \|", line)]
    runs = [row for row in rows if all(re.match(r"\d+ / 0", cell) for cell in row[3:6])]
    assert f"{len(runs)} of {len(rows)} classes" in page
    assert len(runs) >= 45
