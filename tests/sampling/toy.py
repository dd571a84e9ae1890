"""A network with blocks that takes no time, and chains of it."""

import numpy as np

from tqdit.ports import Port, Signature
from tqdit.sampling.chains import Chains
from tqdit.sampling.forecasts import RESIDUAL
from tqdit.sampling.guidance import Guidance

SHAPE = (2, 3, 3)
SIGNATURE = Signature(
    ports=(
        Port("x", "state", "float32", (None, *SHAPE)),
        Port("t", "time", "int64", (None,)),
        Port("label", "request", "int64", (None,), null=4, values=5),
    ),
    output=(None, *SHAPE),
    family="Toy",
)
GUIDANCE = Guidance(1.5)


class Toy:
    """A network with blocks: the tokens are three times the state, and the final layer is a tanh. It counts calls."""

    def __init__(self):
        self.rows = {"plain": [], "full": [], "forecast": []}

    def blocks(self, inputs):
        t, label = (inputs[name].reshape(-1, 1, 1, 1) for name in ("t", "label"))
        return (np.sin(inputs["x"] + t / 300) * (1 + 0.2 * label)).astype(np.float32)

    def final(self, inputs, residual):
        return np.tanh(3 * inputs["x"] + residual).astype(np.float32)

    def __call__(self, inputs):
        self.rows["plain"].append(len(inputs["x"]))
        return self.final(inputs, self.blocks(inputs))

    def full(self, inputs):
        self.rows["full"].append(len(inputs["x"]))
        residual = self.blocks(inputs)
        return self.final(inputs, residual), residual

    def forecast(self, inputs):
        self.rows["forecast"].append(len(inputs["x"]))
        return self.final(inputs, inputs[RESIDUAL])


def start(specs, scale=2.0):
    batch = Chains(SIGNATURE, GUIDANCE, len(specs))
    for number, spec in enumerate(specs):
        batch.add(spec.schedule, {"label": number % 4}, scale, 5, number)
    return batch
