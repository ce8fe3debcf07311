r"""The film on the home page in a real browser, and that it shows what the package draws."""

import film
import numpy as np
import pytest
from PIL import Image

from ddpm import TextToImage

from .test_site import axe, watched

SIZES = {"wide": {"width": 1280, "height": 900}, "narrow": {"width": 400, "height": 860}}
SUM = r"""canvas => {
  const copy = new OffscreenCanvas(64, 64).getContext("2d");
  copy.drawImage(canvas, 0, 0);
  return copy.getImageData(0, 0, 64, 64).data.reduce((a, b) => a + b);
}"""


class Film:
    r"""The home page in a tab of its own."""

    def __init__(self, browser, address, **settings):
        self.complaints, self.sheets = [], []
        self.tab = watched(browser, address, self.complaints, self.complaints, **settings)
        self.tab.on(
            "request",
            lambda r: self.sheets.append(r.url) if "_static/film/" in r.url and ".webp" in r.url else None,
        )
        self.tab.goto(address + "index.html")
        self.tab.wait_for_selector("#film[data-shown='20']")

    def pictures(self) -> list[int]:
        r"""A number for what each canvas shows."""
        return [canvas.evaluate(SUM) for canvas in self.tab.locator("#film canvas").all()]

    def choose(self, name: str, value: str):
        before = self.pictures()
        self.tab.locator(f"[name=film-{name}]").select_option(value)
        for _ in range(100):
            self.tab.wait_for_timeout(100)
            changed = [a != b for a, b in zip(before, self.pictures(), strict=True)]
            if all(changed) or (name != "seed" and any(changed)):
                return
        raise AssertionError(f"nothing changed with {name}")

    def time(self) -> str:
        return self.tab.locator("#film output").inner_text()


@pytest.fixture
def opened(browser, address):
    films = []

    def open_film(**settings) -> Film:
        films.append(Film(browser, address, **settings))
        films[-1].tab.wait_for_load_state("networkidle")
        return films[-1]

    yield open_film
    for one in films:
        assert one.complaints == []
        one.tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_keyboard_moves_both_films_and_a_choice_loads_its_sheet_alone(size, scheme, opened):
    page = opened(viewport=SIZES[size], color_scheme=scheme)
    assert len(page.sheets) == 2 and page.time() == "the result"
    result = page.pictures()
    page.tab.locator("[name=film-step]").press("Home")
    assert page.time() == "t = 999"
    start = page.pictures()
    assert start[:2] == pytest.approx(start[3:5], rel=1e-3) and start[2] != start[5]  # one noise, two prompts
    page.tab.locator("[name=film-step]").press("ArrowRight")
    assert page.time() == "t = 949" and page.pictures() != start
    page.tab.locator("[name=film-step]").press("End")
    assert page.pictures() == result and result[1] == pytest.approx(result[2], rel=1e-2)
    page.choose("prompt-B", "0")
    page.choose("scale-B", "6")
    assert len(page.sheets) == 3  # prompt A's at guidance 3 was there
    assert page.pictures()[:3] == result[:3] and page.pictures()[3:] != result[3:]
    page.choose("seed", "1")
    assert page.pictures()[:3] != result[:3]
    found = axe.run(page.tab, context="#film", options={"resultTypes": ["violations"]}).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
    assert page.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_film_plays_to_its_end_and_can_be_halted(opened):
    page = opened(has_touch=True)
    play = page.tab.locator("#film button")
    play.tap()
    page.tab.wait_for_function(
        "[3, 4, 5, 6, 7, 8].includes(Number(document.getElementById('film').dataset.shown))"
    )
    assert play.inner_text() == "Pause"
    play.tap()
    assert play.inner_text() == "Play"
    halted = page.time()
    page.tab.wait_for_timeout(500)
    assert page.time() == halted
    play.tap()
    page.tab.wait_for_selector("#film[data-shown='20']")
    assert play.inner_text() == "Play"


def test_without_motion_the_film_goes_to_its_ends_and_without_scripts_it_is_a_picture(
    opened, browser, address
):
    page = opened(reduced_motion="reduce")
    play = page.tab.locator("#film button")
    for label, time in (("To the start", "t = 999"), ("To the end", "the result")):
        assert play.inner_text() == label
        play.click()
        assert page.time() == time
    assert not page.tab.locator(".film-still img").is_visible()
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(address + "index.html")
    assert plain.locator(".film-still img").is_visible()
    plain.context.close()


def test_the_film_plays_from_a_file(site, browser):
    tab = browser.new_page()
    tab.goto((site / "index.html").as_uri())
    tab.wait_for_selector("#film[data-shown='20']")
    tab.close()


def test_the_sheets_are_small_and_what_the_package_draws():
    sheets = sorted(film.FOLDER.glob("*.webp"))
    assert len(sheets) == len(film.PROMPTS) * len(film.SCALES) * len(film.SEEDS)
    assert sum(sheet.stat().st_size for sheet in sheets) < 3_000_000
    _, drawn = film.record(TextToImage.load(), film.PROMPTS[1], 3, 0)
    kept = Image.open(film.FOLDER / "1-3-0.webp")
    assert (
        np.abs(np.asarray(kept, float) - np.asarray(drawn, float)).mean() < 10
    )  # WebP's losses, mostly of noise
