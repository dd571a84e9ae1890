"""The GPU benchmark works, shown in Triton's interpreter: times there mean nothing and are not looked at."""

import importlib
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture
def row(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    return importlib.import_module("tensorrt_attention")


def test_the_attention_that_tensorrt_compiles_is_pytorchs(row):
    model = row.attention_model(2, 3, 17, 8, 0.2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 17, 8, generator=generator).half() for _ in range(3))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
    expected = torch.nn.functional.scaled_dot_product_attention(*(each.float() for each in (q, k, v)), scale=0.2)
    np.testing.assert_allclose(out.astype(np.float32), expected.numpy(), atol=4e-3)


def test_the_parser_takes_it(row):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for Linux on x86-64 only")
    _, network, _ = row.network_of(trt, row.attention_model(2, 3, 17, 8, 0.2))
    assert network.num_inputs == 3
    assert tuple(network.get_output(0).shape) == (2, 3, 17, 8)
    model = row.attention_model(2, 3, 17, 8, 0.2)
    model.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(RuntimeError, match="cannot parse the attention"):
        row.network_of(trt, model)


def test_without_tensorrt_there_is_no_row_and_a_reason(row, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = []
    assert row.tensorrt_attention(2, 3, 17, 8, 0.2, said.append) is None
    assert len(said) == 1
    assert said[0].startswith("no row for TensorRT's attention: ")


def test_layers_of_an_inspector_have_names(row):
    assert row.layer_names('{"Layers": [{"Name": "_gemm_mha_v2"}, "Reformat"]}') == ["_gemm_mha_v2", "Reformat"]


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
        "cuDNN, not rounded", "fused, int8 in", "fused, int8 in and out", "fused, int8 in and out, numerators",
    } | ({"TensorRT, not rounded"} if find_spec("tensorrt") else set())  # fmt: skip
    bytes_moved = {each["variant"]: each["bytes"] for each in facts["timings"]}
    assert bytes_moved["fused, int8 in and out"] * 2 == bytes_moved["fused"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--int8"]], ids=["float16", "int8"])
def test_the_sweep_times_every_block_shape(tmp_path, kind):
    command = [sys.executable, BENCHMARK, "--dry-run", "--sweep", "--tokens", "33", "--batches", "1", *kind, "--json"]
    subprocess.run([*command, tmp_path / "out.json"], check=True, capture_output=True)
    (first, *rest) = json.loads((tmp_path / "out.json").read_text())["sweep"]
    assert first.keys() == {"tokens", "batch", "flash_us", "us", "queries", "keys", "warps", "stages"}
    assert rest
