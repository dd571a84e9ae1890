"""How a network is called and sampled: what a recording learned of a pipeline and an export needs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.ports import Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.schedule import SamplingSpec


@dataclass(frozen=True, eq=False)
class Interface:
    """The ports of a network, the chain that it was recorded in, and arguments that are alike in every call.

    constants: by dotted name (`models.arguments`): arrays, or what JSON can hold. config: the network's settings, which
    pipelines read.
    """

    signature: Signature
    sampling: SamplingSpec
    guidance: Guidance | None
    constants: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def constant_arrays(self) -> dict[str, NDArray[Any]]:
        return {name: value for name, value in self.constants.items() if isinstance(value, np.ndarray)}

    @property
    def constant_values(self) -> dict[str, Any]:
        return {name: value for name, value in self.constants.items() if not isinstance(value, np.ndarray)}
