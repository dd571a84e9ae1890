"""What docs/guides/serve.md shows runs, against a server."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from tqdit.serve.settings import Settings
from tqdit.serve.shapes import ImageRequest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "serve.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_shell_commands_run(serve, bundle_of, tmp_path):
    running = serve(model=bundle_of(steps=1000))
    (block,) = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    script = "set -e -o pipefail\n" + block.replace(ADDRESS, running.url)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in ("three.png", "image.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size == (8, 8)
    events = (tmp_path / "events.txt").read_text()
    assert "event: image_generation.partial_image" in events
    assert "event: image_generation.completed" in events
    lines = done.stdout.splitlines()
    assert "event: job.completed" in lines
    assert '"status":"completed"' in done.stdout
    assert '{"status":"ok"}tqdit_steps_total{model="model"} ' in lines[-1]


@pytest.mark.slow
def test_the_python_runs(serve, bundle, tmp_path, monkeypatch):
    running = serve(model=bundle)
    client, own = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict = {}
    exec(client.replace(ADDRESS, running.url), names)
    assert len(names["made"].data) == 2
    names["client"].close()
    (tmp_path / "model.engine").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    exec(own, names)
    assert list(names["app"].state.service.engines) == ["digits"]
    names["app"].state.service.engines["digits"].batcher.close()


def test_every_field_of_a_request_is_in_its_table():
    table = GUIDE.split("| field | meaning |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == set(ImageRequest.__struct_encode_fields__)


def test_the_limits_are_those_of_the_settings():
    held = {field.name: field.default for field in fields(Settings)}
    assert f"{held['body_bytes'] / 1024:.0f} kB" in GUIDE
    assert f"{held['most_jobs']:,}" in GUIDE
    assert f"{held['keep_bytes'] / 2**20:.0f} MB" in GUIDE
    assert f"most {held['connections']} connections" in GUIDE
    assert f"within {held['client_s']:.0f} s" in GUIDE
    assert held["keep_s"] == 3600
