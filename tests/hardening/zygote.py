"""Runs commands of ours in forked children: everything is imported once, so that a kill costs no start.

A line of JSON on stdin, {"argv": [...], "limit": bytes or null, "stdout": path or null, "user": id or null}, starts a
command; the answer is a line with its process id. After another line, and the command's end, comes its wait status.
No thread may exist here, since a fork takes none of them along.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

import tqdit.calibration.flow
import tqdit.engines.backends.onnxruntime.build
import tqdit.engines.backends.onnxruntime.run
import tqdit.engines.build.fastest
import tqdit.exporter
import tqdit.lint
import tqdit.models  # noqa: F401
from tqdit.cli.main import main

torch.set_num_threads(1)


def child(job, log):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.close()
    os.dup2(log, 2)
    os.dup2(os.open(job["stdout"] or os.devnull, os.O_WRONLY), 1)
    if job["limit"] is not None:
        sys.dont_write_bytecode = True  # of a module that is imported here, half would stay for everybody
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    if job["user"] is not None:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    try:
        code = main(job["argv"])
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    os._exit(code)


def answer(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


for line in sys.stdin:
    job = json.loads(line)
    reader, log = os.pipe()  # which no limit of file sizes concerns
    pid = os.fork()
    if pid == 0:
        child(job, log)
    os.close(log)
    answer(pid)
    sys.stdin.readline()  # the child stays a zombie until then, so that a late kill meets nobody else
    with os.fdopen(reader, "rb") as said:
        Path(job["log"]).write_bytes(said.read())
    answer(os.waitpid(pid, 0)[1])
