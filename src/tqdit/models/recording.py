"""What a pipeline asks of its network: recorded calls, and the loop around them as facts that are checked.

    with tqdit.record(pipeline) as calls:
        pipeline("a red square", num_inference_steps=28)

A recording knows the network's ports, the arguments that never change, how the pipeline's scheduler steps, how it
guides, and the states of the chains that it ran: all that calibration, export and a loop without torch need. Each fact
is fitted by least squares and refused, with its residual, if it does not hold.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor, nn

from tqdit import safetensors_file
from tqdit.bounds import check_memory
from tqdit.card import Latents
from tqdit.errors import FileFormatError, OutputError, TqditWarning, UsageError, first_line
from tqdit.files import SAFETENSORS, reading, whole_file
from tqdit.interface import RECORDING_KEY, REQUEST, Interface, RecordingHeader, TextExamples
from tqdit.models.arguments import Constant, settings_of
from tqdit.models.calls import DROP_IN_ONLY, Call, Roles, check_alike, find_time, join, listen, parameters_of
from tqdit.models.decoding import learn_latents
from tqdit.models.known import values_read
from tqdit.models.loaded import arguments_of
from tqdit.models.scheduler import tabulate
from tqdit.ports import NEGATIVE, Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Recorded, Sign, Table, Unsampled
from tqdit.sampling.schedule import SamplingSpec

FORMAT_VERSION = 1
STATES = "states"
RECORDED = "_tqdit_recorded"  # marks methods that listen
MOST_PROMPTS = 4  # whose request values are kept to prove text encoders
PLAIN = (str, int, float, list, dict)  # kinds of settings that a file holds
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}  # of a fact's residual, relative
HALF_PRECISION_TOLERANCE = 2e-2
TIME_MAPS = ((1.0, 0.0), (1e-3, 0.0), (-1e-3, 1.0), (-1.0, 1000.0))  # scale and shift that pipelines use
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Recording:
    """Chains that a pipeline ran, all with one schedule; or calls of a network alone.

    states float32 (images, T, ...), indexed by the step (T-1 is the first). requests: as `Signature.request_values`,
    (images, ...). Of a network alone: T is 1, a row of a call counts as an image, and requests hold the timestep too.
    """

    interface: Interface
    states: NDArray[np.float32]
    requests: dict[str, Array]

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        facts = self.interface
        return f"Recording(requests={len(self)}, family={facts.signature.family!r}, sampling={str(facts.sampling)!r})"

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all, for `load`."""
        requests = {f"{REQUEST}{name}": array for name, array in self.requests.items()}
        arrays = {STATES: self.states, **requests, **self.interface.arrays}
        text = msgspec.json.encode(RecordingHeader(FORMAT_VERSION, self.interface.entry), order="sorted").decode()
        with whole_file(Path(path)) as temporary:
            try:
                save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, {RECORDING_KEY: text})
            except SafetensorError as error:  # a full disk, told in its own way
                raise OutputError(f"{path}: cannot be written ({first_line(error)}). Choose another place.") from error
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read what `save` wrote. Raises FileFormatError for any other file."""
        again = "Record the pipeline again."
        with reading(Path(path), SAFETENSORS, again, ValueError):
            metadata, tensors = safetensors_file.read(Path(path))
        if RECORDING_KEY not in metadata or STATES not in tensors:
            raise FileFormatError(
                f"{path}: not recorded calls (it has no '{RECORDING_KEY}' metadata). Pass what tqdit.record heard."
            )
        try:
            header = msgspec.json.decode(metadata[RECORDING_KEY], type=RecordingHeader)
        except (msgspec.MsgspecError, UsageError, RecursionError) as error:
            raise FileFormatError(f"{path}: damaged, or of another version ({error}). {again}") from error
        if header.format_version != FORMAT_VERSION:
            raise FileFormatError(f"{path}: format {header.format_version}, expected {FORMAT_VERSION}. {again}")
        requests = {name.removeprefix(REQUEST): array for name, array in tensors.items() if name.startswith(REQUEST)}
        found = cls(Interface.of(header.interface, tensors), tensors[STATES], requests)
        found.check(str(path))
        return found

    @property
    def _arrays(self) -> dict[str, Array]:
        return {STATES: self.states, **self.requests}

    def check(self, where: str) -> None:
        """Raises FileFormatError if the arrays do not fit the interface, or hold NaN."""
        signature = self.interface.signature
        self.interface.check(where)
        shapes = {name: port.row_shape for name, port in signature.request_values.items()}
        if isinstance(self.interface.sampling.process, Unsampled):
            shapes[signature.time.name] = signature.time.row_shape
        found = {name: array.shape[1:] for name, array in self.requests.items()}
        states = (self.interface.sampling.steps, *signature.state.row_shape)
        counts = {len(self.states), *(len(array) for array in self.requests.values())}
        if found != shapes or self.states.shape[1:] != states or len(counts) != 1 or not len(self.states):
            raise FileFormatError(f"{where}: its requests {found} and states do not fit its ports. Record again.")
        types = {STATES: "float32", **{name: port.dtype for name, port in signature.request_values.items()}}
        wrong = [(name, array) for name, array in self._arrays.items() if array.dtype != types.get(name, "float32")]
        if wrong:
            name, array = wrong[0]
            raise FileFormatError(
                f"{where}: '{name}' is {array.dtype}, expected {types.get(name, 'float32')}. Record again."
            )
        if not all(np.isfinite(array).all() for array in self._arrays.values()):
            raise FileFormatError(f"{where}: holds NaN or infinite values. Record again.")

    @cached_property
    def sha256(self) -> str:
        """Over states and requests."""
        digest = hashlib.sha256()
        for name, array in sorted({"": self.states, **self.requests}.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass
class _Run:
    """What one chain of B images showed, step by step."""

    scheduler: str
    table: Table
    training_steps: int
    images: int
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of every step: port -> (roles B, ...)
    changing: str | None = None  # a port for which that does not hold
    states: list[Tensor] = field(default_factory=list)  # x of each step, (B, ...)
    constants: dict[str, Constant] = field(default_factory=dict)
    weights: list[NDArray[np.float64]] = field(default_factory=list)  # of each role in the scheduler's input, (roles,)
    times: list[tuple[float, float]] = field(default_factory=list)  # the scheduler's and the network's
    roles: Roles | None = None
    channels: tuple[int, ...] = ()  # shape of a row of the prediction
    tolerance: float = TOLERANCES[torch.float32]
    end: Tensor | None = None  # x after the last step
    codes: list[Tensor] = field(default_factory=list)  # what the VAE's `decode` got, if it was called
    given: set[str] = field(default_factory=set)  # other tensors that it got
    prompts: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)  # of `encode_prompt`

    @property
    def is_whole(self) -> bool:
        return len(self.states) == len(self.table.timesteps)


class Recorder:
    """Listens to the calls of a pipeline's transformer and to its scheduler while it is entered."""

    def __init__(self, pipeline: Any) -> None:
        self.network: nn.Module = _part(pipeline, "transformer")
        self.scheduler = _part(pipeline, "scheduler")
        self.pipeline, self.vae = pipeline, getattr(pipeline, "vae", None)
        self._heard: tuple[tuple[str, ...], dict[str, Any]] | None = None  # prompts and settings of the next run
        self._runs: list[_Run] = []
        self._calls: list[Call] = []
        self._undo: list[Callable[[], None]] = []
        self._fresh = True

    def __enter__(self) -> Recorder:
        if hasattr(self.scheduler.step, RECORDED):
            raise UsageError(
                f"{type(self.pipeline).__name__} is being recorded already. Leave the other `record` first."
            )
        handle = listen(self.network, lambda call: self._calls.append(call))
        step, set_timesteps = self.scheduler.step, self.scheduler.set_timesteps

        @functools.wraps(step)  # pipelines look at its parameters
        def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._fresh:
                self._begin(sample)
            self._step(model_output.detach(), float(timestep), sample.detach())
            result = step(model_output, timestep, sample, *args, **kwargs)
            end: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
            self._runs[-1].end = end.detach()
            return result

        @functools.wraps(set_timesteps)
        def begin(*args: Any, **kwargs: Any) -> Any:
            self._fresh, self._calls = True, []
            return set_timesteps(*args, **kwargs)

        self._undo = [handle.remove, _replace(self.scheduler, "step", stepped)]
        self._undo.append(_replace(self.scheduler, "set_timesteps", begin))
        if self.vae is not None:
            decode = self.vae.decode

            @functools.wraps(decode)
            def decoded(codes: Tensor, *args: Any, **kwargs: Any) -> Any:
                if self._runs and self._runs[-1].is_whole:
                    self._runs[-1].codes.append(codes.detach().clone())
                    self._runs[-1].given |= {name for name, value in kwargs.items() if isinstance(value, Tensor)}
                    self._runs[-1].given |= {"an argument" for value in args if isinstance(value, Tensor)}
                return decode(codes, *args, **kwargs)

            self._undo.append(_replace(self.vae, "decode", decoded))
        if hasattr(self.pipeline, "encode_prompt"):
            encode = self.pipeline.encode_prompt

            @functools.wraps(encode)
            def encoded(*args: Any, **kwargs: Any) -> Any:
                self._heard = self._heard or _prompts(inspect.signature(encode).bind(*args, **kwargs).arguments)
                return encode(*args, **kwargs)

            self._undo.append(_replace(self.pipeline, "encode_prompt", encoded))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for undo in self._undo:
            undo()

    def _begin(self, sample: Tensor) -> None:
        self._fresh = False
        config = getattr(self.scheduler, "config", {})
        name, training_steps = type(self.scheduler).__name__, config.get("num_train_timesteps", 1000)
        (prompts, settings), self._heard = self._heard or ((), {}), None
        table = tabulate(self.scheduler)
        self._runs.append(_Run(name, table, training_steps, len(sample), prompts=prompts, settings=settings))

    def _step(self, model_output: Tensor, timestep: float, sample: Tensor) -> None:
        run, calls, self._calls = self._runs[-1], self._calls, []
        if not calls:
            raise UsageError(f"{run.scheduler} made a step without a call of the transformer; nothing is recorded.")
        types = (model_output.dtype, sample.dtype, *(call.output.dtype for call in calls))
        run.tolerance = max(TOLERANCES.get(dtype, HALF_PRECISION_TOLERANCE) for dtype in types)
        if not torch.isfinite(model_output).all() or not torch.isfinite(sample).all():
            raise UsageError(f"step {len(run.states) + 1} of the pipeline holds NaN or infinite values.")
        if run.end is not None and not _is_close(sample, run.end, run.tolerance):
            raise UsageError(
                f"the pipeline changes the states between steps {len(run.states)} and {len(run.states) + 1}, which an "
                f"engine's loop does not. {DROP_IN_ONLY}"
            )
        if run.roles is None:
            run.roles = Roles(_find_state(calls[0], sample, run.tolerance), find_time(calls[0].tensors), calls[0].lists)
        state, time = run.roles.state, run.roles.time
        inputs = join(calls, run.roles)
        rows = len(inputs[state])
        if rows % run.images:
            raise UsageError(f"{rows} rows for {run.images} images in one step, expected as many for each image.")
        _check_scaled(inputs[state], sample, run.tolerance)
        output = torch.cat([call.output for call in calls])
        run.channels = tuple(output.shape[1:])
        run.weights.append(_fit_weights(model_output, output, rows // run.images, run.tolerance))
        network_time = inputs[time].double().flatten()
        if float(network_time.max() - network_time.min()) > 0:
            raise UsageError(f"the rows of one step have different timesteps. {DROP_IN_ONLY}")
        run.times.append((timestep, float(network_time[0])))
        if not run.states:
            self._check_memory(run, inputs)
        run.states.append(sample.float().cpu().reshape(run.images, *inputs[state].shape[1:]))
        run.inputs = run.inputs or {name: tensor for name, tensor in inputs.items() if name not in (state, time)}
        changed = (name for name, tensor in run.inputs.items() if not torch.equal(inputs[name], tensor))
        run.changing = run.changing or next(changed, None)
        run.constants = run.constants or calls[0].constants
        for call in calls:
            check_alike(run.constants, call.constants)

    def _check_memory(self, run: _Run, inputs: Mapping[str, Tensor]) -> None:
        """Refuse a chain whose states, and those of all chains once more as one array, do not fit into memory."""
        assert run.roles is not None
        requests = sum(tensor.nbytes for tensor in inputs.values())
        states = 4 * inputs[run.roles.state][: run.images].numel() * len(run.table.timesteps)
        held = sum(tensor.nbytes for other in self._runs for tensor in (*other.states, *other.inputs.values()))
        check_memory(
            f"recording {len(self._runs)} chain(s) of {len(run.table.timesteps)} steps", held + 2 * (states + requests),
            "Record fewer prompts, steps or frames.",
        )  # fmt: skip

    # what was heard -----------------------------------------------------------------------------------------------

    def recording(self) -> Recording:
        """The runs as one recording. Raises UsageError if there is none, or if they differ in more than requests."""
        runs = [run for run in self._runs if run.is_whole]
        if not runs:
            raise UsageError(
                "no chain was recorded from its first to its last step. Call the pipeline inside `record`."
            )
        first = runs[0]
        for run in runs[1:]:
            kinds = [(each.table, each.states[0].shape[1:], each.weights[0].shape) for each in (first, run)]
            if kinds[0] != kinds[1]:
                raise UsageError(
                    "the recorded chains differ in their steps or shapes, or some are guided and others not. Record "
                    "one kind at a time."
                )
            check_alike(first.constants, run.constants)
        scale, shift = _time_map([pair for run in runs for pair in run.times], first.tolerance)
        guidance, sign, roles = _guidance(np.concatenate([run.weights for run in runs]), first.tolerance)
        requests = [_requests(run, roles) for run in runs]
        process = Recorded(first.scheduler, (first.table,), scale, shift, sign, first.training_steps)
        joined = {name: np.concatenate([values[name] for values in requests]) for name in requests[0]}
        images = np.cumsum([0, *(run.images for run in runs)])
        states = np.empty((images[-1], len(first.states), *first.states[0].shape[1:]), np.float32)
        for run, start in zip(runs, images, strict=False):
            for step, state in enumerate(reversed(run.states)):
                states[start : start + run.images, step] = state.numpy()
        assert first.roles is not None
        spec = SamplingSpec(process, "recorded", len(first.table.timesteps))
        found = _recording(self.network, first.roles, first.channels, (spec, guidance), first.constants, states, joined)
        latents, text = _latents(runs, type(self.vae).__name__), _examples(runs, found.requests)
        return replace(found, interface=replace(found.interface, latents=latents, text=text))


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Give an object another method; what is returned gives it back what it had."""
    setattr(function, RECORDED, True)
    attributes, own = vars(owner), name in vars(owner)
    before = attributes.get(name)
    attributes[name] = function

    def undo() -> None:
        if own:
            attributes[name] = before
        else:
            attributes.pop(name, None)

    return undo


class NetworkRecorder:
    """Listens to the calls of a network while it is entered, whatever makes them. It learns no loop."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._calls: list[Call] = []
        self._undo: Callable[[], None] | None = None

    def __enter__(self) -> NetworkRecorder:
        self._undo = listen(self.network, self._hear).remove
        return self

    def _hear(self, call: Call) -> None:
        """Keep a call without the values of its prediction. Raises UsageError if memory does not hold it twice."""
        self._calls.append(replace(call, output=call.output.to("meta")))
        held = sum(tensor.nbytes for each in self._calls for tensor in each.tensors.values())
        check_memory(f"recording {len(self._calls)} call(s)", held, "Record fewer calls.")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._undo is not None
        self._undo()

    def recording(self) -> Recording:
        """The calls as one recording. Raises UsageError if there is none, or if they differ in more than their rows."""
        if not self._calls:
            raise UsageError(f"no call of the {type(self.network).__name__} was recorded. Call it inside `record`.")
        first, time = self._calls[0], find_time(self._calls[0].tensors)
        state = next((name for name, x in first.tensors.items() if name != time and _holds_numbers(x)), None)
        if state is None:
            raise UsageError(f"the network takes no real numbers per row among {', '.join(first.tensors)}.")
        roles = Roles(state, time, first.lists)
        rows = {name: tensor.numpy() for name, tensor in join(self._calls, roles).items()}
        for call in self._calls:
            check_alike(first.constants, call.constants)
        output = tuple(first.output.shape)
        if output[0] != len(first.tensors[state]):
            raise UsageError(
                f"the prediction is {list(output)} for {len(first.tensors[state])} rows, expected as many."
            )
        spec, states = SamplingSpec(Unsampled(), "none", 1), rows.pop(state)[:, None]
        return _recording(self.network, roles, output[1:], (spec, None), first.constants, states, rows)


def _recording(
    network: nn.Module, roles: Roles, output: tuple[int, ...], sampled: tuple[SamplingSpec, Guidance | None],
    constants: Mapping[str, Constant], states: Array, requests: dict[str, Array],
) -> Recording:  # fmt: skip
    """The recording, once requests whose values the network's Python reads have become constants."""
    signature = _signature(network, roles, states, requests, output)
    example = {name: torch.from_numpy(array) for name, array in signature.zeros(2).items()}
    alike = {
        port.name: torch.from_numpy(requests[port.name][:1])[0]
        for port in signature.requests
        if _is_alike(port, requests)
    }
    read = values_read(network, arguments_of(signature, constants, example), alike, roles.state)
    plain = {
        name: value.numpy() if isinstance(value, Tensor) else value for name, value in {**constants, **read}.items()
    }
    ports = tuple(port for port in signature.ports if port.name not in read)
    interface = Interface(replace(signature, ports=ports), *sampled, plain, settings_of(network), tuple(read))
    return Recording(interface, states, {name: array for name, array in requests.items() if name not in read})


def _prompts(arguments: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]] | None:
    """The prompts of a call of `encode_prompt` and its other settings; None if it got embeddings or several texts."""
    prompt = arguments.pop("prompt", None)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        return None
    others = {name: value for name, value in arguments.items() if value is not None and name != "device"}
    if any(name.startswith("prompt") and value not in (prompt, prompts) for name, value in others.items()):
        return None
    plain = {
        name: value for name, value in others.items() if isinstance(value, PLAIN) and not name.startswith("prompt")
    }
    return tuple(prompts), json.loads(json.dumps(plain))


def _examples(runs: list[_Run], requests: Mapping[str, Array]) -> TextExamples | None:
    """Some of the prompts with their request values; None if a run had none, or if their settings differ."""
    if any(not run.prompts or run.images % len(run.prompts) or run.settings != runs[0].settings for run in runs):
        return None
    rows: dict[str, int] = {}  # a prompt -> its first image
    start = 0
    for run in runs:
        for number, prompt in enumerate(run.prompts):
            rows.setdefault(prompt, start + number * (run.images // len(run.prompts)))
        start += run.images
    chosen = dict(list(rows.items())[:MOST_PROMPTS])
    values = {name: array[[*chosen.values()]] for name, array in requests.items()}
    return TextExamples(tuple(chosen), runs[0].settings, values)


def _latents(runs: list[_Run], decoder: str) -> Latents | None:
    """How states become codes of the VAE; None if no run was decoded, or with a warning if it cannot be learned."""
    decoded = [run for run in runs if run.codes]
    if not decoded:
        return None
    shapes = [run.states[0].shape for run in decoded]  # (images, ...)
    try:
        if given := set.union(*(run.given for run in decoded)):
            raise UsageError(f"{decoder}.decode takes {', '.join(sorted(given))} beside the codes")
        codes = [torch.cat(run.codes) for run in decoded]
        if any(len(each) != shape[0] for each, shape in zip(codes, shapes, strict=True)):
            raise UsageError(f"{decoder} decodes an image or a video in parts")
        ends = [run.end.reshape(shape) for run, shape in zip(decoded, shapes, strict=True) if run.end is not None]
        x, y = (torch.cat(parts).detach().float().cpu().numpy() for parts in (ends, codes))
        return learn_latents(x, y, decoder, decoded[0].tolerance)
    except (UsageError, RuntimeError) as error:  # PyTorch's, for parts of different shapes
        warnings.warn(f"engines of this recording make latents: {error}.", TqditWarning, stacklevel=3)
        return None


def _is_alike(port: Port, requests: Mapping[str, Array]) -> bool:
    """Whether it has one value in every row."""
    values = requests[port.name]
    return port.null is None and "." not in port.name and bool((values == values[0]).all())


def _signature(
    network: nn.Module, roles: Roles, states: Array, requests: Mapping[str, Array], output: tuple[int, ...]
) -> Signature:
    """states (rows, T, ...), requests: values of every other port, maybe of the time."""
    times = requests[roles.time].shape[1:] if roles.time in requests else ()
    ports = [
        Port(roles.state, "state", "float32", (None, *states.shape[2:]), listed=roles.state in roles.lists),
        Port(roles.time, "time", "float32", (None, *times)),
    ]
    for name, values in requests.items():
        if name not in (roles.state, roles.time) and not name.startswith(NEGATIVE):
            dtype: Any = str(values.dtype)
            null: Any = "own" if f"{NEGATIVE}{name}" in requests else None
            shape = (None, *values.shape[1:])
            ports.append(Port(name, "request", dtype, shape, null=null, listed=name in roles.lists))
    order = {name: index for index, name in enumerate(parameters_of(network))}
    ports.sort(key=lambda port: order.get(port.name.partition(".")[0], 0))
    return Signature(tuple(ports), (None, *output), type(network).__name__)


def _holds_numbers(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.is_floating_point()


def _part(pipeline: Any, name: str) -> Any:
    part = getattr(pipeline, name, None)
    if part is None:
        raise UsageError(f"{type(pipeline).__name__} has no {name}. Pass a diffusers pipeline of a transformer.")
    return part


def _find_state(call: Call, sample: Tensor, tolerance: float) -> str:
    """The argument that is the scheduler's sample, scaled."""
    for name, tensor in call.tensors.items():
        rows = tensor[: len(sample)] if tensor.ndim else tensor
        if rows.numel() == sample.numel() and _scale_of(rows, sample)[1] < tolerance:
            return name
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in call.tensors.items())
    raise UsageError(
        f"no argument of the transformer is the scheduler's sample {tuple(sample.shape)}; found {shapes}. "
        f"{DROP_IN_ONLY}"
    )


def _scale_of(x: Tensor, sample: Tensor) -> tuple[float, float]:
    """s of x = s sample, and the residual."""
    a, b = x.double().flatten().cpu(), sample.double().flatten().cpu()
    scale = float(a @ b / (b @ b))
    return scale, float((a - scale * b).norm() / a.norm())


def _is_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.numel() != b.numel():
        return False
    a, b = a.double().flatten(), b.double().flatten()
    return float((a - b).norm()) <= tolerance * float(b.norm())


def _check_scaled(states: Tensor, sample: Tensor, tolerance: float) -> None:
    for start in range(0, len(states), len(sample)):
        residual = _scale_of(states[start : start + len(sample)], sample)[1]
        if residual > tolerance:
            raise UsageError(
                f"a row's state is not the scheduler's sample times a factor (residual {residual:.1e}). {DROP_IN_ONLY}"
            )


def _fit_weights(model_output: Tensor, output: Tensor, roles: int, tolerance: float) -> NDArray[np.float64]:
    """Weights (roles,) of the predictions of each role in what the scheduler gets."""
    target = model_output.double().cpu()
    parts = [part[:, : target.shape[1]].double().cpu().flatten() for part in output.chunk(roles)]
    matrix, y = torch.stack(parts, 1), target.flatten()
    if matrix.shape[0] != len(y):
        raise UsageError(f"the scheduler gets {tuple(model_output.shape)} of a prediction {tuple(output.shape)}.")
    weights = torch.linalg.lstsq(matrix, y[:, None], driver="gelsd").solution[:, 0]
    residual = float((matrix @ weights - y).norm() / y.norm())
    if residual > tolerance:
        raise UsageError(
            f"what the scheduler gets is not a weighted sum of the network's predictions (residual {residual:.1e}, "
            f"expected less than {tolerance:.0e}). {DROP_IN_ONLY}"
        )
    return weights.numpy()


def _time_map(times: list[tuple[float, float]], tolerance: float) -> tuple[float, float]:
    """(a, b) of the network's timestep a t + b."""
    t, found = np.array(times).T
    size = np.abs(found).max() or 1.0
    for scale, shift in TIME_MAPS:
        if np.abs(scale * t + shift - found).max() <= tolerance * size:
            return scale, shift
    if len(set(t)) > 1:
        scale, shift = np.polyfit(t, found, 1)
        if np.abs(scale * t + shift - found).max() <= tolerance * size:
            return float(scale), float(shift)
    raise UsageError("the network's timestep is not a linear function of the scheduler's.")


def _guidance(weights: NDArray[np.float64], tolerance: float) -> tuple[Guidance | None, Sign, dict[str, int]]:
    """Guidance, the sign of the prediction, and the place of the conditional and the unconditional role."""
    mean = weights.mean(0)
    spread = float(np.abs(weights - mean).max() / np.abs(mean).max())
    text = ", ".join(f"{weight:.3g}" for weight in mean)
    if spread > 10 * tolerance:
        raise UsageError(
            f"the weights of the predictions change from step to step by {spread:.1e} (mean {text}). {DROP_IN_ONLY}"
        )
    sign: Sign = 1 if mean.sum() > 0 else -1
    if len(mean) > 2 or abs(abs(mean.sum()) - 1) > 10 * tolerance * np.abs(mean).max():
        raise UsageError(f"the predictions of a step have weights {text}; expected one, or g and 1 - g of guidance.")
    if len(mean) == 1:
        return None, sign, {"": 0}
    conditional = int(np.argmax(sign * mean))
    scale = float(np.round(sign * mean[conditional], 3 if tolerance > 1e-3 else 5))
    return Guidance(scale), sign, {"": conditional, NEGATIVE: 1 - conditional}


def _requests(run: _Run, roles: Mapping[str, int]) -> dict[str, Array]:
    """Values of each request port, (B, ...); those of the unconditional role under `negative.`, if they differ."""
    found: dict[str, Array] = {}
    if run.changing is not None:
        raise UsageError(f"argument '{run.changing}' changes from step to step. {DROP_IN_ONLY}")
    for name, tensor in run.inputs.items():
        parts = tensor.chunk(len(roles))
        values = {prefix: parts[place] for prefix, place in roles.items()}
        if len(values) == 2 and torch.equal(values[""], values[NEGATIVE]):
            del values[NEGATIVE]
        found |= {f"{prefix}{name}": value.numpy() for prefix, value in values.items()}
    return found
