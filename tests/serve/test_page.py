"""The page: what a browser may load of it, and what it does in one."""

from __future__ import annotations

import base64
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from serve.client import echo, pixels, text_app, toy_service
from support import wait_until
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.serve.routes import page
from tqdit.serve.settings import Settings

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
KEY = "a-key-of-this-test"
in_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason=f"no browser ({', '.join(BROWSERS)}) with its chromedriver is installed"
)


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def tags():
    reader = Tags()
    reader.feed(page()[0].decode())
    return reader.all


def test_nothing_is_loaded_from_elsewhere(tags):
    text = page()[0].decode()
    assert not re.findall(r"https?:|//[a-z]|@import|url\(", text)
    for _, held in tags:
        for name in ("src", "srcset", "action", "data", "poster"):
            assert name not in held
        assert (held.get("href") or "data:,") == "data:,"
    assert [tag for tag, _ in tags if tag in ("script", "style")] == ["style", "script"]
    assert all(not held for tag, held in tags if tag in ("script", "style"))
    assert not [held for _, held in tags if any(name.startswith("on") or name == "style" for name in held)]


def test_every_control_has_a_label(tags):
    labelled = {held["for"] for tag, held in tags if tag == "label"}
    for tag, held in tags:
        if tag in ("input", "select", "textarea"):
            assert held["id"] in labelled or held.get("aria-label"), held
        if tag == "progress":
            assert held.get("aria-label")
    names = [held["id"] for _, held in tags if "id" in held]
    assert len(names) == len(set(names))
    assert {held.get("role") for _, held in tags} >= {"alert", "status"}


def test_a_browser_runs_only_the_page_s_own_script(quick):
    answer = quick.ask("/")
    policy = answer.headers["content-security-policy"]
    assert answer.kind == "text/html"
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "hide-scrollbars", f"user-data-dir={folder / 'profile'}",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER), env={**os.environ, "HOME": str(folder)}))
    yield driver
    driver.quit()


class Visitor:
    """What a person does with the page."""

    def __init__(self, driver: Any, width: int, height: int, url: str) -> None:
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(url)

    def at(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def type(self, name: str, text: str) -> None:
        self.at(name).clear()
        self.at(name).send_keys(text)

    def choose(self, name: str, text: str) -> None:
        self.at(name).find_element(By.XPATH, f"option[text()='{text}']").click()

    def draw(self) -> None:
        self.at("draw").click()

    def finish(self) -> None:
        wait_until(lambda: self.at("draw").is_enabled())

    def pictures(self, where: str) -> list[np.ndarray]:
        found = self.driver.find_elements(By.CSS_SELECTOR, f"#{where} img")
        assert all(each.get_attribute("alt") for each in found)
        return [pixels(base64.b64decode(each.get_attribute("src").split(",")[1])) for each in found]

    def complaints(self) -> list[str]:
        """What the browser's console says, except for refusals that a test provokes."""
        return [each["message"] for each in self.driver.get_log("browser") if "status of 4" not in each["message"]]


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (390, 844)], ids=["desktop", "phone"])
def test_images_are_drawn_step_by_step_and_kept_with_their_settings(driver, serve, bundle_of, width, height, tmp_path):
    bundle = bundle_of(steps=1000)
    running = serve(settings=Settings(most_images=4), tiny=bundle, other=bundle)
    visitor = Visitor(driver, width, height, running.url)
    wait_until(lambda: visitor.at("model").text)
    visitor.choose("class", "3")
    visitor.type("seed", "7")
    visitor.type("count", "2")
    visitor.draw()
    seen = set()
    while not visitor.at("draw").is_enabled():
        seen.update(
            driver.execute_script("return [...document.querySelectorAll('#stage img')].map((each) => each.src)")
        )
    visitor.finish()
    with Sampler.open(bundle) as sampler:
        expected = sampler.sample([3, 3], seed=7)
    np.testing.assert_array_equal(visitor.pictures("stage"), expected)
    np.testing.assert_array_equal(visitor.pictures("gallery"), expected[::-1])
    assert len(seen) > 2  # previews before the ends
    captions = [each.text for each in driver.find_elements(By.CSS_SELECTOR, "#gallery p")]
    assert all("seed 7" in each and "1000 steps" in each and "tiny" in each for each in captions)
    assert "2 images" in visitor.at("status").text
    assert driver.execute_script("return document.documentElement.scrollWidth") == width  # nothing to scroll sideways
    small = driver.execute_script(
        "return [...document.querySelectorAll('button, input, select, a')].filter((each) => each.offsetParent)"
        ".filter((each) => each.getBoundingClientRect().height < 24).map((each) => each.id || each.textContent)"
    )
    assert small == []  # large enough for a finger
    driver.save_screenshot(str(tmp_path / "shot.png"))
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (width, height)
        assert len(np.unique(np.asarray(shot.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    visitor.type("seed", "1")
    driver.find_element(By.CSS_SELECTOR, "#gallery button").click()  # that of image 2
    assert visitor.at("seed").get_attribute("value") == "7"
    assert visitor.at("count").get_attribute("value") == "2"
    assert visitor.complaints() == []


@in_browser
@pytest.mark.slow
def test_stop_frees_the_places_and_a_refusal_is_shown(driver, gated):
    running, gate = gated()
    visitor = Visitor(driver, 1200, 900, running.url)
    wait_until(lambda: visitor.at("model").text)
    gate.open.clear()
    visitor.draw()
    wait_until(lambda: running.running() == 1)
    visitor.at("stop").click()
    visitor.finish()
    gate.open.set()
    wait_until(lambda: running.running() == 0)
    assert "Stopped" in visitor.at("status").text
    driver.execute_script(
        "document.getElementById('seed').value = -5; document.getElementById('form').noValidate = true"
    )
    visitor.draw()
    wait_until(lambda: "seed" in visitor.at("error").text)
    assert visitor.complaints() == []


@in_browser
@pytest.mark.slow
def test_the_keyboard_keeps_its_place_and_numbers_that_are_missing_are_asked_for(driver, gated):
    running, gate = gated()
    visitor = Visitor(driver, 1200, 900, running.url)
    wait_until(lambda: visitor.at("model").text)
    for press in ("draw", "stop"):  # each is disabled afterwards
        gate.open.clear()
        visitor.at("draw").send_keys(Keys.ENTER)
        wait_until(lambda: running.running() == 1)
        if press == "stop":
            visitor.at("stop").send_keys(Keys.ENTER)
        gate.open.set()
        visitor.finish()
        wait_until(lambda: driver.switch_to.active_element.get_attribute("id") == "draw")
    for name in ("seed", "steps", "count"):
        assert driver.execute_script(f"const field = document.getElementById('{name}'); field.value = ''; "
                                     "return field.validity.valueMissing")  # fmt: skip
    assert visitor.complaints() == []


@in_browser
@pytest.mark.slow
def test_a_prompt_is_typed(driver, serve, bundle):
    running = serve(text_app(read_manifest(bundle)))
    visitor = Visitor(driver, 1200, 900, running.url)
    wait_until(lambda: visitor.at("prompt").is_displayed())
    assert not visitor.at("class").is_displayed()
    visitor.type("prompt", "<i>two words</i>")
    visitor.draw()
    visitor.finish()
    assert "<i>two words</i>" in visitor.at("gallery").text
    assert visitor.complaints() == []


@in_browser
@pytest.mark.slow
def test_a_key_is_asked_for_before_anything_is_shown(driver, serve, bundle):
    running = serve(settings=Settings(api_key=KEY), tiny=bundle)
    running.service.engines["tiny"].batcher.card.__dict__["class_names"] = tuple(f"<b>{each}" for each in "abcde")
    visitor = Visitor(driver, 390, 844, running.url)
    wait_until(lambda: visitor.at("key").is_displayed())
    visitor.type("key", "ключ")
    visitor.at("use-key").click()
    wait_until(lambda: "ASCII" in visitor.at("error").text)
    visitor.type("key", KEY + Keys.ENTER)
    wait_until(lambda: visitor.at("model").text)
    assert not visitor.at("key").is_displayed()
    assert "<b>c" in visitor.at("class").text  # a name is text, whatever it holds
    visitor.draw()
    visitor.finish()
    assert len(visitor.pictures("gallery")) == 1
    assert visitor.complaints() == []


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("scale", [4.5, 12.25, -1.0])
def test_the_slider_begins_with_the_engine_s_guidance_whatever_it_is(driver, serve, bundle, scale):
    card = read_manifest(bundle).card
    card = replace(card, guidance=replace(card.guidance, scale=scale))
    running = serve(toy_service(card, echo(card, "class_labels"), Settings()))
    visitor = Visitor(driver, 1200, 900, running.url)
    wait_until(lambda: visitor.at("model").text)
    assert float(visitor.at("guidance").get_attribute("value")) == scale
    assert f"{scale:g}" in visitor.at("guidance-value").text
