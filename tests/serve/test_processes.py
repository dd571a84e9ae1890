"""The application in several processes, each with engines of its own."""

import multiprocessing
import re
import subprocess
import sys
from urllib.error import URLError

import pytest

from serve.client import GENERATIONS, Client
from support import wait_until
from tqdit.serve.settings import Settings


@pytest.mark.parametrize(("said", "kept"), [(None, False), (True, True), (False, False)])
def test_a_child_process_keeps_jobs_only_if_it_is_told_to(gated, monkeypatch, said, kept):
    """It may have siblings that do not know them."""
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "uvicorn")
    running, _ = gated(Settings(keeps_jobs=said))
    assert running.ask("/v1/jobs", {"class": 1}).status == (202 if kept else 400)
    assert running.ask(GENERATIONS, {"class": 1, "response_format": "url"}).status == (200 if kept else 400)
    assert running.ask(GENERATIONS, {"class": 1}).status == 200


@pytest.mark.slow
def test_an_application_that_was_made_before_a_fork_does_not_start_in_it(bundle):
    """As of gunicorn --preload: every request would fail, and it would call itself ready."""
    program = f"""
import asyncio, os, sys
from tqdit.errors import BackendError
from tqdit.serve.app import make_app
app = make_app({{"tiny": {str(bundle)!r}}})
async def start():
    async with app.router.lifespan_context(app):
        print("started", flush=True)
if os.fork():
    os.wait()
    asyncio.run(start())
else:
    try:
        asyncio.run(start())
    except BackendError as error:
        print(error, flush=True)
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    refusal, started = done.stdout.splitlines()
    assert "fork" in refusal
    assert started == "started"


def listens(client):
    try:
        return client.ask("/health/ready").status == 200
    except URLError:
        return False


@pytest.mark.slow
def test_several_worker_processes_of_uvicorn_serve(bundle, tmp_path):
    (tmp_path / "served.py").write_text(
        f"from tqdit.serve.app import make_app\napp = make_app({{'tiny': {str(bundle)!r}}})\n"
    )
    command = [sys.executable, "-m", "uvicorn", "--app-dir", tmp_path, "--workers", "2", "--port", "0", "served:app"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            told, url = [], None
            while sum("startup complete" in line for line in told) < 2:
                told.append(process.stderr.readline())
                assert told[-1], "".join(told)
                url = re.search(r"http://[\d.:]+", told[-1]) or url
            client = Client(url[0])
            wait_until(lambda: listens(client))  # a moment after its start is complete
            assert [client.ask(GENERATIONS, {"class": 1}).status for _ in range(4)] == [200] * 4
            assert client.ask("/v1/jobs", {"class": 1}).status == 400
            process.terminate()
            told.append(process.communicate(timeout=30)[1])
        finally:
            process.kill()
    assert "Traceback" not in "".join(told)
