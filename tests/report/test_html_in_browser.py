"""The report's page in a browser: nothing leaves, nothing complains, nothing is wider than a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import full_reports
import pytest

from compress.report import html
from compress.report.model import Report

CHROMIUM = browser.find()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

#: Elements that stick out of the window, but for those inside of a box that scrolls by itself.
WIDER = """(width => [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > width + 0.5
    && !e.closest('.scroll') && !e.matches('.unseen, .unseen *'))
  .map(e => e.tagName + '.' + e.className))({width})"""
#: Text whose contrast with what is behind it is below 4.5, as (text, contrast).
FAINT = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.slice(0, 3).map(linear); return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return parse(getComputedStyle(document.body).backgroundColor); };
  return [...document.querySelectorAll('body *')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && !e.closest('.unknown'))
    .map(e => { const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
      return [e.textContent.trim().slice(0, 40), (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]; })
    .filter(([, contrast]) => contrast < 4.5);
})()"""


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Page]:
    assert CHROMIUM is not None
    with browser.browser(CHROMIUM) as running:
        yield running.page()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    html.write(Report.model_validate(full_reports.DECODER), tmp_path)
    return tmp_path / html.NAME


@pytest.mark.parametrize("name", ["DECODER", "ENCODER_FULL", "MINIMAL"])
def test_nothing_leaves_and_nothing_complains(name: str, tab: browser.Page, tmp_path: Path) -> None:
    html.write(Report.model_validate(getattr(full_reports, name)), tmp_path)
    for width in (360, 1120):
        tab.requests.clear()
        tab.complaints.clear()
        tab.open(tmp_path / html.NAME, width=width)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert tab.evaluate(WIDER.replace("{width}", str(width))) == []
        assert tab.complaints == []
        assert [url for url in tab.requests if not url.startswith("data:")] == [(tmp_path / html.NAME).as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme: str, tab: browser.Page, written: Path) -> None:
    tab.open(written, width=1120, scheme=scheme)
    assert tab.evaluate(FAINT) == []
    surface = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert surface == {"light": "rgb(252, 252, 251)", "dark": "rgb(26, 26, 25)"}[scheme]
    assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_a_page_that_does_all_of_it_is_caught(tab: browser.Page, written: Path) -> None:
    bad = (
        '<img src="http://127.0.0.1:9/x.png"><p style="width:999px;color:#ddd" class="bad">faint</p><script>1</script>'
    )
    written.write_text(written.read_text(encoding="utf-8").replace("<main", bad + "<main"), encoding="utf-8")
    tab.complaints.clear()
    tab.open(written, width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") > 360 and "P.bad" in tab.evaluate(
        WIDER.replace("{width}", "360")
    )
    assert any("Content Security Policy" in text or "blocked" in text for text in tab.complaints)
    assert [text for text, _ in tab.evaluate(FAINT)] == ["faint"]
