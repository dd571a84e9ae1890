"""DiT-XL/2 (675 million parameters) exports within the time, memory and size that were promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "full_size.py"


def export(folder, blocks):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), str(blocks)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.full
def test_an_int8_file_within_3_minutes_8_gigabytes_and_27_percent_of_float32(tmp_path):
    """Measured: 24 s, 5.9 GB, 25.3 %, conditioning weights included. The time bound is the promise, not a race."""
    measured = export(tmp_path, 28)
    assert measured["seconds"] < 180
    assert measured["peak_bytes"] < 8e9
    assert measured["file_bytes"] <= 0.27 * measured["float32_bytes"]
    assert measured["products"].startswith("W8A8: products 114 integer, 56 simulated, 31 weight-only")


@pytest.mark.slow
def test_two_blocks_of_that_width_take_their_share(tmp_path):
    """Measured: 0.94 GB and 27.2 %. One more copy of the weights would be 0.21 GB, one in float32 2.5 % or more."""
    measured = export(tmp_path, 2)
    assert measured["peak_bytes"] < 0.55e9 + 2.6 * measured["float32_bytes"]
    assert measured["file_bytes"] <= 0.275 * measured["float32_bytes"]
    assert measured["products"].startswith("W8A8: products 10 integer, 4 simulated, 5 weight-only")
