"""What a network costs: of each of its products, observed once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support import tiny_model
from tqdit.calibration import cost
from tqdit.calibration.cost import ProductCost, product_costs
from tqdit.models.columns import narrow


def test_a_network_is_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, narrowed = tiny_model(), narrow(tiny_model(), 16)
    costs = product_costs(model)
    assert costs["blocks.0.mlp.fc1"] == ProductCost(16 * 16 * 64, (16 * 16,))  # 16 tokens of width 16
    assert product_costs(narrowed)["blocks.0.mlp.fc2.columns.1"] == ProductCost(16 * 16 * 16, (16 * 16,))
    first = replace(model, products=model.products[:1])
    assert [*product_costs(first)] == [model.products[0].name]
    assert product_costs(model) == costs
    costs.clear()  # the caller's own
    monkeypatch.setattr(cost, "_observe", None)
    assert len(product_costs(model)) == len(model.products)
    with pytest.raises(TypeError):
        product_costs(tiny_model())
