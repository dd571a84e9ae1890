"""The shards of a sampling job on a Ray cluster (docs/sampling-many.md): an engine per worker.

A worker is an actor. It opens the bundle by its path where that path holds the same bundle on its machine, and takes
it from the object store otherwise. It gets one shard at a time and hands the arrays back; the process that started the
job is the only one that writes. A worker that dies gives its shard back to the queue.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdit.console import Console
from tqdit.engines.bundle import MANIFEST, Manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import SamplingJob, ShardFolder
from tqdit.errors import BackendError, SamplingError, TqditError, UsageError
from tqdit.extras import need
from tqdit.files import sha256

if TYPE_CHECKING:
    from tqdm import tqdm

ATTEMPTS = 3  # at a shard, and at opening the engine, before the job ends
LOOK_AROUND = 2.0  # seconds between two looks at the size of the cluster
KNOCKING = 10.0  # seconds that a cluster may take to answer
PATIENCE = 60.0  # seconds without any worker before the user hears of it
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx")
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


@dataclass(frozen=True)
class ClusterConfig:
    """Where a job runs, and on how much of it."""

    address: str | None = None  # None: a cluster of this machine alone, which ends with the job
    workers: int | None = None  # at most; None: as many as the cluster has room for
    batch: int | None = None  # images per engine call
    threads: int | None = None  # CPUs of a worker; None: 1


class Worker:
    """One engine in a process of its own."""

    def __init__(self, batch: int | None, threads: int) -> None:
        self._settings: dict[str, Any] = {"batch": batch, "threads": threads}
        self._sampler: Sampler | None = None

    def open(self, path: str, identity: str) -> bool:
        """Open the bundle at a path of this machine. False: there is none, or another one."""
        manifest = Path(path, MANIFEST)
        if not manifest.is_file() or sha256(manifest) != identity:
            return False
        self._sampler = Sampler.open(path, **self._settings)
        return True

    def receive(self, files: dict[str, bytes]) -> bool:
        """Open a bundle from its content, which the machine keeps only as far as the open engine needs it."""
        with tempfile.TemporaryDirectory(prefix="tqdit-engine-") as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self._sampler = Sampler.open(folder, **self._settings)
        return True

    def make(self, job: SamplingJob, shard: int) -> dict[str, Any]:
        assert self._sampler is not None
        return job.make(self._sampler, shard)


class Cluster:
    """Runs jobs with one bundle on a Ray cluster."""

    def __init__(self, engine: Path, manifest: Manifest, config: ClusterConfig, console: Console) -> None:
        self.ray: Any = need("ray", "ray", "--ray")
        if config.address is not None and Path(config.address).exists():
            raise UsageError(f"--ray took '{config.address}' for its address. Name the engine before --ray.")
        for name, value in (("workers", config.workers), ("threads", config.threads), ("batch", config.batch)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}; it must be at least 1.")
        self.engine = engine.resolve()
        self.manifest = manifest
        self.config = config
        self.console = console

    def work(self, folder: ShardFolder, pending: list[int], bar: tqdm[Any]) -> None:
        """Make and write these shards. Raises SamplingError where one fails `ATTEMPTS` times."""
        self._connect()
        run = _Run(self, folder, pending, bar)
        try:
            run.finish()
        finally:
            run.close()
            self.ray.shutdown()

    def _connect(self) -> None:
        options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
        if self.config.address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours calls home
            options |= {"address": "local", "include_dashboard": False}
        else:
            options["address"] = self.config.address
        try:
            _knock(self.config.address or "")
            self.ray.init(**options)
        except Exception as error:  # ConnectionError, RuntimeError, ValueError and more, by kind of address and release
            where = "on this machine" if self.config.address is None else f"at '{self.config.address}'"
            raise BackendError(f"no Ray cluster {where} ({error}). Start one: ray start --head") from error

    def needs(self) -> dict[str, float]:
        """What a worker takes of the cluster."""
        provider = self.manifest.target.get("provider")
        gpu = self.manifest.backend in GPU_BACKENDS or provider in GPU_PROVIDERS
        return {"CPU": float(self.config.threads or 1)} | ({"GPU": 1.0} if gpu else {})


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at host:port; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), KNOCKING).close()


class _Run:
    """One job: workers that come and go, and the shards that are left."""

    def __init__(self, cluster: Cluster, folder: ShardFolder, pending: list[int], bar: tqdm[Any]) -> None:
        self.cluster, self.folder, self.bar = cluster, folder, bar
        self.ray = cluster.ray
        self.left = deque(pending)
        self.opening: dict[Any, Any] = {}  # reference of a result -> worker
        self.making: dict[Any, tuple[Any, int]] = {}  # reference of a result -> worker, shard
        self.failures: dict[int, int] = {}  # of shards
        self.failed_openings = 0  # since a worker last came up
        self.shipped: Any = None  # reference of the bundle's content
        self.alone_since = time.monotonic()
        needs = cluster.needs()
        self.actor = self.ray.remote(Worker).options(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0))

    def finish(self) -> None:
        while self.left or self.making:
            self._hire()
            references = [*self.opening, *self.making]
            self.ray.wait(references, num_returns=1, timeout=LOOK_AROUND)
            ready, _ = self.ray.wait(references, num_returns=len(references), timeout=0)  # all: none shall starve
            for reference in ready:
                if reference in self.opening:
                    self._opened(reference)
                else:
                    self._made(reference)
            self._tell()

    def close(self) -> None:
        for worker in [*self.opening.values(), *(worker for worker, _ in self.making.values())]:
            self.ray.kill(worker)

    def _hire(self) -> None:
        """Ask for as many workers as there is work and room for; machines may have joined since the last look."""
        wanted = min(self._room(), len(self.left) + len(self.making))
        for _ in range(wanted - len(self.opening) - len(self.making)):
            worker = self.actor.remote(self.cluster.config.batch, self.cluster.config.threads or 1)
            self.opening[worker.open.remote(str(self.cluster.engine), self.folder.job.engine)] = worker

    def _room(self) -> int:
        total = self.ray.cluster_resources()
        room = min(int(total.get(name, 0) // amount) for name, amount in self.cluster.needs().items())
        room = max(room, 1)  # a cluster that grows on demand begins with nothing
        return room if self.cluster.config.workers is None else min(room, self.cluster.config.workers)

    def _opened(self, reference: Any) -> None:
        worker = self.opening.pop(reference)
        try:
            opened = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.failed_openings += 1
            self.ray.kill(worker)
            if self.failed_openings >= ATTEMPTS:
                raise _told(error, "no worker can open the engine") from error
            return
        if opened:
            self.failed_openings = 0
            self._give(worker)
        else:
            if self.shipped is None:
                files = [MANIFEST, *self.cluster.manifest.files]
                self.shipped = self.ray.put({name: (self.cluster.engine / name).read_bytes() for name in files})
            self.opening[worker.receive.remote(self.shipped)] = worker

    def _give(self, worker: Any) -> None:
        """The next shard, or the end."""
        if self.left:
            shard = self.left.popleft()
            self.making[worker.make.remote(self.folder.job, shard)] = worker, shard
        else:
            self.ray.kill(worker)

    def _made(self, reference: Any) -> None:
        worker, shard = self.making.pop(reference)
        try:
            arrays = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.failures[shard] = self.failures.get(shard, 0) + 1
            self.ray.kill(worker)
            if self.failures[shard] >= ATTEMPTS:
                raise _told(error, f"shard {shard} failed {ATTEMPTS} times") from error
            self.left.appendleft(shard)
            return
        self._give(worker)  # first, so that it works while this process writes
        self.folder.add(shard, arrays)
        self.bar.update(len(self.folder.job.images(shard)))

    def _tell(self) -> None:
        """The number of workers beside the bar, and a line where none comes."""
        self.bar.set_postfix_str(f"{len(self.making)} workers")
        now = time.monotonic()
        if self.making:
            self.alone_since = now
        elif now - self.alone_since > PATIENCE:
            self.alone_since = now
            needs = ", ".join(f"{amount:g} {name}" for name, amount in self.cluster.needs().items())
            free = ", ".join(f"{self.ray.available_resources().get(name, 0):g} {name}" for name in ("CPU", "GPU"))
            self.cluster.console.say(f"waiting for a worker: it needs {needs}; the cluster has {free} free")


def _told(error: Any, what: str) -> TqditError:
    """One line for what happened on another machine."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TqditError):
        return cause
    if isinstance(cause, ModuleNotFoundError) or "No module named 'tqdit'" in str(error):
        return BackendError(
            f"{what}: tqdit is missing on a worker's machine. Install it there with the backend's extra."
        )
    reason = str(cause or error).strip().splitlines()
    return SamplingError(f"{what} ({reason[-1] if reason else type(error).__name__}). Run the same command again.")
