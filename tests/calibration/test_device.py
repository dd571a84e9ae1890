"""Calibration on a GPU: refused where there is none, and the same arithmetic where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import tiny_model
from tqdit.calibration.config import PRESETS
from tqdit.calibration.device import choose_device, exact_arithmetic
from tqdit.calibration.flow import calibrate
from tqdit.calibration.work import versions
from tqdit.errors import UsageError
from tqdit.quantization.fake_quant import apply

SMALL = {"steps": 12, "groups": 3, "rows_per_group": 4, "chains": 2, "candidates": 20}


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that need a CUDA GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=r"--device cuda: PyTorch .* sees no CUDA GPU here"):
        choose_device("cuda")


def test_a_gpu_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_results_of_two_kinds_of_device_are_not_mixed() -> None:
    assert versions(torch.device("cuda")) != versions(torch.device("cpu")) == versions()


def test_settings_of_pytorch_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    with exact_arithmetic(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" in os.environ
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()) == before


@gpu
@pytest.mark.parametrize("preset", ["tq-dit", "paper", "static"])
def test_a_gpu_finds_the_scales_of_the_cpu_and_the_same_bytes_in_each_run(tmp_path: Path, preset: str) -> None:
    config = replace(PRESETS[preset], **SMALL)
    on_cpu = calibrate(tiny_model(), config, tmp_path / "cpu").table
    model = tiny_model().to("cuda")
    first, second = (calibrate(model, config, tmp_path / name).table for name in ("a", "b"))
    assert first.to_bytes() == second.to_bytes()
    # Searches are discrete: a rounding difference may tip one to the neighbouring candidate, and few may do so.
    same = [
        np.allclose(a.quantizer.scale, b.quantizer.scale, rtol=1e-4)
        for a, b in zip(on_cpu.sites, first.sites, strict=True)
        if hasattr(a.quantizer, "scale")
    ]
    assert np.mean(same) > 0.8
    for name, error in on_cpu.errors.items():
        assert first.errors[name] == pytest.approx(error, rel=0.1, abs=1e-9)


@gpu
def test_the_fake_quantized_model_computes_on_a_gpu_what_it_computes_on_a_cpu(tmp_path: Path) -> None:
    model = tiny_model()
    table = calibrate(model, replace(PRESETS["static"], **SMALL), tmp_path).table
    inputs = {
        "x": torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.arange(6) * 180,
        "class_labels": torch.arange(6),
    }
    with torch.no_grad():
        expected = apply(model, table).call(inputs)
        on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
        moved = apply(model.to("cuda"), table).call(on_gpu).cpu()
    # sums in another order flip a code here and there, which is worth a step of one activation
    assert float((moved - expected).square().sum() / expected.square().sum()) < 1e-4
