"""The code in docs/runtime.md runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest

GUIDE = Path(__file__).parents[3] / "docs" / "runtime.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)

EXPECTED = [  # what a block leaves behind, and its shape
    {"images": (4, 8, 8, 3), "again": (1, 8, 8, 3)},
    {"quick": (4, 8, 8, 3)},
    {"image": (8, 8, 3)},
    {"images": (3, 8, 8, 3)},
    {"previews": (4, 8, 8, 3)},
    {"prediction": (2, 6, 8, 8)},
    {"pictures": (2, 8, 8, 3)},
    {"pictures": (2, 8, 8, 3)},
]


@pytest.fixture(scope="module")
def place(bundle, tiny_pipeline, tmp_path_factory):
    """A folder with the engines and the pipeline that the guide names."""
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "model.engine").symlink_to(bundle)
    for name in ("dit.engine", "DiT-XL-2-256"):
        (folder / name).symlink_to(tiny_pipeline / name)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_guide_runs(place, number, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    exec(compile(BLOCKS[number], f"{GUIDE.name}, block {number}", "exec"), names)
    shapes = {name: np.shape(value) for name, value in names.items()}
    assert shapes.items() >= EXPECTED[number].items()
    if "again" in names:
        np.testing.assert_array_equal(names["again"], names["images"][2:3])


def test_the_guide_has_its_blocks():
    assert len(BLOCKS) == len(EXPECTED)
