"""Our engine as the transformer of a diffusers pipeline. The one module of the engines that needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tqdit.engines.run.denoiser import Denoiser
from tqdit.errors import UsageError
from tqdit.extras import need

need("torch", "diffusers", "DiffusersTransformer")
diffusers: Any = need("diffusers", "diffusers", "DiffusersTransformer")

import torch  # noqa: E402  (after its absence has been answered)
from torch import Tensor  # noqa: E402


class Prediction(NamedTuple):
    """What diffusers reads from a transformer."""

    sample: Tensor  # (B, K, H, W): the noise, then the learned variance, if there is one


class DiffusersTransformer(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]  # it ships no types
    """An engine where diffusers expects a `DiTTransformer2DModel`.

        pipeline = DiTPipeline.from_pretrained(folder, transformer=DiffusersTransformer.open("model.engine"))
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        pictures = pipeline([207, 360], num_inference_steps=25).images

    It has no parameters. `.to(device, dtype)` changes what it takes and gives, as a pipeline expects; the engine
    computes in its own types on its own device.
    """

    config_name = "config.json"

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        signature = denoiser.card.signature
        shape, label = signature.state.row_shape, signature.label
        if len(shape) != 3 or shape[1] != shape[2] or label is None:
            raise UsageError(
                f"{signature.family} has states of shape {shape} and takes {', '.join(signature.names)}; diffusers' "
                "DiT pipeline takes square states (C, H, H) and a class."
            )
        self.register_to_config(
            sample_size=shape[1],
            in_channels=shape[0],
            out_channels=signature.output_shape[0],
            num_embeds_ada_norm=label.choices,
        )
        self._names = signature.state.name, signature.time.name, label.name
        self._whole_steps = signature.time.dtype == "int64"
        self._denoiser = denoiser
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # has the dtype and device of .to(...)

    @classmethod
    def open(cls, path: str | Path, *, threads: int | None = None) -> DiffusersTransformer:
        """Open a bundle; arguments and errors as for `Denoiser.open`."""
        return cls(Denoiser.open(path, threads=threads))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Prediction | tuple[Tensor]:
        """hidden_states (B, C, H, W), timestep () or (B,), class_labels (B,) -> sample (B, K, H, W), same dtype.

        Raises UsageError for other shapes, and for fractional timesteps if the graph takes whole ones.
        """
        if timestep is None or class_labels is None:
            raise UsageError("a DiT engine needs both timestep and class_labels.")
        if cross_attention_kwargs:
            raise UsageError(f"cross_attention_kwargs {sorted(cross_attention_kwargs)}: an engine's graph is fixed.")
        if class_labels.is_floating_point() or class_labels.ndim != 1:
            raise UsageError(
                f"class_labels are {class_labels.dtype} of shape {tuple(class_labels.shape)}; expected integers (B,)."
            )
        x = hidden_states.detach().to("cpu", torch.float32).numpy()
        steps = self._timesteps(timestep)
        values = x, steps if steps.ndim else np.broadcast_to(steps, len(x)), class_labels.detach().cpu().numpy()
        noise_pred = self._denoiser(**dict(zip(self._names, values, strict=True)))
        # a copy, since an engine may reuse its output
        sample = torch.from_numpy(noise_pred).to(hidden_states.device, hidden_states.dtype, copy=True)
        return Prediction(sample) if return_dict else (sample,)

    def _timesteps(self, timestep: Tensor | float) -> np.ndarray[Any, np.dtype[Any]]:
        """Schedulers count in floats, some of them between the timesteps that the network was trained on."""
        values = torch.as_tensor(timestep).detach().to("cpu", torch.float64).numpy()
        if not self._whole_steps:
            return values
        if not np.array_equal(values, np.round(values)):
            raise UsageError(
                f"timestep {values.ravel()[0]:g} is not a whole number; the engine's graph takes 0..999. Choose a "
                "scheduler with whole timesteps (timestep_spacing='leading', no Karras sigmas)."
            )
        return values.astype(np.int64)

    def close(self) -> None:
        """Free the engine."""
        self._denoiser.close()

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """An engine belongs to one machine and library; pipelines are saved with the model that it was made of."""
        raise UsageError("an engine is not saved with a pipeline. Keep its bundle and open it again.")

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """Not for engines: see `open`."""
        raise UsageError("an engine has no diffusers checkpoint. Use DiffusersTransformer.open('model.engine').")
