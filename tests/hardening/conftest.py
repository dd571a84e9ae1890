"""Shared by the tests: small inputs of every kind, commands in forked children, and checks of how they end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import support
from hardening.damage import CAUSED
from tables import Kind, make_table
from tqdit.cli.main import main
from tqdit.engines.build.engine import build_engine
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.models.dit import DiT, randomize
from tqdit.quantization.table import write_scale_table

TIME_LIMIT = 120  # seconds; a command that takes longer hangs


@dataclass
class Outcome:
    """How a command ended."""

    code: int  # minus the signal where one killed it
    err: str
    out: str = ""  # of commands in this process

    @property
    def lines(self):
        return self.err.splitlines()

    def check_refusal(self):
        """One line and exit code 1, or 2 where it is the command line's fault: nothing else is a clean refusal."""
        assert self.code in (1, 2), (self.code, self.err)
        assert len(self.lines) == 1, self.err
        assert self.lines[0].startswith("tqdit"), self.err
        assert "Traceback" not in self.err

    def check_answer(self):
        """A refusal, or success."""
        if self.code:
            self.check_refusal()
        assert "Traceback" not in self.err


class Commands:
    """Commands in children of a process that has imported everything."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, *argv, limit=None, stdout=None, user=None):
        """Begin a command and return its process id."""
        CAUSED["full disks"] += limit is not None or stdout is not None
        CAUSED["folders of other users"] += user is not None
        job = {"argv": list(map(str, argv)), "limit": limit, "stdout": stdout, "user": user, "log": str(self.log)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def end(self):
        """Wait for the command."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        watch = threading.Timer(TIME_LIMIT, os.kill, (self.pid, signal.SIGKILL))  # which no verdict allows
        watch.start()
        status = int(self.process.stdout.readline())
        watch.cancel()
        return Outcome(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))

    def run(self, *argv, kill_after=None, **options):
        """Run a command, and kill it after so many seconds."""
        pid = self.start(*argv, **options)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # a zombie at worst: it is reaped by `end`
        outcome = self.end()
        CAUSED["kill -9"] += outcome.code == -signal.SIGKILL
        return outcome

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=TIME_LIMIT)
        self.process.stdout.close()


def pytest_terminal_summary(terminalreporter):
    if +CAUSED:
        terminalreporter.write_line(
            "failures caused: " + ", ".join(f"{count} {kind}" for kind, count in sorted((+CAUSED).items()))
        )


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    commands = Commands(folder / "stderr")
    yield commands
    commands.close()


@pytest.fixture
def run(capfd):
    """run(verb, ...) -> Outcome, in this process."""

    def run(*argv):
        capfd.readouterr()
        code = main(list(map(str, argv)))
        said = capfd.readouterr()
        return Outcome(code, said.err, said.out)

    return run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """One good file of each kind, of a tiny model."""
    folder = tmp_path_factory.mktemp("inputs")
    model = support.tiny_model(pixels=True)
    table = make_table(model, Kind(groups=2))
    write_scale_table(folder / "scales.safetensors", table)
    write(folder / "model.onnx", *support.exported(ExportConfig(), pixels=True, table=table))
    build_engine(folder / "model.onnx", folder / "model.engine")
    network = randomize(DiT(support.TINY), scale=0.2).eval()
    torch.save({"ema": network.state_dict()}, folder / "zip.pt")
    torch.save(network.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(network.state_dict(), folder / "dit.safetensors")
    (folder / "dit.json").write_text('{"heads": 2, "num_classes": 5}')
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.arange(4))
    assert main(["sample", str(folder / "model.engine"), "-n", "5", "--shard-size", "2", "-q", "-o",
                     str(folder / "shards")]) == 0  # fmt: skip
    return folder
