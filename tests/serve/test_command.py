"""tqdit-serve as an operator runs it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from support import wait_until
from tqdit.cli import serve
from tqdit.cli.main import run
from tqdit.cli.serve import KEY
from tqdit.serve import on_ray


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in (KEY, "WEB_CONCURRENCY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_what_it_serves_and_ends_when_it_is_told_to(bundle, number):
    command = [sys.executable, "-m", "tqdit", "serve", f"digits={bundle}", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = [process.stderr.readline() for _ in range(3)]
            assert lines[0].startswith("digits: fp32 on onnxruntime, 8x8, 20 steps of ddpm")
            assert lines[1].startswith("model: ")
            (address,) = re.findall(r"^(http://127\.0\.0\.1:\d+)$", lines[2])
            with urllib.request.urlopen(f"{address}/v1/models", timeout=20) as answer:
                assert answer.status == 200
            process.send_signal(number)
            assert (process.stderr.read(), process.stdout.read(), process.wait(30)) == ("ended\n", "", 0)
        finally:
            process.kill()


def refused(capsys, *arguments):
    """(exit code, the line) of a command line that is wrong."""
    code = run("serve", [*map(str, arguments), "-q"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return code, captured.err


def test_mistakes_are_one_line(capsys, bundle, tmp_path, monkeypatch):
    code, line = refused(capsys, tmp_path / "nothing.engine")
    assert code == 1
    assert "no such engine" in line
    for arguments, words in (
        (["--workers", "2"], "--workers is 2"), (["--port", "70000"], "--port is 70000"), (["--queue", "-1"], "queue"),
        (["--deadline", "nan"], "deadline"), (["--most-images", "0"], "images per request"),
        (["--cors-origin", "x"], "origin 'x'"), ([bundle, bundle], "two engines are named 'model'"),
        (["a b=x"], "'a b' is no name"), (["--ray", "auto", "--port", "0"], "--port is 0"),
        (["--ray", bundle], "Name the engine before --ray"), (["--ray", f"a={bundle}"], "Name the engine before --ray"),
        ([bundle, "--ray", "auto", "--device", "0"], "--device: Ray chooses"),
    ):  # fmt: skip
        code, line = refused(capsys, *arguments)
        assert code == 2
        assert words in line
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    assert "WEB_CONCURRENCY is 4" in refused(capsys, bundle)[1]
    monkeypatch.setenv("WEB_CONCURRENCY", "")  # as if unset
    assert "no such engine" in refused(capsys, tmp_path / "nothing.engine", "--port", 0)[1]


def test_a_key_that_is_set_and_empty_is_refused(capsys, bundle, monkeypatch):
    monkeypatch.setenv(KEY, "")
    code, line = refused(capsys, bundle)
    assert code == 2
    assert "API key" in line


def test_an_address_that_is_taken_is_refused_before_the_engine_is_opened(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, line = refused(capsys, tmp_path / "nothing.engine", "--port", port)
    assert code == 1
    assert f"127.0.0.1:{port}" in line
    assert refused(capsys, tmp_path, "--host", "192.0.2.1")[0] == 1


@pytest.mark.slow
def test_listening_for_others_without_a_key_is_warned_of(bundle):
    command = [sys.executable, "-m", "tqdit", "serve", str(bundle), "--port", "0", "--host", "0.0.0.0"]
    for key, warned in (("", True), ("a-key-of-this-test", False)):
        environment = {name: value for name, value in os.environ.items() if name != KEY} | ({KEY: key} if key else {})
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            try:
                lines = [process.stderr.readline()]
                while not lines[-1].startswith("http"):
                    lines.append(process.stderr.readline())
                assert any(KEY in line for line in lines) == warned
                process.terminate()
                process.wait(30)
            finally:
                process.kill()
        wait_until(lambda process=process: process.poll() == 0)


def test_a_missing_library_comes_with_the_pip_command():
    without = "import sys; sys.modules['prometheus_client'] = None; "
    program = f"{without}from tqdit.cli.main import run; sys.exit(run('serve', []))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "prometheus_client, which is not installed" in done.stderr
    assert "Run: pip install" in done.stderr


def test_listening_for_others_on_ray_without_a_key_is_warned_of(capsys, bundle, monkeypatch):
    monkeypatch.setattr(on_ray, "serve_on_ray", lambda *_: None)
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False)):
        assert run("serve", [str(bundle), "--ray", "auto", "--host", host]) == 0
        assert (KEY in capsys.readouterr().err) == warned


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example"])
def test_what_can_be_no_name_of_a_host_is_refused_in_one_line(capsys, tmp_path, host):
    code, line = refused(capsys, tmp_path, "--host", host)
    assert code == 1
    assert f"{host}:8000" in line


@pytest.mark.parametrize(
    ("arguments", "key", "names"),
    [((), None, {"localhost", "127.0.0.1", "[::1]"}), (("--host", "127.0.0.2"), None, {"127.0.0.2", "localhost"}),
     (("--host", "LocalHost"), None, {"localhost"}), (("--host", "127.1"), None, {"127.1", "localhost"}),
     ((), "a-key-of-this-test", set()), (("--host", "0.0.0.0"), None, set()), (("--ray",), None, set())],
)  # fmt: skip
def test_names_are_checked_by_a_server_for_this_machine_without_a_key(bundle, monkeypatch, arguments, key, names):
    if key:
        monkeypatch.setenv(KEY, key)
    found = []
    for place, name in ((serve, "_serve_here"), (on_ray, "serve_on_ray")):
        monkeypatch.setattr(place, name, lambda _engines, settings, *_: found.append(settings))
    assert run("serve", [str(bundle), *arguments, "-q"]) == 0
    assert set(found[0].hosts) >= names
    assert bool(found[0].hosts) == bool(names)
