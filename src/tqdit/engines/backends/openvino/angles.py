"""The angles of the timestep in float32, whatever type the rest computes in."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from tqdit.card import GraphCard
from tqdit.errors import BackendError
from tqdit.sampling.process import Diffusion


def tabulate_angles(ov: ModuleType, model: Any, card: GraphCard) -> None:
    """Replace cos(t f) and sin(t f) by rows of a table, t int64 (N,) in 0..999, f float32 (1, F).

    In bfloat16 t itself would be rounded to eight bits, and an angle of 999 by up to two radians.
    Raises BackendError if an angle is computed in another way, or of a timestep that is not a whole number.
    """
    process, whole = card.sampling.process, card.signature.time.dtype == "int64"
    timesteps = np.arange(process.span[1] if whole and isinstance(process, Diffusion) else 0, dtype=np.float32)
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Cos", "Sin"):
            continue
        timestep, frequencies = _factors(node) if len(timesteps) else _refuse(node)
        angles = timesteps[:, None] * frequencies.reshape(1, -1)
        table = np.cos(angles) if node.get_type_name() == "Cos" else np.sin(angles)
        rows = ov.opset8.gather(ov.opset8.constant(table), timestep, ov.opset8.constant(np.int64(0)))
        rows.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(rows.output(0))


def _factors(node: Any) -> tuple[Any, Any]:
    """The timestep (N,) and the frequencies of one Cos or Sin."""
    product = _maker(node, 0)
    if product.get_type_name() == "Multiply" and _maker(product, 1).get_type_name() == "Constant":
        cast = _maker(product, 0)
        unsqueezed = _maker(cast, 0)
        if cast.get_type_name() == "Convert" and unsqueezed.get_type_name() == "Unsqueeze":
            return unsqueezed.input_value(0), _maker(product, 1).data
    return _refuse(node)


def _refuse(node: Any) -> NoReturn:
    raise BackendError(
        f"'{node.get_friendly_name()}' is not the {node.get_type_name().lower()} of a whole timestep times "
        "frequencies, so bfloat16 would ruin it. Pass --float-type fp32."
    )


def _maker(node: Any, index: int) -> Any:
    return node.input_value(index).get_node()
