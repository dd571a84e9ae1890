"""A bundle as a model of NVIDIA's Triton Inference Server, in its Python backend.

`tqdit-build --triton DIR` writes a repository whose model.py imports this class. The server's own module,
triton_python_backend_utils, is there only inside the server.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tqdit.engines.run.sampler import Sampler
from tqdit.errors import TqditError

ENGINE = "model.engine"  # beside model.py
COUNT, SEED, STEPS, GUIDANCE = "count", "seed", "steps", "guidance_scale"
IMAGES, LATENTS = "images", "latents"


class TritonPythonModel:
    """One instance of the model: it opens the engine once and answers one request after the other.

    Inputs are the model's request values, with a row for each image (`count` if it has none), and optionally a seed,
    the number of steps and the guidance scale. The output is `images` uint8 (N, H, W, 3), or `latents` float32 (N, ...)
    of an engine without a decoder. What a request lacks or has wrong is its own error, in one line.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """args: of the server: where the repository is, and the GPU of this instance."""
        self._utils: Any = importlib.import_module("triton_python_backend_utils")
        folder = Path(args["model_repository"]) / args["model_version"] / ENGINE
        gpu = args.get("model_instance_kind") == "GPU"
        self._sampler = Sampler.open(folder, device=int(args["model_instance_device_id"]) if gpu else None)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in their order."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """Free the engine."""
        self._sampler.close()

    def _answer(self, request: Any) -> Any:
        sampler, utils = self._sampler, self._utils
        try:
            ports = sampler.card.signature.request_values
            wanted: Any = {name: self._read(request, name) for name in ports}
            if not ports:
                wanted = int(self._read(request, COUNT).item())
            seed, steps, guidance = (self._number(request, name) for name in (SEED, STEPS, GUIDANCE))
            chosen: dict[str, Any] = {"steps": None if steps is None else int(steps), "guidance_scale": guidance}
            chosen["seed"] = int(seed or 0)
            if sampler.makes_images:
                output = utils.Tensor(IMAGES, sampler.sample(wanted, **chosen))
            else:
                output = utils.Tensor(LATENTS, sampler.sample_latents(wanted, **chosen))
        except (TqditError, ValueError) as error:
            return utils.InferenceResponse(output_tensors=[], error=utils.TritonError(str(error)))
        return utils.InferenceResponse(output_tensors=[output])

    def _read(self, request: Any, name: str) -> Any:
        tensor = self._utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            raise ValueError(f"the input '{name}' is missing.")
        return tensor.as_numpy()

    def _number(self, request: Any, name: str) -> float | None:
        tensor = self._utils.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy().item()
