"""The page in a real browser: figures have a size, the console is silent, nothing is fetched, the theme switches."""

import pytest
from report.devtools import EXECUTABLE, browser

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium found (Debian: apt-get install chromium)")

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def shown(tab, page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    tab.url = path.as_uri()
    return tab


def show(tab, address="", size=WIDE, scheme="light"):
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)
    tab.open(tab.url + address)


def paper(tab):
    return tab.evaluate("getComputedStyle(document.body).backgroundColor")


def test_a_page_that_fetches_and_complains_is_caught(tab, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('told'); throw Error('thrown')</script>")
    tab.open(path.as_uri())
    assert "http://127.0.0.1:9/x.png" in tab.requests()
    assert len(tab.complaints()) >= 3  # the console, the exception, the failed load


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_figures_render_the_console_is_silent_and_nothing_is_fetched(shown, scheme, size):
    show(shown, size=size, scheme=scheme)
    boxes = shown.evaluate(
        """[...document.querySelectorAll('svg.figure')].map(svg => {
             const box = svg.getBoundingClientRect(), ink = svg.getBBox();
             return [svg.querySelector('title').textContent, box.width, box.height, ink.width, ink.height];
           })"""
    )
    assert len(boxes) == 8
    for title, *sizes in boxes:
        assert min(sizes) > 100, (title, sizes)
    assert shown.complaints() == []
    assert shown.requests() == [shown.url]


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_only_figures_and_tables_scroll_sideways(shown, size):
    show(shown, size=size)
    assert shown.evaluate("document.documentElement.scrollWidth") <= size["width"]


def test_no_label_leaves_its_figure(shown):
    show(shown)
    outside = shown.evaluate(
        """[...document.querySelectorAll('svg.figure')].flatMap(svg => {
             const frame = svg.getBoundingClientRect();
             return [...svg.querySelectorAll('text')].filter(text => {
               const box = text.getBoundingClientRect();
               return box.left < frame.left - 1 || box.right > frame.right + 1
                 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
             }).map(text => text.textContent);
           })"""
    )
    assert outside == []


def test_the_theme_follows_the_system_the_address_and_the_button(shown):
    light, dark = "rgb(255, 255, 255)", "rgb(16, 20, 25)"
    show(shown, scheme="dark")
    assert paper(shown) == dark
    show(shown, "?theme=light", scheme="dark")
    assert paper(shown) == light
    show(shown, "?theme=dark", scheme="light")
    assert paper(shown) == dark
    shown.evaluate("document.getElementById('theme').click()")
    assert paper(shown) == light
    stroke = "getComputedStyle(document.querySelector('svg.figure path[style*=\"--c1\"]')).stroke"
    before = shown.evaluate(stroke)
    shown.evaluate("document.getElementById('theme').click()")
    assert shown.evaluate(stroke) != before
    assert shown.complaints() == []
    shown.evaluate("localStorage.clear()")


def test_paper_is_white(shown):
    show(shown, "?theme=dark", scheme="dark")
    shown.call("Emulation.setEmulatedMedia", media="print")
    assert paper(shown) == "rgb(255, 255, 255)"
    shown.call("Emulation.setEmulatedMedia", media="")
