"""Registration with NVIDIA's own plugin module, as far as a machine without a GPU goes.

The bindings wheel holds the Python half of the plugin machinery; TensorRT's libraries, which it loads, are replaced by
empty ones that gcc makes. `tensorrt_contract.py` then plays TensorRT's part. What only TensorRT and a GPU can show is
listed in docs/kernels.md.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tqdit.plugins import aot, tensorrt
from tqdit.plugins.multi_region_attention import plan as attention

pytestmark = pytest.mark.slow

ATTENTIONS = ("MultiRegionAttention", "MultiRegionNumeratorAttention")

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
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_plugins_register_under_their_names(contract):
    assert sorted(contract) == sorted(tensorrt.NAMES)


def test_every_attribute_is_passed_in_order(contract):
    assert contract["TimeGroupSelect"]["attributes"] == []
    for name in ("MultiRegionSoftmax", "MultiRegionNumerator"):
        assert contract[name]["attributes"] == ["bits", "high_step"]
    for name in ATTENTIONS:
        assert contract[name]["attributes"] == ["bits", "high_step", "scale"]


def test_shapes_and_types(contract):
    """Of timestep (70,), boundaries (9,), table (10, 1, 1, 3); scores (3, 2, 50, 50); q, k, v (3, 2, 200, 72)."""
    assert contract["TimeGroupSelect"]["out_shapes"] == [[70, 1, 1, 3]]
    assert contract["MultiRegionSoftmax"]["out_shapes"] == [[3, 2, 50, 50]]
    assert contract["MultiRegionNumerator"]["out_shapes"] == [[3, 2, 50, 50], [3, 2, 50, 1]]
    for name in ATTENTIONS:
        assert contract[name]["out_shapes"] == [[3, 2, 200, 72]]
    kinds = {name: result["out_types"] for name, result in contract.items()}
    assert kinds["TimeGroupSelect"] == ["DataType.FLOAT"]
    for name in ("MultiRegionSoftmax", *ATTENTIONS):
        assert kinds[name] == ["DataType.HALF"]
    assert kinds["MultiRegionNumerator"] == ["DataType.HALF", "DataType.FLOAT"]
    assert {result["combinations"] for result in contract.values()} == {3}  # float, float16, bfloat16


def test_launches_take_the_symbolic_batch(contract):
    (select,) = contract["TimeGroupSelect"]["kernels"]
    assert (select["launch"]["grid_x"], select["scalars"]) == (2, [210, 3])  # 210 elements, 128 a program
    for name in ("MultiRegionSoftmax", "MultiRegionNumerator"):
        (softmax,) = contract[name]["kernels"]
        assert (softmax["launch"]["grid_x"], softmax["scalars"]) == (19, [300, 100, 3])  # 300 rows, 16 a program
    candidates = attention.candidates("fp16", 72, 200)
    for name in ATTENTIONS:
        launches = [kernel["launch"] for kernel in contract[name]["kernels"]]
        assert [launch["grid_x"] for launch in launches] == [6 * -(-200 // each.queries) for each in candidates]
        assert [launch["block_x"] for launch in launches] == [32 * each.warps for each in candidates]
        assert {tuple(kernel["scalars"]) for kernel in contract[name]["kernels"]} == {(2, 3, 3)}


def test_entries_take_what_tensorrt_passes(contract):
    """Inputs, integers, outputs, and nothing else."""
    inputs = {"TimeGroupSelect": 3, "MultiRegionSoftmax": 2, "MultiRegionNumerator": 2, **dict.fromkeys(ATTENTIONS, 5)}
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
    ("device", "target"), [(None, (8, 0)), ((8, 7), (8, 0)), ((9, 0), (9, 0)), ((12, 0), (12, 0)), ((10, 0), (8, 0))]
)
def test_a_device_gets_ptx_that_runs_on_it(device, target):
    """Ptx of 9.0 and 12.0 runs on that chip alone, that of 8.0 on every later one."""
    assert aot.best_capability(device) == target
