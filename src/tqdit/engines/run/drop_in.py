"""Our engine as the transformer of a diffusers pipeline. The one module of the engines that needs torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tqdit.engines.gpu import GpuChoice
from tqdit.engines.run.denoiser import Denoiser
from tqdit.errors import UsageError, first_line
from tqdit.extras import need

need("torch", "diffusers", "DropIn")
diffusers: Any = need("diffusers", "diffusers", "DropIn")

import torch  # noqa: E402  (after its absence has been answered)
from torch import Tensor  # noqa: E402

from tqdit.models.arguments import digest, flatten  # noqa: E402
from tqdit.ports import Port, check_values  # noqa: E402
from tqdit.sampling.followed import Clock, Followed  # noqa: E402
from tqdit.sampling.process import TRAINING_STEPS, Process, Recorded  # noqa: E402

STATE = "hidden_states"  # what diffusers calls it, whatever the network does
NOTHING = {"null", "{}", "[]"}  # digests of arguments that a call may leave out
TYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


class Prediction(NamedTuple):
    """What diffusers reads from a transformer."""

    sample: Tensor


def gpu_of(tensor: Tensor) -> int | None:
    """The index of the GPU where a tensor lies, in CUDA's order; None elsewhere."""
    return tensor.get_device() if tensor.is_cuda else None


def stream_of(tensor: Tensor) -> Any:
    """The stream on which torch works with a tensor of a GPU."""
    return torch.cuda.current_stream(tensor.device)


def clocks_of(process: Process, scheduler: Any) -> list[Clock]:
    """(a, b) of the timesteps a t + b that a pipeline may tell its network at the scheduler's timestep t.

    Of a recorded pipeline it is known; others are told t, its part of all, or what is left of all.
    """
    if isinstance(process, Recorded):
        return [(process.time_scale, process.time_shift)]
    steps = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or TRAINING_STEPS
    return [(1.0, 0.0), (1 / steps, 0.0), (-1 / steps, 1.0)]


def precision_of(state: Tensor, time: Any) -> float:
    """The relative error that a pipeline's timestep may have: some round timesteps to the type of their latents."""
    found = [each.dtype for each in (state, time) if isinstance(each, Tensor) and each.is_floating_point()]
    return max((float(torch.finfo(dtype).eps) for dtype in found), default=0.0)


def _is_list(port: Port, given: dict[str, Any]) -> bool:
    return port.listed and isinstance(given.get(port.name), list)


class DropIn(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]  # it ships no types
    """An engine where a diffusers pipeline expects its transformer, of any class.

        pipeline.transformer = tqdit.DropIn.open("model.engine")
        pictures = pipeline("a red square", num_inference_steps=28).images

    It takes the arguments that the network took: those of its ports with any number of rows, all others as they were
    when the network was exported. It has no parameters; `.to(device, dtype)` changes what it takes and gives, as a
    pipeline expects, and the engine computes in its own types on its own device. Engines of TensorRT and TensorRT-RTX
    take and give tensors on their own GPU without a copy on the host; all else passes through the host.

    With `forecast` it forecasts some of the calls of a pipeline's chain, one pipeline at a time.
    """

    config_name = "config.json"

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        card = denoiser.card
        if not card.config:
            raise UsageError(f"{card.signature.family} has no settings that a diffusers pipeline reads. Use Denoiser.")
        self.register_to_config(**card.config)
        for name, value in card.config.items():  # pipelines read some from the network itself
            if name not in vars(self) and not hasattr(type(self), name):
                setattr(self, name, value)
        self._ports = card.signature.ports
        self._state = card.signature.state.name
        self._time = card.signature.time.name
        self._constants, self._alike = card.constants, card.alike
        self._known: dict[str, Tensor] = {}  # tensors that were found to be a constant, where they lie
        self._family = card.signature.family
        self._denoiser = denoiser
        self._followed: Followed | None = None  # None: every call is full
        self.register_buffer("_anchor", torch.empty(0), persistent=False)  # has the dtype and device of .to(...)

    @classmethod
    def open(cls, path: str | Path, *, threads: int | None = None, device: GpuChoice = None) -> DropIn:
        """Open a bundle; arguments and errors as for `Denoiser.open`."""
        return cls(Denoiser.open(path, threads=threads, device=device))

    def forecast(self, scheduler: Any, full_calls: int | Sequence[int] | None) -> None:
        """From now on, forecast calls in the chains of a pipeline with this scheduler (docs/runtime.md, "Forecasts").

            pipeline.transformer.forecast(pipeline.scheduler, full_calls=14)

        full_calls: how many calls of a chain are full, or the steps of those, as for `Sampler.sample`; None, or no
        steps: all are. How long a chain is and where it begins is read from the scheduler's `timesteps`. A pipeline may
        call the network up to 4 times in a step, with as many rows and as often in each step of a chain. All calls
        then pass through the host, on a GPU, too. Not for several pipelines, or threads, at a time.

        Raises UsageError for an engine that was exported without forecasts, and for other arguments. A call of the
        network raises it for a chain that has no such full calls, a scheduler that visits a timestep twice, and a
        timestep that is not the next one of the chain.
        """
        self._followed = None
        if full_calls is None or (isinstance(full_calls, Sized) and not len(full_calls)):
            return
        if not self._denoiser.forecasts:
            raise UsageError(
                f"{self._family}: this engine computes every call in full. Leave forecasts out, or take an engine that "
                "was exported with forecasts."
            )
        if not hasattr(scheduler, "timesteps"):
            raise UsageError(
                f"found a {type(scheduler).__name__}, expected a scheduler with timesteps. Pass pipeline.scheduler."
            )
        self._followed = Followed(scheduler, full_calls, clocks_of(self._denoiser.card.sampling.process, scheduler))

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Prediction | tuple[Tensor]:
        """The network's own arguments, in its order or by name -> its prediction, in the dtype of its first input.

        Raises UsageError, naming the argument, for one that is missing, that the engine does not know, or that is not
        what it was when the network was exported; for other shapes, and for fractional timesteps if the network takes
        whole ones.
        """
        names = [port.name for port in self._ports]
        if len(args) > len(names):
            raise UsageError(f"{self._family}: {len(args)} arguments without a name, expected at most {len(names)}.")
        given = dict(zip(names, args, strict=False)) | kwargs
        given |= {port.name: torch.stack(given[port.name]) for port in self._ports if _is_list(port, given)}
        if STATE in given and STATE not in names:
            given[self._state] = given.pop(STATE)
        state = given.get(self._state)
        if not isinstance(state, Tensor):
            raise UsageError(f"{self._family}: '{self._state}' is missing. Pass what the network takes.")
        tensors, others = flatten(given)
        gpu = gpu_of(state)
        stays = gpu is not None and gpu == self._denoiser.gpu and self._followed is None
        where = state.device if stays else torch.device("cpu")
        inputs = {port.name: self._rows(port, tensors.pop(port.name, others.pop(port.name, None)), len(state), where)
                  for port in self._ports}  # fmt: skip
        self._check_constants({**tensors, **others})
        if stays:
            sample = self._on_gpu(inputs, len(state)).to(state.dtype)
        else:  # a copy, since an engine may reuse its output
            arrays = {name: value.numpy() for name, value in inputs.items()}
            if self._followed is None:
                prediction = self._denoiser(arrays)
            else:
                prediction = self._next(self._followed, arrays, precision_of(state, given.get(self._time)))
            sample = torch.from_numpy(prediction).to(state.device, state.dtype, copy=True)
        return Prediction(sample) if return_dict else (sample,)

    def _next(self, followed: Followed, inputs: dict[str, Any], precision: float) -> Any:
        """The prediction float32 (rows, K, ...) of the next call of a chain. precision: of its timestep, relative."""
        told = inputs[self._time]
        if not len(told):
            return self._denoiser(inputs)  # which refuses it
        if (told != told[0]).any():
            raise UsageError(f"'{self._time}' differs from row to row; forecasts need one timestep for all rows.")
        return followed(self._denoiser, inputs, float(told[0]), precision)

    def _on_gpu(self, inputs: dict[str, Tensor], rows: int) -> Tensor:
        """The prediction float32 (rows, K, ...), in order with torch's stream; at most `most_rows` in a call."""
        denoiser, signature = self._denoiser, self._denoiser.card.signature
        for port in self._ports:
            if port.kind == "time" or port.values is not None:  # a few numbers, which a wrong caller gets wrong
                found = check_values(port.name, port, inputs[port.name].cpu().numpy())
                if port.kind == "time":
                    denoiser.check_time(found)
        first = inputs[self._state]
        sample = torch.empty((rows, *signature.output_shape), dtype=torch.float32, device=first.device)
        most, stream = denoiser.most_rows or rows, stream_of(first)
        for start in range(0, rows, most):
            part = slice(start, start + most)
            denoiser.run_on_device({name: value[part] for name, value in inputs.items()}, stream, sample[part])
        return sample

    def _rows(self, port: Port, value: Any, rows: int, where: torch.device) -> Tensor:
        """One input of the engine, contiguous; a timestep may be one for all rows."""
        if value is None:
            raise UsageError(f"{self._family}: '{port.name}' is missing. The engine needs it in every call.")
        try:
            tensor = torch.as_tensor(value).detach().to(where)
            if tensor.layout != torch.strided:
                raise TypeError(f"its layout is {tensor.layout}")
        except (TypeError, ValueError, RuntimeError) as error:  # no array, or a tensor without values
            raise UsageError(f"{self._family}: '{port.name}' is no dense tensor ({first_line(error)}).") from error
        found = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_complex():
            raise UsageError(f"{self._family}: '{port.name}' holds complex numbers, expected {port.dtype}.")
        if port.kind == "time" and tensor.numel() == 1:
            tensor = tensor.reshape(-1).expand(rows)
        if port.dtype == "float32" and port.kind != "time" and not tensor.is_floating_point():
            raise UsageError(f"{self._family}: '{port.name}' holds {found} numbers, expected {port.dtype}.")
        if port.dtype == "int64" and tensor.is_floating_point():
            if port.kind != "time":
                raise UsageError(f"'{port.name}' holds {found} numbers, expected whole ones.")
            if not torch.equal(tensor, tensor.round()):
                raise UsageError(
                    f"{port.name} {float(tensor.ravel()[0]):g} is not a whole number, which the engine's graph takes. "
                    "Choose a scheduler with whole timesteps (timestep_spacing='leading', no Karras sigmas)."
                )
        return tensor.to(TYPES[port.dtype]).contiguous()

    def _check_constants(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if name not in self._constants:
                raise UsageError(f"{self._family}: the engine does not know the argument '{name}'. Leave it out.")
            if self._is_known(name, value):
                continue
            values = value if name in self._alike else [value]
            if any(digest(each) != self._constants[name] for each in values):
                raise UsageError(
                    f"{self._family}: '{name}' is not what it was when the network was exported; an engine has one "
                    "resolution and one set of options. Export for this one."
                )
            if isinstance(value, Tensor):
                self._known[name] = value.clone()
        missing = sorted(name for name in set(self._constants) - set(given) if self._constants[name] not in NOTHING)
        if missing:
            raise UsageError(f"{self._family}: '{missing[0]}' is missing. The network was exported with it.")

    def _is_known(self, name: str, value: Any) -> bool:
        """Whether it is what an earlier call gave; compared on its own device, while a digest needs the host."""
        known = self._known.get(name)
        return (known is not None and isinstance(value, Tensor) and known.device == value.device
                and known.dtype == value.dtype and torch.equal(known, value))  # fmt: skip

    @contextlib.contextmanager
    def cache_context(self, *_: Any, **__: Any) -> Iterator[None]:
        """Pipelines name their calls for caches around blocks, which an engine has none of."""
        yield

    def close(self) -> None:
        """Free the engine."""
        self._denoiser.close()

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """An engine belongs to one machine and library; pipelines are saved with the model that it was made of."""
        raise UsageError("an engine is not saved with a pipeline. Keep its bundle and open it again.")

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """Not for engines: see `open`."""
        raise UsageError("an engine has no diffusers checkpoint. Use DropIn.open('model.engine').")
