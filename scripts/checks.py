#!/usr/bin/env python3
"""What each command refuses, in the order in which it looks, and how soon: the table of docs/checks.md.

    scripts/checks.py        makes the demo model's engine in a temporary folder, then prints the table

Times are those of the whole command in a process that has imported its libraries, the fastest of three runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tqdit.cli.main import main

RUNS = 3
LONG = "x" * 300


@dataclass(frozen=True)
class Check:
    """A mistake in an otherwise right command line."""

    what: str  # that is looked at
    argv: tuple[str, ...]
    says: str  # a part of the refusal
    code: int = 2


def check(what: str, argv: str, says: str, code: int = 2) -> Check:
    return Check(what, tuple(argv.split()), says, code)


# Per command in the order of its checks. Words in brackets say what had to be done before a check.
CHECKS = {
    "calibrate": (
        check("diagnosis", "--from-diagnosis nothing.json", "no such file"),
        check("numbers", "--groups 0", "--groups is 0"),
        check("guidance scale", "--guidance-scale nan", "--guidance-scale is nan"),
        check("place of the output", f"-o {LONG}", "File name too long", 1),
        check("output", "-o photo.png", "not a scale table", 1),
        check("one source of rows", "--rows photo.png --prompts nothing.txt", "each say where rows come from"),
        check("prompts", "--prompts nothing.txt", "nothing.txt", 1),
        check("settings of a pipeline's call", "--height 64", "--height"),
        check("recorded calls", "--rows photo.png", "photo.png", 1),
        check("data", "--data claims.npz", "claims 6144000000000 bytes", 1),
        check("model", "evil.pt", "not a PyTorch checkpoint", 1),
        check("shape of the model (loaded)", "--heads 5", "cannot be split into 5 heads", 1),
    ),
    "export": (
        check("name", "photo.png", "ends in .onnx"),
        check("place of the output", f"{LONG}.onnx", "File name too long", 1),
        check("output", "theirs.onnx --force", "was not written by tqdit", 1),
        check("numbers", "m.onnx --steps 0", "steps is 0"),
        check("decoder", "m.onnx --vae nothing", "no config.json in it", 1),
        check("scale table", "m.onnx --scales photo.png", "not a safetensors file", 1),
        check("text encoders", "m.onnx --float --text", "has no text encoders"),
        check("model", "m.onnx --float --model evil.pt", "not a PyTorch checkpoint", 1),
        check("sampler of the model (loaded)", "m.onnx --float --sampler euler", "'euler'"),
    ),
    "build": (
        check("place of the output", "-o /dev/null", "something other than a file", 1),
        check("output", "-o home --force", "tqdit removes only what it wrote", 1),
        check("numbers", "--workspace nan", "--workspace is nan"),
        check("model", "--backend onnxruntime evil.pt", "not an ONNX file", 1),
        check("precision of the model (parsed)", "--backend onnxruntime --precision int8", "holds a float graph"),
        check("options of the backend", "--backend onnxruntime --workspace 10", "no meaning for onnxruntime"),
    ),
    "sample": (
        check("place of the output", "-o -", "not the standard output", 1),
        check("numbers", "-n 0", "-n is 0"),
        check("frames per second", "--fps 0", "--fps is 0"),
        check("kind of output", "--shard-size 5 -o s.png", "belongs to a folder"),
        check("file of noise", "--save-noise theirs.onnx", "ends in .safetensors"),
        check("engine", "home", "not an engine bundle", 1),
        check("batch", "--batch 1000000000", "batch is 1000000000"),
        check("one thing to show", "--prompt red --classes 1", "each say what the images show"),
        check("prompts", "--prompts nothing.txt", "nothing.txt", 1),
        check("prompt", "--prompt red", "--classes"),
        check("embeddings", "--embeddings photo.png", "photo.png", 1),
        check("guidance scale", "--guidance-scale 1e38", "guidance scale is 1e+38"),
        check("memory", "-n 1000000000000", "of memory are needed"),
        check("output", "-n 2 -o home", "tqdit removes only what it wrote", 1),
        check("number of shards", "-n 1000000000000 -o s", "shards, a folder holds at most"),
        check("disk", "-n 100000000000 --shard-size 1000000 -o s", "the disk has", 1),
        check("size of the noise", "--save-noise n.safetensors -n 10000 --steps 1000", "expected at most 1 GB"),
        check("parts of the engine", "damaged.engine", "truncated or altered", 1),
    ),
    "serve": (
        check("processes", "--workers 2", "--workers is 2"),
        check("port", "--port 70000", "--port is 70000"),
        check("numbers", "--queue -1", "queue is -1"),
        check("origins", "--cors-origin example.org", "origin 'example.org'"),
        check("replicas", "--replicas 2", "belong to --ray"),
        check("names of engines", "model.engine other/model.engine", "two engines are named 'model'"),
        check("address", "--port 0 --host 192.0.2.1", "192.0.2.1", 1),
        check("engine", "home --port 0", "not an engine bundle", 1),
        check("parts of the engine", "damaged.engine --port 0", "truncated or altered", 1),
    ),
    "evaluate": (
        check("numbers", "--bootstrap 1000000000000", "--bootstrap is 1000000000000"),
        check("place of the output", f"-o {LONG}.json", "File name too long", 1),
        check("engine", "nothing.engine", "no such engine", 1),
        check("guidance scale", "--guidance-scale nan", "guidance scale is nan"),
        check("memory", "-n 1000000000000", "of memory are needed"),
        check("scale table", "--scales photo.png", "not a safetensors file", 1),
        check("weights of LPIPS", "--lpips-weights evil.pt evil.pt", "not a PyTorch checkpoint", 1),
        check("weights of Inception", "--inception-weights evil.pt", "not a PyTorch checkpoint", 1),
        check("reference", "--reference claims.npz", "claims 6144000000000 bytes", 1),
        check("parts of the engine", "damaged.engine --reference few.npz", "truncated or altered", 1),
        check("metrics of so many images (reference extracted)", "--reference few.npz --metrics precision -n 3",
              "needs more than 3 images"),
    ),
    "doctor": (
        check("model", "--prove nothing.onnx", "no such file"),
        check("place of the report", f"--report {LONG}", "File name too long", 1),
    ),
    "inspect": (
        check("file", "nothing.onnx", "no such file"),
        check("kind", "photo.png", "unknown kind"),
        check("place of the picture", f"scales.safetensors --plot {LONG}.png", "File name too long", 1),
        check("header", "claims.npz", "claims 6144000000000 bytes", 1),
    ),
}  # fmt: skip


def make_inputs(folder: Path) -> None:
    """The files that the command lines name, beside `model.engine` and `model.onnx`."""
    for name in ("photo.png", "evil.pt", "theirs.onnx"):
        (folder / name).write_text("Dear diary, today I trained a model.\n")
    (folder / "home" / ".git").mkdir(parents=True)
    header = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": (8 * 10**9, 16, 16, 3)}
    np.lib.format.write_array_header_1_0(header, facts)
    with zipfile.ZipFile(folder / "claims.npz", "w") as archive:
        for name in ("arr_0.npy", "arr_1.npy"):
            archive.writestr(name, header.getvalue() + bytes(3000))
    np.savez(folder / "few.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    damaged = folder / "damaged.engine"
    damaged.mkdir()
    for part in (folder / "model.engine").iterdir():
        content = part.read_bytes()
        (damaged / part.name).write_bytes(content if part.suffix == ".json" else content[:-1])


def refuse(verb: str, one: Check) -> tuple[int, str, float]:
    """(exit code, stderr, seconds) of a command line."""
    err = io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = main([verb, *one.argv, "-q"])
    return code, err.getvalue().strip(), time.perf_counter() - started


def table() -> str:
    """Markdown, of the files in the current folder."""
    lines = []
    for verb, checks in CHECKS.items():
        lines += ["", f"## tqdit-{verb}", "", "| it looks at | refused, for example | after |", "|---|---|---|"]
        for one in checks:
            found = [refuse(verb, one) for _ in range(RUNS)]
            assert all(one.says in line and code == one.code for code, line, _ in found), (one, found[0])
            example = " ".join(f"{part[:6]}..." if len(part) > 100 else part for part in one.argv)
            lines.append(f"| {one.what} | `{example}` | {1000 * min(seconds for *_, seconds in found):,.0f} ms |")
    return "\n".join(lines)


def run() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["export", "model.onnx", "--float", "-q"]) == 0
            assert main(["build", "--backend", "onnxruntime", "-q"]) == 0
        make_inputs(Path(name))
        print(table())


if __name__ == "__main__":
    run()
