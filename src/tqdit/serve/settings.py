"""What an operator chooses about a service; the limits that hold it under load."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tqdit.bounds import MOST_BATCH, check_count, check_number
from tqdit.engines.gpu import GpuChoice
from tqdit.engines.run.backend import check_threads
from tqdit.errors import UsageError

DAY = 86_400.0  # seconds


@dataclass(frozen=True)
class Settings:
    """Raises UsageError for numbers that make no sense."""

    batch: int | None = None  # images per engine call; None: the engine's choice
    threads: int | None = None  # CPU threads of each engine; None: the backend's choice
    device: GpuChoice = None  # index of the GPU of every engine, or a GpuShare; None: the current one
    queue: int = 64  # images that may wait for a place in an engine's batch
    deadline_s: float = 600.0  # from a request to its last image
    most_images: int = 16  # of one request
    most_previews: int = 50  # of one image
    body_bytes: int = 65_536  # of a request; the longest prompt has 8,000 characters, of up to 6 bytes in JSON
    most_jobs: int = 1000  # finished ones that are kept
    keep_bytes: int = 256 * 2**20  # of their images
    keep_s: float = 3600.0
    shutdown_s: float = 30.0  # for images that are not done when the server ends
    client_s: float = 20.0  # for a client to send its request, and to take 20 kB of an answer
    connections: int = 256  # open at the same time
    cors_origins: tuple[str, ...] = ()  # web pages of other origins that may call
    hosts: tuple[str, ...] = ()  # that the Host header may name, in lower case, without a port; (): any
    keeps_jobs: bool | None = None  # False: nothing is kept between requests, so that any of several processes can
    # answer each; None: True unless this is a child process, as of uvicorn --workers
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_threads(self.threads)
        if self.batch is not None:
            check_count("batch", self.batch, 1, MOST_BATCH)
        check_count("queue", self.queue, 0, MOST_BATCH)
        check_count("images per request", self.most_images, 1, MOST_BATCH)
        check_count("previews", self.most_previews, 0, 1000)
        check_count("connections", self.connections, 1, 2**16)
        check_number("deadline", self.deadline_s, 0.1, DAY)
        check_number("time to shut down", self.shutdown_s, 0, DAY)
        if self.api_key is not None and not re.fullmatch(r"[!-~]{8,}", self.api_key):
            raise UsageError(
                f"the API key has {len(self.api_key)} characters; expected at least 8, printable ASCII without spaces."
            )
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise UsageError(f"origin '{origin}'; expected one such as https://example.org, without a path, or *.")
