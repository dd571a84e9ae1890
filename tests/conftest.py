"""Fixtures that more than one folder of tests uses; the models themselves stand in `support.py`.

Neither this file nor `support.py` nor `tables.py` imports torch or onnx before a test needs them: `pytest
tests/test_noise.py` starts in a second.
"""

import ctypes
import functools
import gc
import os
import re
import sys
import tempfile

import numpy as np
import pytest

import support
from tables import make_table


def has_cuda() -> bool:
    """Whether the driver names a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# Libraries read these when they are imported. One thread: the models are too small for two, parallel workers share the
# cores, and results then do not depend on the machine's load.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
if not has_cuda():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    """The folder of `support.made_once`: workers inherit its name from the process that starts them."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="tqdit-tests-")
        config.add_cleanup(folder.cleanup)
        os.environ["TQDIT_TEST_SHARED"] = folder.name


def pytest_collection_finish():
    """Python looks for garbage after each 700 new objects. A trace makes millions, of which most are freed at once:
    looking less often spares a tenth of its time.
    """
    gc.set_threshold(100_000, 20, 100)


def pytest_ignore_collect(collection_path, config):
    """`scripts/test --fast` does not even import a file of which it runs no test: many import diffusers."""
    expression = config.option.markexpr
    if collection_path.suffix != ".py" or not re.fullmatch(r"not \w+( and not \w+)*", expression):
        return None
    left_out = "|".join(re.findall(r"not (\w+)", expression))
    first = rf"^pytestmark = \[?\s*pytest\.mark\.({left_out})\b"
    return True if re.search(first, collection_path.read_text(), re.MULTILINE) else None


@pytest.fixture(autouse=True)
def same_random_numbers(request):
    """A test sees the same numbers whichever tests run before it: torch's and those of its module's `RNG`."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def traces_are_made_once():
    """Of networks that many tests export. Tests of the trace itself have imported `trace_graph` before."""
    graph = sys.modules.get("tqdit.exporter.graph")
    if graph is not None and graph.trace_graph.__module__ != "support":
        graph.trace_graph = support.trace_once(graph.trace_graph)


@pytest.fixture(autouse=True)
def torchs_onnx_functions_are_read_once():
    """Each export reads the source of some hundred of them again, a sixth of a tiny network's trace."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is not None and not hasattr(registration.ONNXRegistry.from_torchlib, "cache_info"):
        registration.ONNXRegistry.from_torchlib = staticmethod(functools.cache(registration.ONNXRegistry.from_torchlib))


@pytest.fixture(autouse=True)
def products_are_found_once():
    """Of the DiTs that tests load, of which most have one configuration."""
    published = sys.modules.get("tqdit.models.families.published")
    if published is not None and published.products_of.__module__ != "support":
        published.products_of = support.products_once(published.products_of)


# Functions that call a network with tensors without memory, at each load and calibration: a second for a tiny one.
OBSERVERS = {
    "tqdit.models.products": "_observe",
    "tqdit.models.known": "_read",
    "tqdit.calibration.flow": "product_costs",
    "tqdit.calibration.capture": "kept_bytes",
}


@pytest.fixture(autouse=True)
def structures_are_observed_once():
    """Of the networks that tests load and calibrate, of which most differ in their weights alone."""
    for name, function in OBSERVERS.items():
        module = sys.modules.get(name)
        if module is not None and getattr(module, function).__module__ != "support":
            setattr(module, function, support.once_for_a_structure(getattr(module, function)))


@pytest.fixture
def network():
    """A tiny DiT in the published layout: two blocks of width 16, random non-zero weights."""
    from tqdit.models.dit import DiT, randomize

    return randomize(DiT(support.TINY), scale=0.3).eval()


@pytest.fixture
def checkpoint(tmp_path, network):
    """Its weights as a flat `.pt` with a model card; of unusual width, so it needs `heads=2`."""
    import torch

    path = tmp_path / "tiny.pt"
    torch.save(network.state_dict(), path)
    path.with_suffix(".json").write_text('{"num_classes": 5}')
    return path


@pytest.fixture
def own_file(tmp_path, network):
    """Its weights as a safetensors file with a model card that tells its heads."""
    from safetensors.torch import save_file

    path = tmp_path / "own.safetensors"
    save_file(network.state_dict(), path)
    path.with_suffix(".json").write_text('{"num_classes": 5, "heads": 2}')
    return path


@pytest.fixture
def theirs():
    """The tiny model as diffusers' own module, random non-zero weights, embedders that differ between the blocks."""
    from tqdit.models.dit import randomize

    return randomize(support.diffusers_dit(), scale=0.3).eval()


@pytest.fixture
def diffusers_folder(tmp_path, theirs):
    """What diffusers' save_pretrained writes for it."""
    theirs.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory):
    """bundle_of(origin, pixels=..., sampler=..., ...) -> folder of an ONNX Runtime bundle."""
    from tqdit.engines.build.engine import build_engine
    from tqdit.exporter.graph import ExportConfig
    from tqdit.exporter.onnx_writer import write

    made = {}

    def build(origin="published", pixels=True, kind=None, **config):
        key = (origin, pixels, kind, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("bundle")
            table = None if kind is None else make_table(support.tiny_model(origin, pixels=pixels), kind)
            write(folder / "model.onnx", *support.exported(ExportConfig(**config), origin, pixels=pixels, table=table))
            build_engine(folder / "model.onnx", folder / "model.engine")
            made[key] = folder / "model.engine"
        return made[key]

    return build


@pytest.fixture(scope="session")
def bundle(bundle_of):
    """A pixel model of the published kind: DDPM, 20 steps, guided."""
    return bundle_of()
