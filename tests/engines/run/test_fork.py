"""A fork of a process with open engines: refused in one line, ends by itself, and may open its own."""

import subprocess
import sys

import pytest

from tqdit.engines.build.engine import build_engine
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import BackendError

FORKS = """
import asyncio, os, sys, time
from concurrent import futures
from tqdit import Denoiser, Sampler, StepBatcher

path = sys.argv[1]
sampler, batcher, denoise = Sampler.open(path, threads=2), StepBatcher(path, threads=2), Denoiser.open(path, threads=2)
expected = sampler.sample([0], seed=7)
ports = denoise.card.signature.zeros(1)
denoise(**ports)
done = batcher.submit(0, seed=7, steps=2)
picture = done.result(60)

async def awaited():
    return await asyncio.wrap_future(running[2])

running = [batcher.submit(label, seed=7) for label in (0, 1, 2)]
for lock in (batcher._changed, running[2]._condition):
    lock.acquire()  # as a thread that the fork does not have
child = os.fork()
if child:
    for lock in (batcher._changed, running[2]._condition):
        lock.release()
else:
    for use in (
        lambda: sampler.sample([0]), lambda: batcher.submit(0), batcher.stats, lambda: denoise(**ports),
        running[2].result, lambda: asyncio.run(awaited()), lambda: next(futures.as_completed(running[2:])).result(),
    ):
        try:
            use()
        except Exception as error:
            print(type(error).__name__, str(error).replace(str(os.getppid()), "PARENT"), flush=True)
    waited = futures.wait(running).done == {*running} and not any(future.cancel() for future in running)
    print("left", waited, (done.result() == picture).all(), flush=True)
    batcher.close()
    sampler.close()
    if sys.argv[2] == "onnxruntime":  # a lock of OpenVINO may be held by a call that the fork interrupted
        with Sampler.open(path, threads=2) as own:
            print("own", (own.sample([0], seed=7) == expected).all(), flush=True)
    sys.exit(0)  # frees what is still open
until = time.monotonic() + 60
while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
    time.sleep(0.05)
if ended[0] == 0:
    os.kill(child, 9)
print("child", "hangs" if ended[0] == 0 else ended[1])
print("parent", (sampler.sample([0], seed=7) == expected).all(), (running[0].result(60) == expected[0]).all())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_fork_is_refused_and_ends_and_its_parent_continues(quantized, tmp_path, backend):
    build_engine(quantized, tmp_path / "model.engine", backend)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, str(tmp_path / "model.engine"), backend],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    if backend == "onnxruntime":
        assert lines.pop(-3) == "own True"
    *refusals, left, child, parent = lines
    assert len(refusals) == 7
    assert all(line.startswith("BackendError ") and "process PARENT" in line for line in refusals), refusals
    assert all("after the fork" in line for line in refusals)
    assert (left, child, parent) == ("left True True", "child 0", "parent True True")


def test_the_refusal_names_both_processes(bundle, monkeypatch):
    with Sampler.open(bundle) as sampler:
        monkeypatch.setattr("os.getpid", lambda: 12345)
        with pytest.raises(BackendError, match=r"belongs to process \d+ .* in process 12345"):
            sampler.sample([0])
        monkeypatch.undo()
        assert sampler.sample([0], steps=2).shape == (1, 8, 8, 3)
