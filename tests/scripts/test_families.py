"""scripts/families.py takes one class through the flow, and its page holds what it prints."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
NAME = "PriorTransformer"


@pytest.mark.full
def test_a_class_goes_through_the_flow_and_its_row_says_so(tmp_path, monkeypatch, capfd):
    """The child process is a call here, since it would import for as long as it works."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("families_of_diffusers", ROOT / "scripts" / "families.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "families_of_diffusers", module)  # dataclasses look there
    spec.loader.exec_module(module)

    def child(command, **_):
        flags = dict(zip(command[2::2], command[3::2], strict=True))
        module.run(flags["--child"], Path(flags["--folder"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=child, TimeoutExpired=subprocess.TimeoutExpired))
    monkeypatch.setattr(sys, "argv", ["families.py", "--folder", str(tmp_path), "--only", NAME])
    module.main()
    (row,) = json.loads((tmp_path / "families.json").read_text())["rows"]
    assert (row["name"], row["stage"], row["problem"]) == (NAME, "", None)
    for backend in ("onnxruntime", "openvino"):
        built = row["built"][backend]
        assert built["integer"] > 5
        assert built["fallen_back"] == []
        assert built["error"] < 1e-2
    assert capfd.readouterr().out.splitlines()[-1].startswith(f"| {NAME} | {row['products']} |")


def test_the_page_counts_its_rows():
    page = (ROOT / "docs" / "families.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if re.match(r"\| \w+(Model|Decoder|Transformer) \|", line)]
    runs = [row for row in rows if all(re.match(r"\d+ / 0", cell) for cell in row[3:6])]
    assert f"{len(runs)} of {len(rows)} classes" in page
    assert len(runs) >= 45
