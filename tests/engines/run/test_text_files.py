"""Text encoders, golden calls and drop-ins that get what does not fit."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tqdit.engines.bundle import CALLS_FILE, read_manifest
from tqdit.engines.run.requests import read_embeddings
from tqdit.engines.run.verify import verify_bundle
from tqdit.errors import FileFormatError, UsageError
from tqdit.ports import Port, Signature, check_requests
from tqdit.text import MOST_TOKENS, TextCard, TextEncoder, Tokens

TOKENS = Tokens("tokenizer.json", "ids", "mask", 4, 0, False, False, "", "", "as it is")


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of words, and a graph whose value is its ids; `graph` takes ids up to 7."""
    import onnx
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "a": 1, "red": 2, "far": 900}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    graph = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 20]>
        g (int64[1,4] ids, int64[1,4] mask) => (float[1,4] text)
        <float[8] table = {0, 1, 2, 3, 4, 5, 6, 7}> {
            text = Gather (table, ids)
        }""")
    onnx.save(graph, tmp_path / "graph.onnx")
    return tmp_path


def card(folder, **changes):
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("tokenizer.json", "graph.onnx")
    }
    return replace(TextCard("graph.onnx", (TOKENS,), ("text",), files), **changes)


def test_prompts_become_values(folder):
    found = TextEncoder(folder, card(folder))(["a red", "red"])
    np.testing.assert_array_equal(found["text"], [[1, 2, 0, 0], [2, 0, 0, 0]])


@pytest.mark.parametrize("prompts", ["a red", [], [5], [None], ["a \ud800"], [b"a"]])
def test_what_is_no_prompt_is_refused(folder, prompts):
    with pytest.raises(UsageError, match="prompt"):
        TextEncoder(folder, card(folder))(prompts)


def test_a_token_that_the_graph_does_not_know_is_one_line(folder):
    with pytest.raises(FileFormatError, match=r"graph\.onnx: does not run") as caught:
        TextEncoder(folder, card(folder))(["far"])
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_panics_is_one_line(folder):
    """A pattern that backtracks without end is stopped by the library's regex engine, with a panic of Rust."""
    import json

    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps(content | {"pre_tokenizer": pattern}))
    with pytest.raises(FileFormatError, match=r"tokenizer\.json: its tokenizer fails"):
        TextEncoder(folder, card(folder))([40 * "a" + "b"])


def test_a_graph_that_cannot_be_read_is_one_line(folder):
    (folder / "graph.onnx").write_bytes(b"\x08\x0a nothing")
    with pytest.raises(FileFormatError, match=r"graph\.onnx: cannot be read"):
        TextEncoder(folder, card(folder))


@pytest.mark.parametrize("file", ["../graph.onnx", "/etc/passwd", "other.onnx"])
def test_only_files_with_a_hash_are_opened(folder, file):
    with pytest.raises(ValueError, match="is not among"):
        card(folder, file=file)
    with pytest.raises(ValueError, match="is not among"):
        card(folder, tokens=(replace(TOKENS, file=file),))


@pytest.mark.parametrize("change", [{"length": 0}, {"length": MOST_TOKENS + 1}, {"pad": -1}, {"pad": 2**63}])
def test_numbers_of_tokens_have_bounds(change):
    with pytest.raises(ValueError, match="tokens"):
        replace(TOKENS, **change)


TEXT = Signature(
    (Port("x", "state", "float32", (None, 2)), Port("t", "time", "int64", (None,)),
     Port("text", "request", "float32", (None, 2))), (None, 2), "Net",
)  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_values_that_float32_cannot_hold_are_refused():
    with pytest.raises(UsageError, match="'text' holds NaN or infinite values in float32"):
        check_requests(TEXT, {"text": np.full((1, 2), 1e200)})


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\nfrom tqdit import safetensors_file\nfrom tqdit.files import SAFETENSORS, reading\n"
        "with reading(Path(sys.argv[1]), SAFETENSORS, 'Again.'):\n    safetensors_file.read(Path(sys.argv[1]))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pipe"), "src"], capture_output=True, text=True, timeout=60
    )
    assert "pipe: a pipe or a device, expected a file" in found.stderr
    with pytest.raises(FileFormatError, match="a pipe or a device"):
        read_embeddings(tmp_path / "pipe", TEXT)


@pytest.fixture
def bundle(tmp_path):
    """A toy's engine with golden calls, in a copy; write(**arrays) replaces its calls."""
    import tqdit
    from models.test_recording import KNOBS, Toy, record, rows
    from support import made_once

    def make(place):
        network = Toy()
        calls = record(network, [(rows(4, seed), {}) for seed in range(2)])
        table = tqdit.calibrate(network, rows=calls, output=place / "scales.safetensors", **KNOBS)
        tqdit.export(network, place / "model.onnx", scales=table)
        tqdit.build(place / "model.onnx", backend="onnxruntime")

    return shutil.copytree(made_once("text-files-toy", make) / "model.engine", tmp_path / "model.engine")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda calls: calls.pop("port.x"), "takes 'text', 'x', 'timestep'"),
        (lambda calls: calls.update({"port.x": calls["port.x"][..., :1]}), "'x' is float32"),
        (lambda calls: calls.update({"port.x": calls["port.x"].astype(np.int64)}), "'x' is int64"),
        (lambda calls: calls.update({"port.x": calls["port.x"].astype("U8")}), "golden calls"),
        (lambda calls: calls.update(prediction=calls["prediction"][:, :1]), "predictions"),
    ],
)
def test_golden_calls_that_do_not_fit_are_one_line(bundle, change, found):
    calls = dict(np.load(bundle / CALLS_FILE))
    change(calls)
    np.savez(bundle / CALLS_FILE, **calls)
    with pytest.raises(FileFormatError, match=found):
        verify_bundle(bundle, read_manifest(bundle))


@pytest.mark.parametrize("value", ["x", object(), "meta", "sparse", "complex"])
def test_a_drop_in_names_the_argument_that_is_no_tensor(bundle, value):
    import torch

    from tqdit.engines.run.denoiser import Denoiser
    from tqdit.engines.run.drop_in import DropIn

    denoiser = Denoiser.open(bundle)
    denoiser.card = replace(denoiser.card, config={"in_channels": 4})
    state = denoiser.card.signature.zeros(2)
    given = {name: torch.from_numpy(array) for name, array in state.items()}
    made = {"meta": lambda x: x.to("meta"), "sparse": lambda x: x.to_sparse(), "complex": lambda x: x + 1j}
    given["text"] = made[value](given["text"]) if isinstance(value, str) and value in made else value
    with DropIn(denoiser)._denoiser, pytest.raises(UsageError, match="'text'"):
        DropIn(denoiser)(**given)
