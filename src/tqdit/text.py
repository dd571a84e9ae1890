"""Prompts to request values without PyTorch: tokenizers, and a pipeline's text encoders as one ONNX graph.

`tqdit-export --text` writes them; they are accepted only if they reproduce recorded embeddings (`exporter/text.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tqdit.bounds import MOST_TEXT_BYTES
from tqdit.errors import FileFormatError, InputError, UsageError, first_line
from tqdit.extras import need
from tqdit.files import explain, sha256

AGAIN = "Export it again."
UNKNOWN = ("<unk>", "[UNK]")  # what tokenizers call a word that they do not know
MOST_TOKENS = 2**16  # of a prompt
Fold = Literal["as it is", "stripped", "lower"]
FOLDS: dict[Fold, Callable[[str], str]] = {
    "as it is": str, "stripped": str.strip, "lower": lambda text: text.lower().strip(),
}  # fmt: skip


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines are left out. Raises UsageError if there is none."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_TEXT_BYTES + 1)
        if len(text) > MOST_TEXT_BYTES:
            raise UsageError(f"{path}: more than {MOST_TEXT_BYTES} bytes. Pass a file with one prompt per line.")
        lines = text.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(explain(error, "read", path)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text ({error}). Pass a file with one prompt per line.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{path}: holds no prompt. Write one per line.")
    return prompts


@dataclass(frozen=True)
class Tokens:
    """One tokenizer of a pipeline: how a prompt becomes the inputs `ids` and `mask` int64 (1, length) of the graph."""

    file: str  # tokenizer.json of the library tokenizers
    ids: str
    mask: str
    length: int
    pad: int  # the token that fills up
    left: bool  # it is filled up in front
    special: bool  # begin and end are marked by tokens
    prefix: str  # of the text
    suffix: str
    fold: Fold  # what becomes of the prompt before

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MOST_TOKENS or not 0 <= self.pad < 2**31:
            raise ValueError(
                f"{self.length} tokens, filled up with token {self.pad}; expected 1 to {MOST_TOKENS}, and a token"
            )


@dataclass(frozen=True)
class TextCard:
    """The text encoders beside a graph. values: the graph's outputs, as `Signature.request_values`.

    int8_error: with int8 weights, the largest relative difference of a recorded prompt's embeddings from float ones.
    """

    file: str
    tokens: tuple[Tokens, ...]
    values: tuple[str, ...]
    files: dict[str, str]  # every file beside the graph -> SHA-256
    int8_error: float | None = None

    def __post_init__(self) -> None:
        unknown = {self.file, *(each.file for each in self.tokens)} - set(self.files)
        if unknown:
            raise ValueError(f"the text encoders' file '{min(unknown)}' is not among {sorted(self.files)}")

    @property
    def summary(self) -> str:
        if self.int8_error is None:
            return "inside"
        return f"inside, int8 weights; embeddings differ by at most {self.int8_error:.2%}"

    def check(self, folder: Path) -> None:
        """Raises FileFormatError unless each file is there and unaltered."""
        for name, digest in self.files.items():
            file = folder / name
            if Path(name).name != name or not file.is_file():
                raise FileFormatError(f"{file}: missing; it belongs to the text encoders. {AGAIN}")
            if sha256(file) != digest:
                raise FileFormatError(f"{file}: altered since it was exported (its SHA-256 differs). {AGAIN}")


class TextEncoder:
    """Request values of prompts. Runs on the CPU with ONNX Runtime; safe to call from several threads."""

    def __init__(self, folder: Path, card: TextCard) -> None:
        """Raises FileFormatError for files that are missing or altered, MissingLibraryError without the extra text."""
        tokenizers: Any = need("tokenizers", "text", "encoding prompts")
        runtime: Any = need("onnxruntime", "text", "encoding prompts")
        card.check(folder)
        self.card = card
        try:
            self._tokenizers = [tokenizers.Tokenizer.from_file(str(folder / each.file)) for each in card.tokens]
        except Exception as error:  # the library raises nothing more special
            raise FileFormatError(f"{folder}: a tokenizer cannot be read ({error}). {AGAIN}") from error
        for tokenizer in self._tokenizers:
            tokenizer.no_truncation()
            tokenizer.no_padding()
        try:
            self._session = runtime.InferenceSession(str(folder / card.file), providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FileFormatError(f"{folder / card.file}: cannot be read ({first_line(error)}). {AGAIN}") from error
        self._file = folder / card.file
        self._inputs = {each.name for each in self._session.get_inputs()}

    def __call__(self, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Request values (prompts, ...) by name. Raises UsageError for what is no prompt, or is too long."""
        if isinstance(prompts, str) or not prompts:
            raise UsageError(f"the prompts are {prompts!r:.60}; expected a list of at least one text.")
        feeds = [self._tokenize(prompt) for prompt in prompts]  # all of them, before the first is encoded
        try:
            rows = [self._session.run(list(self.card.values), feed) for feed in feeds]
        except Exception as error:
            raise FileFormatError(
                f"{self._file}: does not run with its tokenizers ({first_line(error)}). {AGAIN}"
            ) from error
        return {name: np.concatenate([row[index] for row in rows]) for index, name in enumerate(self.card.values)}

    def unknown_words(self, prompt: str) -> list[str]:
        """The words that none of the tokenizers knows."""
        found = [unknown_words(*each, prompt) for each in zip(self._tokenizers, self.card.tokens, strict=True)]
        return [word for word in found[0] if all(word in each for each in found)]

    def _tokenize(self, prompt: str) -> dict[str, NDArray[np.int64]]:
        feed: dict[str, NDArray[np.int64]] = {}
        for tokenizer, tokens in zip(self._tokenizers, self.card.tokens, strict=True):
            ids, mask = tokenize(tokenizer, tokens, prompt)
            feed |= {tokens.ids: ids, tokens.mask: mask}
        return {name: array for name, array in feed.items() if name in self._inputs}


def tokenize(tokenizer: Any, tokens: Tokens, prompt: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids, mask) int64 (1, length) of a prompt. Raises UsageError if it is too long."""
    found = _encode(tokenizer, tokens, prompt)[0].ids
    if len(found) > tokens.length:
        raise UsageError(
            f"a prompt has {len(found)} tokens, the engine takes {tokens.length}: {prompt[:60]!r}. Use fewer words."
        )
    place = slice(tokens.length - len(found), None) if tokens.left else slice(len(found))
    ids, mask = np.full((1, tokens.length), tokens.pad, np.int64), np.zeros((1, tokens.length), np.int64)
    ids[0, place], mask[0, place] = found, 1
    return ids, mask


def unknown_words(tokenizer: Any, tokens: Tokens, prompt: str) -> list[str]:
    """The words that a tokenizer does not know. They say nothing to the network."""
    encoding, text = _encode(tokenizer, tokens, prompt)
    places = [place for name, place in zip(encoding.tokens, encoding.offsets, strict=True) if name in UNKNOWN]
    return list(dict.fromkeys(text[slice(*place)] for place in places))


def _encode(tokenizer: Any, tokens: Tokens, prompt: str) -> tuple[Any, str]:
    """The library's encoding, and the text that its offsets are of."""
    if not isinstance(prompt, str) or any("\ud800" <= each <= "\udfff" for each in prompt):  # bytes of no encoding
        raise UsageError(f"a prompt is {prompt!r:.60}; expected a text of whole Unicode characters.")
    text = f"{tokens.prefix}{FOLDS[tokens.fold](prompt)}{tokens.suffix}"
    try:
        return tokenizer.encode(text, add_special_tokens=tokens.special), text
    except BaseException as error:  # the library's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise FileFormatError(f"{tokens.file}: its tokenizer fails ({first_line(error)}). {AGAIN}") from error
