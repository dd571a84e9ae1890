"""The GPU benchmark works, shown in Triton's interpreter: times there mean nothing and are not looked at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.mark.slow
def test_every_kernel_is_checked_and_every_variant_timed(tmp_path):
    command = [sys.executable, BENCHMARK, "--dry-run", "--tokens", "40", "--json", tmp_path / "out.json"]
    subprocess.run(command, check=True, capture_output=True)
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["machine"] == "interpreter"
    assert facts["relative_error"]["40"] < 1e-3
    variants = {(each["kernel"], each["variant"]) for each in facts["timings"]}
    assert {kernel for kernel, _ in variants} == {"TimeGroupSelect", "MultiRegionSoftmax", "MultiRegionAttention"}
    assert {name for kernel, name in variants if kernel == "MultiRegionAttention"} == {
        "fused", "fused, again", "fused, numerators", "eager", "torch.compile", "flash, not rounded",
    }  # fmt: skip


@pytest.mark.slow
def test_the_sweep_times_every_block_shape(tmp_path):
    command = [sys.executable, BENCHMARK, "--dry-run", "--sweep", "--tokens", "33", "--batches", "1", "--json"]
    subprocess.run([*command, tmp_path / "out.json"], check=True, capture_output=True)
    (first, *rest) = json.loads((tmp_path / "out.json").read_text())["sweep"]
    assert first.keys() == {"tokens", "batch", "flash_us", "us", "queries", "keys", "warps", "stages"}
    assert rest
