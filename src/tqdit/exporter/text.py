"""A pipeline's text encoders as one ONNX graph: the pipeline's own `encode_prompt`, with tokens as the graph's inputs.

What it does with a prompt before the tokenizer, and which of its results is which request value, is found by comparison
with recorded prompts, in float32. The result is run by ONNX Runtime and refused unless it gives the same embeddings. If
weights are int8, what rounding changes is measured and bounded.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tqdit.errors import FileFormatError, UsageError
from tqdit.exporter.passes.names import forget_sources
from tqdit.exporter.passes.weight_only import round_weights
from tqdit.exporter.trace import OPSETS, trace
from tqdit.exporter.watch import UntraceableError
from tqdit.extras import need
from tqdit.files import sha256
from tqdit.interface import TextExamples
from tqdit.models.loaded import LoadedModel
from tqdit.models.recorded import float_copy
from tqdit.models.weights import IN_MEMORY, Weights
from tqdit.onnx_file import save
from tqdit.ports import NEGATIVE
from tqdit.text import FOLDS, TextCard, TextEncoder, Tokens, tokenize

PROBE = " A Red b1 "  # shows what becomes of capitals and blanks
TOLERANCE = 1e-4  # relative, of embeddings
INT8_TOLERANCE = 0.05  # the same with int8 weights
# The same of embeddings that a pipeline in half precision recorded: what its encoders' rounding adds up to.
RECORDED_TOLERANCES = {"fp32": TOLERANCE, "fp16": 0.01, "bf16": 0.05}
EMBEDDINGS = "Sample with --embeddings."
# Settings of `encode_prompt`: one row; web pages in captions, whose removal takes further libraries, stay as they are.
CONDITIONAL = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "clean_caption": False}


@dataclass(frozen=True, eq=False)
class TextGraph:
    """Traced text encoders. tokenizers: of each of `tokens`, the content of its tokenizer.json."""

    model: ir.Model
    tokens: tuple[Tokens, ...]
    tokenizers: tuple[str, ...]
    values: tuple[str, ...]
    examples: TextExamples
    int8: bool = False

    def write(self, folder: Path, stem: str) -> TextCard:
        """Write the graph and the tokenizers. Raises UsageError if they do not reproduce the examples."""
        before = {*folder.iterdir()}
        draft = folder / f"{stem}.text.onnx"
        save(self.model, draft)
        graph = draft.rename(folder / f"{stem}.text-{sha256(draft)[:8]}.onnx")
        for tokens, content in zip(self.tokens, self.tokenizers, strict=True):
            (folder / tokens.file).write_text(content, encoding="utf-8")
        files = {file.name: sha256(file) for file in sorted({*folder.iterdir()} - before)}
        card = TextCard(graph.name, self.tokens, self.values, files)
        found, tolerance = TextEncoder(folder, card)(self.examples.prompts), INT8_TOLERANCE if self.int8 else TOLERANCE
        error = _check(found, self.examples, tolerance)
        return replace(card, int8_error=error) if self.int8 else card


def trace_text(
    pipeline: Any, model: LoadedModel, stem: str, int8: bool = False, weights: Weights = IN_MEMORY
) -> TextGraph:
    """The text encoders of a pipeline for a model that was recorded with it; stem: begins the names of its files.

    int8: large weights are rounded to 8 bits, with one scale for each output channel. weights: where the values of the
    encoders' parameters lie.

    Raises UsageError, naming what is wrong, if the embeddings of the recorded prompts cannot be reproduced.
    """
    for library in ("tokenizers", "onnxruntime"):
        need(library, "text", "exporting text encoders")
    examples = model.text
    if examples is None or len(set(examples.prompts)) < 2:
        raise UsageError(
            f"{model.source}: fewer than two different prompts were recorded, so no text encoder can be proved. Record "
            f"the pipeline with prompts, not with embeddings. {EMBEDDINGS}"
        )
    lengths = {name: len(array) for name, array in examples.values.items()}
    if lengths != dict.fromkeys(model.signature.request_values, len(examples.prompts)):
        raise FileFormatError(f"{model.source}: the request values of its recorded prompts are damaged. Record again.")
    with _prepared(pipeline) as tokenizers, torch.no_grad():
        recorded: list[list[_Call]] = []
        results: list[list[Tensor]] = []
        prompts = (PROBE, *examples.prompts)
        for prompt in prompts:
            calls: list[_Call] = []
            for each in tokenizers:
                each.begin(calls)
            with weights.lent():
                results.append(_encode(pipeline, prompt, examples))
            recorded.append(calls)
        tokens, contents = _learn_tokens(recorded, prompts, stem)
        sources = {name: _source(name, array, results[1:]) for name, array in examples.values.items()}
        exact = {
            name: _values(results[1:], source, examples.values[name].shape)
            for name, source in sources.items() if isinstance(source, int)
        }  # fmt: skip
        module = _Encoder(pipeline, tokenizers, examples, sources, tokens)
        inputs = {
            name: torch.ones(1, each.length, dtype=torch.int64)
            for each in tokens if each is not None for name in (each.ids, each.mask)
        }  # fmt: skip
        try:
            graph = trace(module, inputs, [*sources], OPSETS.start, rows=1, weights=weights)
        except UntraceableError as error:
            raise UsageError(f"{_name(pipeline)}.encode_prompt cannot be traced: {error}. {EMBEDDINGS}") from error
    known = [(each, content) for each, content in zip(tokens, contents, strict=True) if each is not None]
    if int8:
        round_weights(graph)
    forget_sources(graph)
    return TextGraph(
        graph,
        tuple(each for each, _ in known),
        tuple(content for _, content in known),
        tuple(sources),
        replace(examples, values={**examples.values, **exact}),
        int8,
    )


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a tokenizer that fills up to a length."""

    tokenizer: Any
    text: str
    settings: dict[str, Any]
    ids: NDArray[np.int64]  # (1, length)
    mask: NDArray[np.int64]


class _Given(dict[str, Tensor]):
    """What a call of a tokenizer returns; pipelines read it by attribute or by name."""

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        super().__init__(input_ids=ids, attention_mask=mask)

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class _Tokenizer:
    """In the place of a pipeline's tokenizer: notes its calls, or answers them with inputs of a graph."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[_Call] = []
        self.answers: Iterator[_Given | None] | None = None

    def begin(self, calls: list[_Call], answers: Iterator[_Given | None] | None = None) -> None:
        self.calls, self.answers = calls, answers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str | list[str], *args: Any, **settings: Any) -> Any:
        if settings.get("padding") != "max_length":  # pipelines look for what was cut off, which we refuse
            nothing = torch.zeros(1, 0, dtype=torch.int64)
            return _Given(nothing, nothing)
        if self.answers is not None and (given := next(self.answers)) is not None:
            return given
        found = self.tokenizer(text, *args, **settings)
        if self.answers is None:
            (one,) = [text] if isinstance(text, str) else text
            arrays = (np.asarray(found[name]) for name in ("input_ids", "attention_mask"))
            self.calls.append(_Call(self.tokenizer, one, settings, *arrays))
        return found


class _Encoder(nn.Module):
    """Tokens to request values: forward(ids, mask, ids, mask, ...), each int64 (1, length)."""

    def __init__(
        self, pipeline: Any, tokenizers: list[_Tokenizer], examples: TextExamples, sources: dict[str, int | Tensor],
        tokens: list[Tokens | None],
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoders = nn.ModuleList(
            part for name, part in vars(pipeline).items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        )  # fmt: skip
        self.run = pipeline, tokenizers, examples, tokens
        self.sources = dict(sources)
        self.types = {name: torch.from_numpy(array[:0]).dtype for name, array in examples.values.items()}
        self.shapes = {name: array.shape[1:] for name, array in examples.values.items()}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        pipeline, tokenizers, examples, tokens = self.run
        pairs = iter(inputs)
        answers = iter([None if each is None else _Given(next(pairs), next(pairs)) for each in tokens])
        for each in tokenizers:
            each.begin([], answers)
        results = _encode(pipeline, examples.prompts[0], examples)
        made = {
            name: results[source] if isinstance(source, int) else source.clone()
            for name, source in self.sources.items()
        }
        return tuple(value.reshape(1, *self.shapes[name]).to(self.types[name]) for name, value in made.items())


@contextmanager
def _prepared(pipeline: Any) -> Iterator[list[_Tokenizer]]:
    """Inside, the pipeline has float32 copies of its text encoders, and its tokenizers are listened to."""
    parts = {name: part for name, part in vars(pipeline).items() if not name.startswith("_")}
    if not hasattr(pipeline, "encode_prompt"):
        raise UsageError(f"{_name(pipeline)} has no encode_prompt. {EMBEDDINGS}")
    encoders = {
        name: float_copy(part)
        for name, part in parts.items() if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }  # fmt: skip
    listening = {
        name: _Tokenizer(part) for name, part in parts.items() if name.startswith("tokenizer") and callable(part)
    }
    vars(pipeline).update(encoders | listening)
    try:
        yield [*listening.values()]
    finally:
        vars(pipeline).update(parts)


def _encode(pipeline: Any, prompt: str, examples: TextExamples) -> list[Tensor]:
    """The tensors that `encode_prompt` returns for the conditional row of one prompt."""
    known = inspect.signature(pipeline.encode_prompt).parameters
    absent = {name: None for name, parameter in known.items() if parameter.default is inspect.Parameter.empty}
    settings = {**absent, **examples.settings, **CONDITIONAL, "prompt": [prompt]}
    return [*_tensors(pipeline.encode_prompt(**{name: settings[name] for name in known if name in settings}))]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _name(pipeline: Any) -> str:
    return type(pipeline).__name__


def _source(name: str, expected: NDArray[Any], results: Sequence[Sequence[Tensor]]) -> int | Tensor:
    """Which result of `encode_prompt` is a request value, or the value itself if it is alike for all prompts."""
    least, is_constant = np.inf, bool((expected == expected[0]).all())
    tolerance = RECORDED_TOLERANCES[_precision(expected)]
    for index in range(0 if is_constant and name.startswith(NEGATIVE) else len(results[0])):
        if results[0][index].numel() == expected[0].size:
            least = min(least, _error(_values(results, index, expected.shape), expected))
            if least < tolerance:
                return index
    if is_constant:
        return torch.from_numpy(expected[:1].copy())
    raise UsageError(
        f"'{name}' of the recorded prompts is nothing that encode_prompt returns (least difference {least:.1e}, "
        f"expected less than {tolerance:.0e}). {EMBEDDINGS}"
    )


def _values(results: Sequence[Sequence[Tensor]], index: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """One result of `encode_prompt` for each prompt."""
    return np.stack([result[index].numpy() for result in results]).reshape(shape)


def _precision(values: NDArray[Any]) -> str:
    """The type that computed them: recordings hold float32, of which half precision leaves the last bits zero. Whole
    numbers, such as a mask, are exact in every type.
    """
    if values.dtype != np.float32 or np.array_equal(values, values.round()):
        return "fp32"
    if not (values.view(np.uint32) & 0xFFFF).any():
        return "bf16"
    with np.errstate(over="ignore"):
        return "fp16" if np.array_equal(values.astype(np.float16).astype(np.float32), values) else "fp32"


def _error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest relative difference of a prompt."""
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (found, expected))
    sizes = np.linalg.norm(b, axis=1)
    return float((np.linalg.norm(a - b, axis=1) / np.where(sizes > 0, sizes, 1)).max())


def _check(found: dict[str, NDArray[Any]], examples: TextExamples, tolerance: float) -> float:
    """The largest relative difference of a value. Raises UsageError if it is not less than the tolerance."""
    errors = {name: _error(found[name], expected) for name, expected in examples.values.items()}
    for name, error in errors.items():
        if not error < tolerance:
            raise UsageError(
                f"the text encoders in ONNX Runtime do not reproduce '{name}' of the recorded prompts: difference "
                f"{error:.1e}, expected less than {tolerance:.0e}. {EMBEDDINGS}"
            )
    return max(errors.values())


def _learn_tokens(
    recorded: list[list[_Call]], prompts: Sequence[str], stem: str
) -> tuple[list[Tokens | None], list[str]]:
    """How each call of a tokenizer follows from the prompt, with its tokenizer.json; None: it does not depend on it."""
    if len({len(calls) for calls in recorded}) != 1 or not recorded[0]:
        raise UsageError(f"the pipeline's tokenizers do not fill up to one length. {EMBEDDINGS}")
    tokens: list[Tokens | None] = []
    contents: list[str] = []
    for number, calls in enumerate(zip(*recorded, strict=True)):
        if len({call.text for call in calls}) == 1:
            tokens.append(None)
            contents.append("")
            continue
        backend = getattr(calls[0].tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(f"{type(calls[0].tokenizer).__name__} has no tokenizer.json. {EMBEDDINGS}")
        contents.append(backend.to_str())
        tokens.append(_learn_one(number, calls, prompts, stem, contents[-1]))
    return tokens, contents


def _learn_one(number: int, calls: Sequence[_Call], prompts: Sequence[str], stem: str, content: str) -> Tokens:
    library: Any = need("tokenizers", "text", "exporting text encoders")
    tokenizer = library.Tokenizer.from_str(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first, digest = calls[0], hashlib.sha256(content.encode()).hexdigest()
    for fold, change in FOLDS.items():
        prefix, found, suffix = first.text.partition(change(prompts[0]))
        for left in (False, True) if found else ():
            tokens = Tokens(
                file=f"{stem}.tokenizer-{digest[:8]}.json", ids=f"ids.{number}", mask=f"mask.{number}",
                length=first.ids.shape[1], pad=int(first.tokenizer.pad_token_id or 0), left=left,
                special=bool(first.settings.get("add_special_tokens", True)), prefix=prefix, suffix=suffix, fold=fold,
            )  # fmt: skip
            if all(_same(tokenizer, tokens, prompt, call) for prompt, call in zip(prompts, calls, strict=True)):
                return tokens
    raise UsageError(
        f"the tokens of the recorded prompts cannot be reproduced: {type(first.tokenizer).__name__} got "
        f"{first.text[:60]!r} for {prompts[0][:60]!r}. {EMBEDDINGS}"
    )


def _same(tokenizer: Any, tokens: Tokens, prompt: str, call: _Call) -> bool:
    try:
        ids, mask = tokenize(tokenizer, tokens, prompt)
    except UsageError:  # a recorded prompt was cut off
        return False
    return np.array_equal(ids, call.ids) and np.array_equal(mask, call.mask)
