"""The training of the demo model: where it starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

import support
from tqdit.models.dit import DiT

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo.py"


def test_a_freshly_initialized_model_computes_zero(network: DiT) -> None:
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x, timestep, label = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1])
    assert not module.initialize(DiT(support.TINY))(x, timestep, label).any()
    assert network(x, timestep, label).all()
