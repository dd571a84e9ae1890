"""Sampling jobs on a Ray cluster (docs/sampling-many.md).

A worker is a Ray actor with an engine of its own. It opens the bundle by its path if that path holds the same bundle on
its machine; otherwise it receives the files through the object store. It makes one shard at a time and returns the
arrays; only the process that started the job writes files. If a worker dies, another one makes its shard.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdit.console import Bar, Console
from tqdit.engines.bundle import MANIFEST, Manifest
from tqdit.engines.run.requests import Prompts
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import SamplingJob, ShardFolder
from tqdit.errors import BackendError, SamplingError, TqditError, UsageError
from tqdit.extras import need
from tqdit.files import sha256

ATTEMPTS = 3  # failures of one shard, or consecutive failures to open the engine, that end the job
POLL_INTERVAL_S = 2.0  # between two checks of the cluster's size
CONNECT_TIMEOUT_S = 10.0
NO_WORKER_NOTICE_S = 60.0  # without any worker before a message says so
GPU_BACKENDS = ("tensorrt", "tensorrt-rtx")
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


@dataclass(frozen=True)
class ClusterConfig:
    """The cluster of a job, and how much of it the job uses."""

    address: str | None = None  # None: start a cluster on this machine that ends with the job
    workers: int | None = None  # at most; None: as many as the cluster has room for
    batch: int | None = None  # images per engine call
    threads: int | None = None  # CPUs of a worker; None: 1


class Worker:
    """One engine in a process of its own."""

    def __init__(self, batch: int | None, threads: int) -> None:
        self._settings: dict[str, Any] = {"batch": batch, "threads": threads}
        self._sampler: Sampler | None = None

    def open(self, path: str, identity: str) -> bool:
        """Open the bundle at a path of this machine. False if there is none or a different one."""
        manifest = Path(path, MANIFEST)
        if not manifest.is_file() or sha256(manifest) != identity:
            return False
        self._sampler = Sampler.open(path, **self._settings)
        return True

    def receive(self, files: dict[str, bytes]) -> bool:
        """Open a bundle from the content of its files. They are removed when the engine is open."""
        with tempfile.TemporaryDirectory(prefix="tqdit-engine-") as folder:
            for name, content in files.items():
                Path(folder, name).parent.mkdir(exist_ok=True)  # a forecast lies in a folder of its own
                Path(folder, name).write_bytes(content)
            self._sampler = Sampler.open(folder, **self._settings)
        return True

    def make(self, job: SamplingJob, shard: int, prompts: Prompts | None) -> dict[str, Any]:
        assert self._sampler is not None
        return job.make(self._sampler, shard, prompts=prompts)


class Cluster:
    """Runs jobs with one bundle on a Ray cluster."""

    def __init__(
        self, engine: Path, manifest: Manifest, config: ClusterConfig, console: Console, prompts: Prompts | None = None
    ) -> None:
        self.ray: Any = need("ray", "ray", "--ray")
        check_address(config.address)
        for name, value in (("workers", config.workers), ("threads", config.threads), ("batch", config.batch)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}; it must be at least 1.")
        self.engine = engine.resolve()
        self.manifest = manifest
        self.config = config
        self.console = console
        self.prompts = prompts

    @cached_property
    def requirements(self) -> dict[str, float]:
        """The resources of one worker."""
        return requirements(self.manifest, self.config.threads)

    def work(self, folder: ShardFolder, pending: list[int], bar: Bar) -> None:
        """Make and write these shards. Raises SamplingError if one fails `ATTEMPTS` times."""
        connect(self.ray, self.config.address)
        run = _Run(self, folder, pending, bar)
        try:
            run.finish()
        finally:
            run.close()
            self.ray.shutdown()


def check_address(address: str | None) -> None:
    """Raise UsageError for an engine, or NAME=ENGINE, that stands where --ray expects an address."""
    if address is not None and Path(address.rpartition("=")[2]).exists():
        raise UsageError(f"--ray took '{address}' for its address. Name the engine before --ray.")


def connect(ray: Any, address: str | None) -> None:
    """Join the cluster at an address, or start one on this machine. Raises BackendError if there is none."""
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send usage data over the network
        options |= {"address": "local", "include_dashboard": False}
    else:
        options["address"] = address
    try:
        _check_reachable(address or "")
        ray.init(**options)
    except Exception as error:  # the class depends on the address and the release of Ray
        where = "on this machine" if address is None else f"at '{address}'"
        raise BackendError(f"no Ray cluster {where} ({error}). Start one: ray start --head") from error


def requirements(manifest: Manifest, threads: int | None) -> dict[str, float]:
    """The resources that one engine takes."""
    gpu = manifest.backend in GPU_BACKENDS or manifest.target.get("provider") in GPU_PROVIDERS
    return {"CPU": float(threads or 1)} | ({"GPU": 1.0} if gpu else {})


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()


class _Run:
    """One job: its workers and the shards that are not finished."""

    def __init__(self, cluster: Cluster, folder: ShardFolder, pending: list[int], bar: Bar) -> None:
        self.cluster, self.folder, self.bar = cluster, folder, bar
        self.ray = cluster.ray
        self.unassigned = deque(pending)
        self.calls: dict[Any, tuple[Any, int | None]] = {}  # reference of a result -> worker, shard; None: it opens
        self.failures: Counter[int | None] = Counter()  # by shard; None: of openings since one succeeded
        self.last_running = time.monotonic()
        required = cluster.requirements
        self.actor = self.ray.remote(Worker).options(num_cpus=required["CPU"], num_gpus=required.get("GPU", 0))

    @property
    def running(self) -> int:
        """Workers that make a shard."""
        return sum(shard is not None for _, shard in self.calls.values())

    @cached_property
    def bundle(self) -> Any:
        """Reference of the content of the bundle's files, for workers that do not find it at its path."""
        files = [MANIFEST, *self.cluster.manifest.files]
        return self.ray.put({name: (self.cluster.engine / name).read_bytes() for name in files})

    @cached_property
    def prompts(self) -> Any:
        """Reference of the prompts' request values, so that no worker reads their file."""
        return self.ray.put(self.cluster.prompts)

    def finish(self) -> None:
        while self.unassigned or self.running:
            self._start_workers()
            ready, _ = self.ray.wait([*self.calls], timeout=POLL_INTERVAL_S)
            for reference in ready:
                self._returned(reference, *self.calls.pop(reference))
            self._report()

    def close(self) -> None:
        for worker, _ in self.calls.values():
            self.ray.kill(worker)

    def _start_workers(self) -> None:
        """Start as many workers as there is work and room for; machines may have joined since the last call."""
        wanted = min(self._capacity(), len(self.unassigned) + self.running)
        for _ in range(wanted - len(self.calls)):
            worker = self.actor.remote(self.cluster.config.batch, self.cluster.config.threads or 1)
            self.calls[worker.open.remote(str(self.cluster.engine), self.folder.job.engine)] = worker, None

    def _capacity(self) -> int:
        """The number of workers that the cluster has room for, at least 1: an autoscaling cluster may start empty."""
        total = self.ray.cluster_resources()
        room = max(
            1,
            min(int(total.get(name, 0) // amount) for name, amount in self.cluster.requirements.items()),
        )
        return room if self.cluster.config.workers is None else min(room, self.cluster.config.workers)

    def _returned(self, reference: Any, worker: Any, shard: int | None) -> None:
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.ray.kill(worker)
            self.failures[shard] += 1
            if self.failures[shard] >= ATTEMPTS:
                what = "no worker can open the engine" if shard is None else f"shard {shard} failed {ATTEMPTS} times"
                raise _failure(error, what) from error
            if shard is not None:
                self.unassigned.appendleft(shard)
            return
        if shard is not None:
            self._assign(worker)  # before the write, so that the worker does not wait for it
            self.folder.add(shard, result)
            self.bar.update(len(self.folder.job.images(shard)))
        elif result:
            self.failures[None] = 0
            self._assign(worker)
        else:
            self.calls[worker.receive.remote(self.bundle)] = worker, None

    def _assign(self, worker: Any) -> None:
        """Give a worker the next shard, or end it if there is none."""
        if self.unassigned:
            shard = self.unassigned.popleft()
            self.calls[worker.make.remote(self.folder.job, shard, self.prompts)] = worker, shard
        else:
            self.ray.kill(worker)

    def _report(self) -> None:
        """Show the number of workers; say so if there has been none for a while."""
        self.bar.set_postfix_str(f"{self.running} workers")
        now = time.monotonic()
        if self.running:
            self.last_running = now
        elif now - self.last_running > NO_WORKER_NOTICE_S:
            self.last_running = now
            required = ", ".join(f"{amount:g} {name}" for name, amount in self.cluster.requirements.items())
            free = ", ".join(f"{self.ray.available_resources().get(name, 0):g} {name}" for name in ("CPU", "GPU"))
            self.cluster.console.say(f"waiting for a worker: it needs {required}; the cluster has {free} free")


def _failure(error: Any, what: str) -> TqditError:
    """The error of a worker as one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TqditError):
        return cause
    if isinstance(cause, ModuleNotFoundError) or "No module named 'tqdit'" in str(error):
        return BackendError(
            f"{what}: tqdit is missing on a worker's machine. Install it there with the backend's extra."
        )
    reason = str(cause or error).strip().splitlines()
    return SamplingError(f"{what} ({reason[-1] if reason else type(error).__name__}). Run the same command again.")
