"""`tqdit-serve model.engine ...`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from ipaddress import ip_address
from pathlib import Path

from tqdit.console import Console
from tqdit.engines.gpu import GpuShare
from tqdit.errors import OutputError, UsageError, first_line
from tqdit.serve.app import make_app
from tqdit.serve.server import Server
from tqdit.serve.service import Service
from tqdit.serve.settings import Settings

KEY = "TQDIT_API_KEY"  # environment variable
LOCAL = ("localhost", "127.0.0.1", "[::1]")

SUMMARY = "serve engine bundles over HTTP, with a page to try them"
EXAMPLES = """\
examples:
  tqdit-serve                                    model.engine on http://127.0.0.1:8000
  tqdit-serve digits=demo.engine text.engine     two models, named 'digits' and 'text'
  TQDIT_API_KEY=... tqdit-serve --host 0.0.0.0   for other machines, with a key
  tqdit-serve --queue 256 --deadline 60          how long a client may wait

  tqdit-serve /shared/demo.engine --ray auto --max-replicas 8    on a Ray cluster

  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "3"}'

One process serves all engines; requests that arrive at different times share engine calls. For another GPU or machine
start another process behind a proxy, or use --ray."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    add = parser.add_argument
    add("engines", nargs="*", default=["model.engine"], metavar="[NAME=]ENGINE", help="folder that tqdit-build wrote; "
        "its name without '.engine' is the model's, unless another is given (default: model.engine)")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, for this machine alone)")
    add("--port", type=int, default=8000, help="default: %(default)s; 0: any that is free")
    add("--batch", type=int, help="images per engine call at most (default: 16, or fewer if the engine was built for "
        "fewer)")  # fmt: skip
    add("--threads", type=int, help="CPU threads of each engine (default: the backend's choice)")
    add("--device", type=int, metavar="N", help="index of the GPU of every engine (default: the current one)")
    add("--weight-budget", type=float, metavar="MIB", help="weights of each engine on the GPU at most; all were "
        "built with --weight-streaming (default: all)")  # fmt: skip
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--queue", type=int, default=defaults.queue, metavar="N", help="images of an engine that may wait; more are "
        "answered with 429 (default: %(default)s)")  # fmt: skip
    add("--deadline", type=float, default=defaults.deadline_s, metavar="S", help="seconds until an unfinished request "
        "is answered with 504 (default: %(default)g)")  # fmt: skip
    add("--most-images", type=int, default=defaults.most_images, metavar="N", help="images of one request (default: "
        "%(default)s)")  # fmt: skip
    add("--most-previews", type=int, default=defaults.most_previews, metavar="N", help="previews of one image; each "
        "costs a latent model a decoding (default: %(default)s)")  # fmt: skip
    add("--shutdown-seconds", type=float, default=defaults.shutdown_s, metavar="S", help="for images in work when the "
        "server is told to end (default: %(default)g)")  # fmt: skip
    add("--cors-origin", action="append", default=[], metavar="ORIGIN", help="let web pages of this origin call, such "
        "as https://example.org; may be given several times (default: none)")  # fmt: skip
    cluster = parser.add_argument_group("many machines")
    add = cluster.add_argument
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="deploy on Ray Serve: on the cluster at ADDRESS ('auto': "
        "the one of this machine), or on one that is started here and ends with the command")  # fmt: skip
    add("--replicas", type=int, metavar="N", help="replicas, each with engines of its own (default: 1)")
    add("--max-replicas", type=int, metavar="N", help="let Ray add replicas up to N while there are more requests than "
        "one takes at once, and remove them again")  # fmt: skip
    add = limits.add_argument
    add("--workers", type=int, default=1, metavar="N", help="only 1: jobs and batches are those of one process")


def run(args: argparse.Namespace, console: Console) -> None:
    _check_one_process(args.workers)
    if not 0 <= args.port <= 65535:
        raise UsageError(f"--port is {args.port}; expected 0 to 65535.")
    key, is_local = os.environ.get(KEY), _is_loopback(args.host)
    hosts = {*LOCAL, args.host.lower()} if is_local and key is None and args.ray is None else ()
    settings = Settings(
        batch=args.batch, threads=args.threads, device=GpuShare.with_budget(args.device, args.weight_budget),
        queue=args.queue, deadline_s=args.deadline, most_images=args.most_images,
        most_previews=args.most_previews, shutdown_s=args.shutdown_seconds,
        cors_origins=tuple(args.cors_origin), api_key=key, hosts=tuple(sorted(hosts)),
    )  # fmt: skip
    if args.ray is None and (args.replicas, args.max_replicas) != (None, None):
        raise UsageError("--replicas and --max-replicas belong to --ray.")
    if args.ray is not None and args.device is not None:
        raise UsageError("--device: Ray chooses the GPU of each replica. Leave it out.")
    if args.ray is not None and args.port == 0:
        raise UsageError("--port is 0; with --ray expected 1 to 65535, the same on every machine of the cluster.")
    engines = _by_name(args.engines)
    if key is None and not is_local:
        console.say(f"warning: other machines can use this server without a key; {KEY} sets one")
    if args.ray is None:
        _serve_here(engines, settings, args.host, args.port, console)
    else:
        from tqdit.serve.on_ray import Replicas, serve_on_ray

        replicas = Replicas(args.ray or None, 1 if args.replicas is None else args.replicas, args.max_replicas)
        serve_on_ray(engines, settings, replicas, args.host, args.port, console)
    console.say("ended")


def _serve_here(engines: dict[str, Path], settings: Settings, host: str, port: int, console: Console) -> None:
    with _listen(host, port) as listener:  # before the engines are opened, which takes longer
        app = make_app(engines, settings)
        logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
        server = Server(app, host, port)
        for number in (signal.SIGINT, signal.SIGTERM):  # also before it runs, and when uvicorn raises them again
            signal.signal(number, server.handle_exit)
        _tell(app.state.service, listener, console)
        server.run(sockets=[listener])


def _check_one_process(workers: int) -> None:
    named = {"--workers": str(workers), "WEB_CONCURRENCY": os.environ.get("WEB_CONCURRENCY") or "1"}
    for name, value in named.items():
        if value != "1":
            raise UsageError(
                f"{name} is {value}; a server is one process, which holds its jobs and shares engine calls. Start one "
                "per GPU or machine, on ports of their own, behind a proxy."
            )


def _by_name(engines: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in engines:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).resolve().name.removesuffix(".engine"), text
        if name in found:
            raise UsageError(f"two engines are named '{name}'. Name one of them: {name}-2={path}.")
        found[name] = Path(path)
    return found


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket. Raises OutputError if the address is taken or is none of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:  # the latter for what can be no name of a host
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise OutputError(f"{host}:{port}: {reason}. Choose another --host or --port.") from error
    return listener


def _is_loopback(host: str) -> bool:
    """Whether this name is one of this machine for itself alone; of an unknown name `_listen` tells."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ip_address(address[0]).is_loopback for *_, address in found)


def _tell(service: Service, listener: socket.socket, console: Console) -> None:
    for engine in service.engines.values():
        entry = engine.describe(service.settings)
        console.say(
            f"{entry.id}: {entry.precision} on {entry.backend}, {entry.size}, {entry.steps} steps of {entry.sampler}, "
            f"up to {entry.batch} images per engine call"
        )
    host, port = listener.getsockname()[:2]
    console.say(f"http://{f'[{host}]' if ':' in host else host}:{port}")
