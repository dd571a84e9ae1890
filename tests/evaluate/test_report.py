"""The report: one file, nothing from elsewhere, every image there, and the numbers of the JSON beside it."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tqdit.evaluate.bootstrap import Measure, number
from tqdit.evaluate.report import page, write_report

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def measure(value: float) -> dict:
    return Measure(value, value * 0.8, value * 1.25, 64, "somehow", value / 10).to_json()


@pytest.fixture
def facts() -> dict:
    """An evaluation with everything in it, names that need escaping, and awkward numbers."""
    timesteps = list(range(0, 1000, 100))
    layers = {f"blocks.{index}.mlp.fc1": [10.0 ** -(index + group) for group in range(4)] for index in range(3)}
    return {
        "verdict": "W8A8 <within> the noise & fine.", "extractor": {"name": "judge", "weights": "ab", "features": 128},
        "reference": {"name": "data & co", "count": 4096}, "not_computed": {"recall": "needs <more>."},
        "sets": {
            "subject": {"frechet_distance": measure(1.23456), "accuracy": measure(0.9)},
            "float": {"frechet_distance": measure(1.1e-5), "accuracy": measure(0.95)},
            "float, seed 1": {"frechet_distance": measure(12345.678)},
        },
        "paired": {"final_error": measure(3.2e-4), "psnr_db": Measure(None, None, None, 64, "equal images").to_json()},
        "groups": [{"group": 0, "first_timestep": 0, "last_timestep": 900, "error": measure(0.01),
                    "signal_to_error_db": 20.0}],
        "timesteps": timesteps, "steps": [0.001 * (index + 1) for index in range(10)],
        "layers": {"boundaries": [250, 500, 750], "errors": layers},
        "scales": [{"site": "blocks.0.attn.value_product.left", "scales": [0.1, 0.2, 0.1, 0.05]}],
        "engines": [{"set": "subject", "name": "model.engine", "backend": "onnxruntime", "precision": "int8",
                     "size_mb": 2.1, "ms_per_image_and_step": 1.5, "batch": 16, "audit": "all int8"}],
        "diagnosis": {"error": 1e-4, "rows": 96,
                      "sites": [{"layer": "a.b", "role": "input", "gain": 0.5, "low": 0.4, "high": 0.6}],
                      "remedies": [{"layer": "a.b", "change": {"final": "weights"}, "gain": 0.5, "low": 0.1,
                                    "high": 0.6, "cost": 0.01, "gain_per_cost": 50.0}], "advice": []},
        "subject": {"name": "model.engine", "chain": "12 placed steps of <unipc>"}, "settings": {"seed": 0},
        "machine": {"processor": "x"}, "versions": {"tqdit": "0"},
    }  # fmt: skip


@pytest.fixture
def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8) for name in ("float", "subject")}


class Reader(HTMLParser):
    """Every tag with its attributes, and the text inside each element that has a data-key."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: dict[str, str] = {}
        self._key: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags.append((tag, held))
        if "data-key" in held:
            self._key = held["data-key"]
            self.numbers[self._key] = ""

    def handle_data(self, data: str) -> None:
        if self._key is not None:
            self.numbers[self._key] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("span", "h1"):
            self._key = None


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def look_up(facts: Any, key: str) -> Any:
    """The value of a `data-key` in the JSON. Layer and set names hold dots and commas, so the longest name wins."""
    if not key:
        return facts
    if isinstance(facts, list):
        head, _, rest = key.partition(".")
        return look_up(facts[int(head)], rest)
    for name in sorted(facts, key=len, reverse=True):
        if key == name or key.startswith(f"{name}."):
            return look_up(facts[name], key[len(name) + 1 :])
    raise KeyError(key)


def check_numbers(html: str, facts: dict) -> int:
    """Every number on the page is that of the JSON; returns how many there are."""
    numbers = read(html).numbers
    for key, text in numbers.items():
        value = look_up(facts, key)
        assert text == (value if isinstance(value, str) else "none" if value is None else number(value)), key
    return len(numbers)


def check_no_request(html: str) -> None:
    """Nothing that a browser would fetch: only data addresses, no script, no import, no url() in a style."""
    for tag, held in read(html).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "audio", "video", "source", "form")
        for name in ("src", "href", "srcset", "poster", "data", "action", "background", "xlink:href"):
            assert (held.get(name) or "data:").startswith(("data:", "#")), (tag, held)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}  # a part of the same page
    style = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def images_of(html: str) -> list[np.ndarray]:
    found = []
    for tag, held in read(html).tags:
        if tag == "img":
            assert held["alt"]
            with Image.open(io.BytesIO(base64.b64decode((held["src"] or "").split(",")[1]))) as picture:
                found.append(np.asarray(picture))
    return found


def test_the_numbers_are_those_of_the_json(facts, pictures):
    assert check_numbers(page(facts, pictures), facts) >= 25


def test_a_changed_number_would_be_noticed(facts, pictures):
    html = page(facts, pictures)
    facts["paired"]["final_error"]["value"] *= 2
    with pytest.raises(AssertionError, match=r"paired\.final_error\.value"):
        check_numbers(html, facts)


def test_nothing_is_fetched(facts, pictures):
    check_no_request(page(facts, pictures))


def test_every_image_is_there_pixel_for_pixel(facts, pictures):
    found = images_of(page(facts, pictures))
    assert len(found) == 5
    for index, pair in enumerate(found):
        np.testing.assert_array_equal(pair[:, :16], pictures["float"][index])
        np.testing.assert_array_equal(pair[:, -16:], pictures["subject"][index])


def test_names_cannot_break_the_page(facts, pictures):
    html = page(facts, pictures)
    assert "W8A8 &lt;within&gt; the noise &amp; fine." in html
    assert "needs &lt;more&gt;" in html


def test_every_layer_and_group_has_a_cell(facts, pictures):
    reader = read(page(facts, pictures))
    cells = [held for tag, held in reader.tags if tag == "td" and "background" in (held.get("style") or "")]
    assert len(cells) == 3 * 4
    assert len({cell["style"] for cell in cells}) >= 6  # errors span decades
    assert reader.numbers["layers.errors.blocks.2.mlp.fc1.3"] == "1.00e-05"


def test_an_error_of_zero_has_a_cell_too(facts, pictures):
    facts["layers"]["errors"] = {"a": [0.0, 0.0], "b": [0.0, 0.0]}
    assert read(page(facts, pictures)).numbers["layers.errors.b.1"] == "0.0"


def points(html: str, line: int) -> list[list[tuple[float, float]]]:
    """The corners of this line in each chart that has it, in pixels from the top left."""
    paths = re.findall(rf'<g id="line-{line}">\s*<path d="([^"]*)"', html)
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]


def test_charts_show_every_step_in_its_place(facts, pictures):
    facts["steps"][3] = 0.0  # has no place on a logarithmic axis
    over_time, scales = points(page(facts, pictures), 0)
    assert len(over_time) == len(facts["timesteps"]) - 1
    left, height = np.array(over_time).T
    kept = [index for index in range(10) if index != 3]
    np.testing.assert_allclose(np.corrcoef(left, np.array(facts["timesteps"])[kept])[0, 1], 1)
    np.testing.assert_allclose(np.corrcoef(height, np.log(np.array(facts["steps"])[kept]))[0, 1], -1)
    np.testing.assert_allclose(scales[0][1], scales[2][1])  # 0.1 both times
    assert scales[1][1] < scales[0][1] < scales[3][1]  # y counts from the top


def test_a_chain_without_any_error_has_no_chart(facts, pictures):
    facts["steps"] = [0.0] * 10
    html = page(facts, pictures)
    assert "No error at all." in html
    assert len(points(html, 0)) == 1  # that of the scales


def test_a_page_without_pairs_layers_or_engine_is_whole(facts):
    for name in ("paired", "groups", "layers", "scales", "engines", "diagnosis"):
        facts.pop(name)
    html = page(facts, {})
    check_no_request(html)
    assert check_numbers(html, facts) > 0


def test_the_report_of_a_real_run_holds_its_numbers(done_report):
    facts, html = done_report
    assert check_numbers(html, facts) > 100
    check_no_request(html)
    assert len(images_of(html)) == 16


def browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.mark.skipif(browser() is None, reason=f"no browser is installed ({', '.join(BROWSERS)})")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(facts, pictures, tmp_path: Path, scheme: str):
    """A real one, headless, without a network: the page is laid out and its pictures are drawn."""
    write_report(tmp_path / "report.html", facts, pictures)
    shot = tmp_path / "shot.png"
    command = [
        str(browser()), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1150,2600",
        f"--screenshot={shot}", "--log-level=3", *(["--force-dark-mode", "--enable-features=WebContentsForceDark:off"]
        if scheme == "dark" else []), (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run(command, check=True, timeout=120, capture_output=True, env=environment)
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    background = pixels[-1, 2]
    assert (background.mean() > 240) if scheme == "light" else (background.mean() < 60)
    drawn = np.abs(pixels - background).sum(axis=2) > 30
    assert 0.02 < drawn.mean() < 0.6  # text, tables and charts, not a blank page or an error page
    # the first pair is there as enlarged pixels: the colours of its float image, in order
    wanted = pictures["float"][0].reshape(-1, 3)
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)}
    assert np.mean([tuple(colour) in colours for colour in wanted]) > 0.95
