"""The application on Ray Serve: replicas on the machines of a cluster, each with engines of its own.

Ray's proxies listen on every machine and send each request to one replica. What a later request asks for, a job or an
image by its address, could reach another replica, so neither is offered.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdit.bounds import check_count
from tqdit.console import Console
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.ray_workers import check_address, connect, requirements
from tqdit.errors import BackendError, first_line
from tqdit.extras import need
from tqdit.serve.app import make_app
from tqdit.serve.engines import kind_of_engine
from tqdit.serve.settings import Settings

NAME = "tqdit"
MOST_REPLICAS = 10_000
LISTEN_S = 5.0  # for a proxy to take a connection
USUAL_BATCH = 16  # images that an engine makes at once, before one is opened
INSTALL = "Ray Serve is not installed ({}). Run: pip install 'ray[serve]'"


@dataclass(frozen=True)
class Replicas:
    """The cluster and how much of it is used. Raises UsageError for impossible numbers, and an address that is none."""

    address: str | None = None  # None: start a cluster on this machine that ends with the server
    least: int = 1
    most: int | None = None  # with more than `least`, Ray adds and removes replicas by the number of requests

    def __post_init__(self) -> None:
        check_address(self.address)
        check_count("--replicas", self.least, 1, MOST_REPLICAS)
        if self.most is not None:
            check_count("--max-replicas", self.most, self.least, MOST_REPLICAS)


class RayServer:
    """The application of some bundles, from `deploy` to `close`. A bundle has the same path on every machine."""

    def __init__(
        self, engines: Mapping[str, Path], settings: Settings, replicas: Replicas, host: str, port: int
    ) -> None:
        """Joins the cluster. Raises TqditError for what cannot be served, or if there is no cluster."""
        self._ray: Any = need("ray", "ray", "tqdit-serve --ray")
        try:
            from ray import serve
        except ImportError as error:
            raise BackendError(INSTALL.format(first_line(error))) from error
        self._serve: Any = serve
        paths = {name: str(path.resolve()) for name, path in engines.items()}
        manifests = {name: read_manifest(Path(path)) for name, path in paths.items()}
        for name, manifest in manifests.items():
            kind_of_engine(Path(paths[name]), manifest)
        settings = replace(settings, keeps_jobs=False)

        def build() -> Any:  # in each replica; Ray Serve takes a function alone for this
            return make_app(paths, settings)

        resources = [requirements(manifest, settings.threads) for manifest in manifests.values()]
        at_once = (settings.batch or USUAL_BATCH) * len(paths)
        options: dict[str, Any] = {"num_replicas": replicas.least}
        if replicas.most is not None and replicas.most > replicas.least:
            bounds = {"min_replicas": replicas.least, "max_replicas": replicas.most}
            options = {"autoscaling_config": bounds | {"target_ongoing_requests": at_once}}
        self._deployment = self._serve.deployment(
            serve.ingress(build)(),
            # more than find places, so that a replica refuses by itself and its deadlines run
            name=NAME, max_ongoing_requests=settings.connections, max_queued_requests=settings.connections,
            ray_actor_options={
                "num_cpus": sum(each["CPU"] for each in resources),
                "num_gpus": sum(each.get("GPU", 0) for each in resources),
            },
            graceful_shutdown_timeout_s=settings.shutdown_s, **options,
        )  # fmt: skip
        self._http: dict[str, Any] = {"host": host, "port": port}
        self._is_deployed = False
        connect(self._ray, replicas.address)

    def deploy(self) -> None:
        """Returns when the replicas answer. Raises BackendError if they do not."""
        try:
            self._serve.start(http_options=self._http, proxy_location="EveryNode")
            taken = NAME in self._serve.status().applications
            if not taken:
                self._serve.run(self._deployment.bind(), name=NAME, route_prefix="/")
                self._is_deployed = True
        except Exception as error:  # of any kind
            raise BackendError(f"Ray Serve could not deploy the engines ({first_line(error)}).") from error
        if taken:
            raise BackendError(f"this cluster serves {NAME} already. End that server first, or pass all engines to it.")
        try:
            socket.create_connection((self._http["host"], self._http["port"]), LISTEN_S).close()
        except OSError as error:
            raise BackendError(
                f"Ray Serve does not listen on {self._http['host']}:{self._http['port']}; it was started before, with "
                "another --host or --port. Pass that one."
            ) from error

    def close(self) -> None:
        """Finish the requests in work, remove the deployment, and leave the cluster."""
        try:
            if self._is_deployed:
                self._serve.delete(NAME)
        finally:
            self._ray.shutdown()


def serve_on_ray(
    engines: Mapping[str, Path], settings: Settings, replicas: Replicas, host: str, port: int, console: Console
) -> None:
    """Deploy, and wait for SIGTERM or Ctrl-C."""
    server = RayServer(engines, settings, replicas, host, port)
    try:
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own handlers
            signal.signal(number, lambda *_: ended.set())
        server.deploy()
        console.say(f"http://{host}:{port}, on every machine of the cluster that has a replica")
        ended.wait()
    finally:
        server.close()
