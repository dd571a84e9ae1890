"""A new backend is one folder: nothing else names the toy of tests/toys/backends."""

import numpy as np
import pytest

from tqdit.cli.main import main
from tqdit.engines.backends import backend_names
from tqdit.engines.build.backend import choose_backend
from tqdit.engines.build.engine import build_engine
from tqdit.engines.config import BuildConfig
from tqdit.engines.run.sampler import Sampler


@pytest.mark.slow
def test_a_backend_in_one_folder_builds_and_samples(quantized, tmp_path, plain_backend):
    build_engine(quantized, tmp_path / "toy.engine", "plain", BuildConfig(float_type="fp32"))
    build_engine(quantized, tmp_path / "usual.engine")
    with Sampler.open(tmp_path / "toy.engine") as toy, Sampler.open(tmp_path / "usual.engine") as usual:
        found, expected = toy.sample_latents([0, 1], seed=3), usual.sample_latents([0, 1], seed=3)
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.slow
def test_a_backend_in_one_folder_is_known_to_the_command_and_to_auto(quantized, tmp_path, plain_backend, capsys):
    assert backend_names() == ("onnxruntime", "openvino", "plain", "tensorrt", "tensorrt-rtx")
    assert "plain: a toy" in choose_backend()[1]
    output = tmp_path / "toy.engine"
    assert main(["build", str(quantized), "--backend", "plain", "-o", str(output)]) == 0
    assert main(["inspect", str(output)]) == 0
    assert "plain, int8" in capsys.readouterr().out
