"""The page of what a network does not know in a real browser: classes, and a curve with its band."""

import pytest
from jobs.test_uncertainty import classes, curve
from report.devtools import EXECUTABLE, browser

from paraboloid.jobs import uncertainty as job

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium found (Debian: apt-get install chromium)")

FIGURES = 4  # of classes: reliability, unseen, least sure, weights; of a curve: band, coverage, unseen, weights


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("problem", [classes, curve])
def test_figures_render_the_console_is_silent_and_nothing_is_fetched(tab, problem, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(job.page(job.uncertainty(problem(), quick=True)), encoding="utf-8")
    for width, scheme in ((1280, "light"), (400, "dark")):
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tab.open(path.as_uri())
        boxes = tab.evaluate(
            """[...document.querySelectorAll('svg.figure')].map(svg => {
                 const box = svg.getBoundingClientRect(), ink = svg.getBBox();
                 return [box.width, box.height, ink.width, ink.height];
               })"""
        )
        assert len(boxes) == FIGURES
        assert min(size for box in boxes for size in box) > 80
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.complaints() == []
        assert tab.requests() == [path.as_uri()]
