r"""The built site in a real browser: every page, wide and narrow, light and dark, with the network shut.

Needs the extra `docs` and Chromium: `pip install -e '.[docs]'`; Debian's `chromium`, or one that Playwright fetched.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import urldefrag

import pytest

for package in ("sphinx", "myst_nb", "furo", "sphinxcontrib.katex"):
    pytest.importorskip(package, reason="needs the extra docs")
pytest.importorskip("playwright.sync_api", reason="needs the extra docs")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra docs").Axe()

WAYS = ("wide light", "wide dark", "narrow light", "narrow dark", "widest light")
EXAMINED = WAYS[:3]  # by axe
SIZES = {  # of the window
    "narrow": {"width": 400, "height": 844},
    "wide": {"width": 1280, "height": 900},
    "widest": {"width": 1500, "height": 900},
}
LOOK = r"""() => {
  const prose = document.querySelector("article").cloneNode(true);
  prose.querySelectorAll("pre, code, annotation").forEach(e => e.remove());
  const background = getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).map(Number);
  return {
    background: (background[0] + background[1] + background[2]) / 3,
    prose: prose.textContent,
    classes: [...new Set([...document.querySelectorAll("*")].flatMap(e => [...e.classList]))],
    errors: [...document.querySelectorAll(".katex-error")].map(e => e.title),
    formulas: [document.querySelectorAll(".math").length, document.querySelectorAll(".math .katex").length],
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => new URL(a.getAttribute("href"), document.baseURI).href),
    broken: [...document.images].filter(i => !i.naturalWidth || !i.alt).map(i => i.src),
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(h => Number(h.tagName[1])),
    overflow: Math.max(...["html", ".content"].map(
        part => document.querySelector(part)).filter(e => e).map(e => e.scrollWidth - e.clientWidth)),
  };
}"""


@dataclass
class Visit:
    r"""What was found on a page, in one of the ways to look at it."""

    page: str
    seen: dict
    violations: list[str]
    console: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


def watched(browser, address, console, outside, **settings):
    r"""A new tab whose complaints are noted and whose requests beyond the site are noted and refused."""
    tab = browser.new_context(**settings).new_page()
    tab.on("console", lambda m: console.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: console.append(str(error)))
    tab.on("response", lambda r: console.append(f"{r.status} {r.url}") if r.status >= 400 else None)

    def gate(route):
        url = route.request.url
        if url.startswith((address, "data:")):
            return route.continue_()
        outside.append(url)
        return route.abort()

    tab.route("**/*", gate)
    return tab


@pytest.fixture(scope="module")
def looks(site, address, browser) -> dict[str, list[Visit]]:
    r"""Every page of the site, loaded once, looked at in five ways and examined by axe.

    Colours do not depend on the width nor the structure on the colours, so axe asks each once: of a wide page
    both and of its dark form the contrast, of a narrow page the structure. It passes over the thousands of boxes inside
    formulas, which have the text's colour; `notation.html` is examined with them. Pages of code are made alike, so one
    whose classes have all been examined is passed over too.
    """
    console, outside, known, found = [], [], set(), {way: [] for way in WAYS}
    tab = watched(browser, address, console, outside, reduced_motion="reduce")
    tab.set_default_timeout(120_000)
    for file in sorted(site.rglob("*.html")):
        name = file.relative_to(site).as_posix()
        if name.startswith("_"):
            continue
        console.clear()
        outside.clear()
        tab.goto(address + name, wait_until="load")
        for way in WAYS:
            width, scheme = way.split()
            tab.set_viewport_size(SIZES[width])
            tab.emulate_media(color_scheme=scheme)
            seen = tab.evaluate(LOOK)
            is_known = name.startswith("code/") and known.issuperset(seen["classes"])
            broken = [] if is_known else examined(tab, way, name)
            told = [f"{v['id']}: {n['target']} {n['failureSummary']}" for v in broken for n in v["nodes"][:3]]
            found[way].append(Visit(name, seen, told, list(console), list(outside)))
        known.update(seen["classes"])
    tab.context.close()
    return found


def examined(tab, way: str, name: str) -> list[dict]:
    r"""What axe finds to mend on the page in `tab`."""
    options = {"resultTypes": ["violations"], "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    if way not in EXAMINED:
        return []
    if way == "wide dark":
        options["runOnly"] = {"type": "rule", "values": ["color-contrast"]}
    if way == "narrow light":
        options["rules"] = {"color-contrast": {"enabled": False}}
    context = None if name == "notation.html" else {"exclude": [[".katex"]]}
    return axe.run(tab, context=context, options=options).response["violations"]


@pytest.fixture(params=WAYS)
def visits(request, looks) -> list[Visit]:
    r"""Every page, in one of the ways to look at it."""
    assert len(looks[request.param]) > 25
    return looks[request.param]


def test_dark_pages_are_dark(looks):
    for light, dark in (("wide light", "wide dark"), ("narrow light", "narrow dark")):
        for bright, dim in zip(looks[light], looks[dark], strict=True):
            assert bright.seen["background"] > 200 > 60 > dim.seen["background"], bright.page


def test_no_page_complains_or_asks_beyond_the_site(visits):
    assert {v.page: v.console + v.outside for v in visits if v.console or v.outside} == {}


def test_every_formula_is_rendered(visits):
    for v in visits:
        assert v.seen["errors"] == [], v.page
        assert v.seen["formulas"][0] <= v.seen["formulas"][1], v.page
        assert re.findall(r"\$\$|\\[(\[]|\\[A-Za-z]{2,}", v.seen["prose"]) == [], v.page
    assert sum(v.seen["formulas"][1] for v in visits) > 100


def test_katexs_script_and_style_sheet_have_one_version(site, address, browser):
    tab = watched(browser, address, [], [])
    tab.goto(address + "notation.html")
    style_sheet = (site / "_static/katex/katex.min.css").read_text(encoding="utf-8")
    assert f'"{tab.evaluate("katex.version")}"' in style_sheet
    tab.context.close()


def test_every_link_inside_the_site_has_its_page_and_anchor_and_every_image_shows(visits, site, address):
    ids = {v.page: set(v.seen["ids"]) for v in visits}
    broken = [(v.page, source) for v in visits for source in v.seen["broken"]]
    for v in visits:
        for link in v.seen["links"]:
            if link.startswith(address):
                page, anchor = urldefrag(link.removeprefix(address))
                page = page.partition("?")[0] or "index.html"
                if not (site / page).is_file() or (anchor and page in ids and anchor not in ids[page]):
                    broken.append((v.page, link))
    assert broken == []


def test_headings_begin_with_one_h1_and_skip_no_level(visits):
    for v in visits:
        if v.page == "search.html":  # its heading comes with the results
            continue
        levels = v.seen["headings"]
        assert levels.count(1) == 1 and levels[0] == 1, (v.page, levels)
        assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), (v.page, levels)


def test_no_page_scrolls_sideways(visits):
    assert {v.page: v.seen["overflow"] for v in visits if v.seen["overflow"] > 0} == {}


@pytest.mark.parametrize("way", EXAMINED)
def test_axe_finds_nothing_to_mend(looks, way):
    assert {v.page: v.violations for v in looks[way] if v.violations} == {}


def test_a_docstring_stands_beside_its_source_where_there_is_room_and_above_it_where_not(browser, address):
    for size, beside in (("widest", True), ("narrow", False)):
        tab = watched(browser, address, [], [], viewport=SIZES[size])
        tab.goto(address + "code/diffusion.html")
        row = tab.locator("[id='ddpm.diffusion.q_sample'] .beside").first
        told, source = (row.locator(f".{part}").bounding_box() for part in ("told", "source"))
        assert (source["x"] > told["x"] + told["width"] / 2) == beside
        assert (source["y"] > told["y"] + told["height"] / 2) != beside
        tab.context.close()


@pytest.mark.parametrize(
    "query, page",
    [
        ("q_sample", "code/diffusion.html"),
        ("alpha_bar", "notation.html"),
        ("latent scale", "code/training.validation.html"),
        ("cross-attention", "code/attention.html"),
        ("guidance scale", "sample.html"),
        ("KLVAE", "code/vae.html"),
    ],
)
def test_the_search_finds_symbols_and_words(query, page, browser, address):
    tab = watched(browser, address, [], [], viewport=SIZES["wide"])
    tab.goto(f"{address}search.html?q={query.replace(' ', '+')}")
    tab.wait_for_selector("#search-results ul.search li a", timeout=60_000)
    summary = "document.querySelector('#search-results .search-summary')"
    tab.wait_for_function(f"{summary}?.innerText.includes('found')")
    links = [a.get_attribute("href") for a in tab.locator("ul.search li > a").all()]
    assert any(page in link for link in links), links
    tab.context.close()


def test_without_javascript_everything_but_formulas_can_be_read(browser, address):
    tab = browser.new_context(java_script_enabled=False, viewport=SIZES["wide"]).new_page()
    tab.goto(address + "code/vae.html")
    text = tab.locator("article").inner_text()
    assert "class DiagonalGaussian" in text and "The most likely z, which is mu." in text
    tab.context.close()
