"""Registration with NVIDIA's own plugin module, as far as a machine without a GPU goes.

The bindings wheel holds the Python half of the plugin machinery; TensorRT's libraries, which it loads, are replaced by
empty ones that gcc makes. `tensorrt_contract.py` then plays TensorRT's part. What only TensorRT and a GPU can show is
listed in docs/kernels.md.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import ALL
from tqdit.plugins import aot, tensorrt
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention

pytestmark = pytest.mark.slow
TACTICS = None if ALL else 2  # of each kernel of attention

ATTENTIONS = ("MultiRegionAttention", "MultiRegionNumeratorAttention")
INTEGER_ATTENTIONS = ("MultiRegionIntegerAttention", "MultiRegionNumeratorIntegerAttention")
INTEGER_CASES = tuple(f"{name}{label}" for name in INTEGER_ATTENTIONS for label in ("", " half"))

# What the bindings need of TensorRT's libraries to be loaded; none of it is called.
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = [f"lib{name}.so.{major}" for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser") for major in (10, 11)]


@pytest.fixture(scope="module")
def contract(tmp_path_factory):
    """What the real plugin module got out of our plugins."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs NVIDIA's bindings: pip install tensorrt-cu13-bindings")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, for empty libraries in the place of TensorRT's")
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for library in LIBRARIES:
        command = ["gcc", "-shared", "-fPIC", "stub.c", f"-Wl,-soname,{library}", "-o", library]
        subprocess.run(command, cwd=folder, check=True)
    program = Path(__file__).parent / "tensorrt_contract.py"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    count = [] if TACTICS is None else [str(TACTICS)]
    done = subprocess.run(
        [sys.executable, program, *count], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_plugins_register_under_their_names(contract):
    assert {name.partition(" ")[0] for name in contract} == set(tensorrt.NAMES)


def test_every_attribute_is_passed_in_order(contract):
    assert contract["TimeGroupSelect"]["attributes"] == []
    for name in ("MultiRegionSoftmax", "MultiRegionNumerator"):
        assert contract[name]["attributes"] == ["bits", "high_scale"]
    for name in ATTENTIONS:
        assert contract[name]["attributes"] == ["bits", "high_scale", "scale"]
    for name in INTEGER_CASES:
        assert contract[name]["attributes"] == ["bits", "high_scale", "out_type"]


def test_attributes_are_arrays(contract):
    """TensorRT 10.x makes an int or a float of an array by itself, which NumPy 2.4 refuses."""
    for name, result in contract.items():
        assert len(result["annotations"]) == len(result["attributes"]), name
        assert all("ndarray" in annotation for annotation in result["annotations"]), name


def test_kernels_that_differ_have_names_that_differ(contract):
    """TensorRT runs whichever PTX of a name came last: for all tactics, and perhaps for all layers."""
    entries = [(kernel["entry"], kernel["ptx"]) for result in contract.values() for kernel in result["kernels"]]
    assert len({entry for entry, _ in entries}) == len({ptx for _, ptx in entries}) == len(set(entries))
    assert len(entries) > 6
    for entry, ptx in entries:
        assert f".entry {entry}(" in ptx


def test_layers_of_different_scales_share_their_kernels(contract):
    for name in ATTENTIONS:
        one, other = contract[name]["kernels"], contract[name]["of_another_scale"]
        assert [each["ptx"] for each in one] == [each["ptx"] for each in other]
        assert [each["scalars"][:3] for each in one] == [each["scalars"][:3] for each in other]
        bits = [each["scalars"][3] for each in (one[0], other[0])]
        assert np.array(bits, np.int32).view(np.float32).tolist() == np.float32([0.01, 0.02]).tolist()


def test_shapes_and_types(contract):
    """Of timestep (70,), boundaries (9,), table (10, 1, 1, 3); scores (3, 2, 50, 50); q, k, v (3, 2, 200, 72)."""
    assert contract["TimeGroupSelect"]["out_shapes"] == [[70, 1, 1, 3]]
    assert contract["MultiRegionSoftmax"]["out_shapes"] == [[3, 2, 50, 50]]
    assert contract["MultiRegionNumerator"]["out_shapes"] == [[3, 2, 50, 50], [3, 2, 50, 1]]
    for name in (*ATTENTIONS, *INTEGER_ATTENTIONS):
        assert contract[name]["out_shapes"] == [[3, 2, 200, 72]]
    kinds = {name: result["out_types"] for name, result in contract.items()}
    assert kinds["TimeGroupSelect"] == ["DataType.FLOAT"]
    assert kinds["TimeGroupSelect real"] == ["DataType.HALF"]  # of float timesteps
    for name in ("MultiRegionSoftmax", *ATTENTIONS):
        assert kinds[name] == ["DataType.HALF"]
    assert kinds["MultiRegionNumerator"] == ["DataType.HALF", "DataType.FLOAT"]
    for name in INTEGER_ATTENTIONS:
        assert kinds[name] == ["DataType.INT8"]
        assert kinds[f"{name} half"] == ["DataType.HALF"]
    # float, float16, bfloat16, each with two types of timesteps; those of integer attention are its attribute's
    assert {name: result["combinations"] for name, result in contract.items()} == {
        name: 1 if name in INTEGER_CASES else 6 if name.startswith("TimeGroupSelect") else 3 for name in contract
    }


def test_launches_take_the_symbolic_batch(contract):
    (real,) = contract["TimeGroupSelect real"]["kernels"]
    assert re.search(r"setp\.\w+\.f32", real["ptx"])  # timesteps are compared as they are
    (select,) = contract["TimeGroupSelect"]["kernels"]
    assert (select["launch"]["grid_x"], select["scalars"]) == (2, [210, 3])  # 210 elements, 128 a program
    for name in ("MultiRegionSoftmax", "MultiRegionNumerator"):
        (softmax,) = contract[name]["kernels"]
        assert (softmax["launch"]["grid_x"], softmax["scalars"]) == (19, [300, 100, 3])  # 300 rows, 16 a program
    candidates = attention.candidates("fp16", 72, 200)[:TACTICS]
    for name in ATTENTIONS:
        launches = [kernel["launch"] for kernel in contract[name]["kernels"]]
        assert [launch["grid_x"] for launch in launches] == [6 * -(-200 // each.queries) for each in candidates]
        assert [launch["block_x"] for launch in launches] == [32 * each.warps for each in candidates]
        assert {tuple(kernel["scalars"]) for kernel in contract[name]["kernels"]} == {
            (2, 3, 3, int(np.float32(0.01).view(np.int32)))
        }
    candidates = integer_attention.candidates(72, 200)[:TACTICS]
    for name in INTEGER_ATTENTIONS:
        launches = [kernel["launch"] for kernel in contract[name]["kernels"]]
        assert [launch["grid_x"] for launch in launches] == [6 * -(-200 // each.queries) for each in candidates]
        assert [launch["block_x"] for launch in launches] == [32 * each.warps for each in candidates]
        # heads, and images of the mask, the scales, low scales, result's scales and shifts
        assert {tuple(kernel["scalars"]) for kernel in contract[name]["kernels"]} == {(2, 3, 3, 1, 3, 3)}


def test_entries_take_what_tensorrt_passes(contract):
    """Inputs, integers, outputs, and nothing else."""
    inputs = {"TimeGroupSelect": 3, "TimeGroupSelect real": 3, "MultiRegionSoftmax": 2, "MultiRegionNumerator": 2,
              **dict.fromkeys(ATTENTIONS, 5), **dict.fromkeys(INTEGER_CASES, 8)}  # fmt: skip
    for name, result in contract.items():
        for kernel in result["kernels"]:
            assert kernel["parameters"] == inputs[name] + len(kernel["scalars"]) + len(result["out_types"])
            assert kernel["launch"]["grid_y"] == kernel["launch"]["block_z"] == 1


def test_without_tensorrt_nothing_is_registered_and_a_reason_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert tensorrt.register_plugins() == ()
    pytest.importorskip(
        "triton", reason="Triton has wheels for Linux on x86-64 and Arm only"
    )  # the first thing that is looked for
    assert "TensorRT cannot be imported" in tensorrt.why_unavailable()


def test_a_tensorrt_without_plugins_is_named(monkeypatch):
    class Flavour:
        __version__ = "1.7"

    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")
    monkeypatch.setitem(sys.modules, "tensorrt", Flavour())
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    assert tensorrt.why_unavailable() == "TensorRT 1.7 has no Python plugins (TensorRT-RTX has none at all)"
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", object())
    assert tensorrt.why_unavailable() == "TensorRT 1.7 has no ahead-of-time plugins"


@pytest.mark.parametrize(
    ("device", "target"),
    [
        (None, (8, 0)),
        ((7, 5), (8, 0)),
        ((8, 0), (8, 0)),
        ((8, 7), (8, 6)),
        ((8, 9), (8, 9)),
        ((9, 0), (9, 0)),
        ((10, 0), (8, 9)),
        ((10, 3), (8, 9)),
        ((11, 0), (8, 9)),
        ((12, 0), (12, 0)),
        ((12, 1), (12, 0)),
    ],
)
def test_a_device_gets_ptx_that_runs_on_it(device, target):
    """PTX of 9.0 runs on that chip alone, all other on every later one."""
    assert aot.best_capability(device) == target
