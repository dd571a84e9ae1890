"""What a pipeline asks of its network: recorded calls, and the loop around them as facts that are checked.

    with tqdit.record(pipeline) as calls:
        pipeline("a red square", num_inference_steps=28)

A recorder learns the network's ports, the arguments that never change, how the pipeline's scheduler steps, how it
guides, and the states of the chains that it ran: all that calibration, export and a loop without torch need.
"""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tqdit.bounds import check_memory
from tqdit.card import Latents
from tqdit.errors import TqditWarning, UsageError
from tqdit.interface import TextExamples
from tqdit.models.arguments import Constant
from tqdit.models.calls import DROP_IN_ONLY, Call, Roles, check_alike, find_time, join, listen
from tqdit.models.decoding import learn_latents
from tqdit.models.facts import check_scaled, find_state, fit_guidance, fit_time, fit_weights, is_close
from tqdit.models.recording import Array, Recording, make_recording
from tqdit.models.scheduler import find_noising, tabulate
from tqdit.sampling.process import TRAINING_STEPS, Recorded, Table, Unsampled
from tqdit.sampling.schedule import RECORDED, SamplingSpec

LISTENS = "_tqdit_listens"  # marks methods that listen
MOST_PROMPTS = 4  # whose request values are kept to prove text encoders
PLAIN = (str, int, float, list, dict)  # kinds of settings that a file holds
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}  # of a fact's residual, relative
HALF_PRECISION_TOLERANCE = 2e-2


@dataclass
class _Run:
    """What one chain of B images showed, step by step."""

    scheduler: str
    table: Table
    config: Mapping[str, Any]  # of the scheduler
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
        self._text: tuple[tuple[str, ...], dict[str, Any]] | None = None  # prompts and settings of the next run
        self._runs: list[_Run] = []
        self._calls: list[Call] = []
        self._undo: list[Callable[[], None]] = []
        self._fresh = True

    def __enter__(self) -> Recorder:
        if hasattr(self.scheduler.step, LISTENS):
            raise UsageError(
                f"{type(self.pipeline).__name__} is being recorded already. Leave the other `record` first."
            )
        handle = listen(self.network, lambda call: self._calls.append(call))
        step, set_timesteps = self.scheduler.step, self.scheduler.set_timesteps

        @functools.wraps(step)  # pipelines look at its parameters
        def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            _check_extras(type(self.scheduler).__name__, args, kwargs)
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
                self._text = self._text or _prompts(inspect.signature(encode).bind(*args, **kwargs).arguments)
                return encode(*args, **kwargs)

            self._undo.append(_replace(self.pipeline, "encode_prompt", encoded))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    @property
    def is_listening(self) -> bool:
        """Whether it is entered."""
        return bool(self._undo)

    def _begin(self, sample: Tensor) -> None:
        self._fresh = False
        if start := getattr(self.scheduler, "begin_index", None):
            raise UsageError(
                f"the pipeline begins at step {start + 1} of its schedule, from an image; an engine's loop begins at "
                f"step 1, with noise. {DROP_IN_ONLY}"
            )
        name, config = type(self.scheduler).__name__, dict(getattr(self.scheduler, "config", {}))
        (prompts, settings), self._text = self._text or ((), {}), None
        table = tabulate(self.scheduler)
        self._runs.append(_Run(name, table, config, len(sample), prompts=prompts, settings=settings))

    def _step(self, model_output: Tensor, timestep: float, sample: Tensor) -> None:
        run, calls, self._calls = self._runs[-1], self._calls, []
        if not calls:
            raise UsageError(f"{run.scheduler} made a step without a call of the transformer. {DROP_IN_ONLY}")
        types = (model_output.dtype, sample.dtype, *(call.output.dtype for call in calls))
        run.tolerance = max(TOLERANCES.get(dtype, HALF_PRECISION_TOLERANCE) for dtype in types)
        if not torch.isfinite(model_output).all() or not torch.isfinite(sample).all():
            raise UsageError(f"step {len(run.states) + 1} of the pipeline holds NaN or infinite values.")
        if run.end is not None and not is_close(sample, run.end, run.tolerance):
            raise UsageError(
                f"the pipeline changes the states between steps {len(run.states)} and {len(run.states) + 1}, which an "
                f"engine's loop does not. {DROP_IN_ONLY}"
            )
        if run.roles is None:
            run.roles = Roles(find_state(calls[0], sample, run.tolerance), find_time(calls[0].tensors), calls[0].lists)
        state, time = run.roles.state, run.roles.time
        inputs = join(calls, run.roles)
        rows = len(inputs[state])
        if rows % run.images:
            raise UsageError(f"{rows} rows for {run.images} images in one step, expected as many for each image.")
        check_scaled(inputs[state], sample, run.tolerance)
        output = torch.cat([call.output for call in calls])
        run.channels = tuple(output.shape[1:])
        run.weights.append(fit_weights(model_output, output, rows // run.images, run.tolerance))
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

    def recording(self) -> Recording:
        """The runs as one recording. Raises UsageError if there is none, or if they differ in more than requests."""
        runs = [run for run in self._runs if run.is_whole]
        if not runs:
            raise UsageError(f"no chain was recorded from its first to its last step{self._parts()}")
        first = runs[0]
        for run in runs[1:]:
            kinds = [(each.table, _shapes(each), each.weights[0].shape) for each in (first, run)]
            if kinds[0] != kinds[1]:
                raise UsageError(
                    "the recorded chains differ in their steps, shapes or arguments, or some are guided and others not."
                    " Record one kind at a time, with prompts padded alike."
                )
            check_alike(first.constants, run.constants)
        scale, shift = fit_time([pair for run in runs for pair in run.times], first.tolerance)
        guidance, sign, roles = fit_guidance([np.array(run.weights) for run in runs], first.tolerance)
        requests = _requests(runs, roles)
        noising = find_noising(first.config, first.table, (scale, shift), sign)
        training_steps = first.config.get("num_train_timesteps", TRAINING_STEPS)
        process = Recorded(first.scheduler, (first.table,), scale, shift, sign, training_steps, noising)
        joined = {name: np.concatenate([values[name] for values in requests]) for name in requests[0]}
        images = np.cumsum([0, *(run.images for run in runs)])
        states = np.empty((images[-1], len(first.states), *first.states[0].shape[1:]), np.float32)
        for run, start in zip(runs, images, strict=False):
            for step, state in enumerate(reversed(run.states)):
                states[start : start + run.images, step] = state.numpy()
        assert first.roles is not None
        spec = SamplingSpec(process, RECORDED, len(first.table.timesteps))
        found = make_recording(
            self.network, first.roles, first.channels, (spec, guidance), first.constants, states, joined
        )
        latents, text = _latents(runs, type(self.vae).__name__), _examples(runs, found.requests)
        return replace(found, interface=replace(found.interface, latents=latents, text=text))

    def _parts(self) -> str:
        """How the sentence goes on that says that no chain is whole."""
        if not self._runs:
            return ". Call the pipeline inside `record`."
        run = self._runs[-1]
        return (
            f": {len(run.states)} of its {len(run.table.timesteps)} steps were. An engine's loop makes all steps, from "
            f"noise. {DROP_IN_ONLY}"
        )


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
        self._undo = None

    @property
    def is_listening(self) -> bool:
        """Whether it is entered."""
        return self._undo is not None

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
        return make_recording(self.network, roles, output[1:], (spec, None), first.constants, states, rows)


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Give an object another method; what is returned gives it back what it had."""
    setattr(function, LISTENS, True)
    attributes, own = vars(owner), name in vars(owner)
    before = attributes.get(name)
    attributes[name] = function

    def undo() -> None:
        if own:
            attributes[name] = before
        else:
            attributes.pop(name, None)

    return undo


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


def _shapes(run: _Run) -> dict[str, tuple[int, ...]]:
    """Of a row of the state, under no name, and of each request port."""
    return {name: tuple(rows.shape[1:]) for name, rows in {"": run.states[0], **run.inputs}.items()}


def _requests(runs: list[_Run], roles: Mapping[str, int]) -> list[dict[str, Array]]:
    """Of each run the values of each request port, (B, ...).

    Those of the unconditional role stand under `negative.` if they differ in any run; in one they may be the same.
    """
    found: list[dict[str, Array]] = [{} for _ in runs]
    if changing := next((run.changing for run in runs if run.changing is not None), None):
        raise UsageError(f"argument '{changing}' changes from step to step. {DROP_IN_ONLY}")
    for name in runs[0].inputs:
        parts = [run.inputs[name].chunk(len(roles)) for run in runs]
        own = any(not torch.equal(each[0], each[-1]) for each in parts)
        for prefix, place in roles.items():
            if own or not prefix:
                for values, each in zip(found, parts, strict=True):
                    values[f"{prefix}{name}"] = each[place].numpy()
    return found


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


def _check_extras(scheduler: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse what changes a step, such as eta of DDIM: the table of a scheduler is that of its steps without it."""
    given = {**{str(place): value for place, value in enumerate(args, 4)}, **kwargs}
    for name, value in given.items():
        without = value is None or (isinstance(value, bool | int | float) and not value)
        if not (without or name == "return_dict" or isinstance(value, torch.Generator | list)):
            raise UsageError(
                f"the pipeline gives {scheduler}'s step the argument {name} = {value!s:.40}, which an engine's loop "
                f"does not know. Leave it out, or record with another scheduler. {DROP_IN_ONLY}"
            )


def _holds_numbers(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and tensor.is_floating_point()


def _part(pipeline: Any, name: str) -> Any:
    part = getattr(pipeline, name, None)
    if part is None:
        raise UsageError(f"{type(pipeline).__name__} has no {name}. Pass a diffusers pipeline of a transformer.")
    return part
