"""Pages in a real browser: all of them drawn, nothing cut off, nothing on the console, no network."""

import pytest

from browser import Browser
from made_experiment import write_experiment
from peer_scale.reporting.build import write_report
from report_pages import CONFIG, log_folder, records

pytestmark = pytest.mark.browser
WIDE_AND_NARROW = (1440, 390)
# what, outside of drawings, reaches beyond the page's right edge, but for what can be scrolled within its own box
CUT_OFF = """[...document.querySelectorAll('body *')].filter((each) => {
  const box = each.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1) && !each.closest('.scroll, pre, svg')
    && getComputedStyle(each).position !== 'absolute';
}).map((each) => each.outerHTML.slice(0, 120))"""
# texts of a figure that lie outside of it
CUT_LABELS = """[...document.querySelectorAll('.plot')].flatMap((plot) => {
  const outer = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('svg text')].filter((text) => {
    const box = text.getBoundingClientRect();
    return box.width > 0 && (box.left < outer.left - 1 || box.right > outer.right + 1 || box.bottom > outer.bottom + 1);
  }).map((text) => `${plot.id}: ${text.textContent}`);
})"""
EMPTY = """[...document.querySelectorAll('.plot')].filter((plot) => ![...plot.querySelectorAll(
  '.scatterlayer path.js-line, .scatterlayer path.point, .scatterlayer path.js-fill')].some((path) => {
    const box = path.getBoundingClientRect();
    return box.width > 0 || box.height > 0;
  })).map((plot) => plot.getAttribute('aria-label'))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    one = log_folder(folder / "runs" / "a-run-with-a-long-name-that-has-no-spaces-in-it", records(range(1, 301)))
    log_folder(folder / "runs" / "two", records(range(1, 201), seed=2), {**CONFIG, "name": "bert-tiny"})
    log_folder(folder / "runs" / "three", records(range(1, 301), seed=3), {**CONFIG, "seed": 3})
    write_experiment(folder / "made")
    paths = {"one": one, "three": folder / "runs", "experiment": folder / "made"}
    for name, path in paths.items():
        write_report([path], folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in paths}


def look(browser) -> None:
    assert browser.run("document.documentElement.scrollWidth <= innerWidth") is True
    assert browser.run(CUT_OFF) == []
    assert browser.run(CUT_LABELS) == []
    assert browser.run(EMPTY) == []
    assert browser.console == []


@pytest.mark.parametrize("width", WIDE_AND_NARROW)
@pytest.mark.parametrize("name", ["one", "three", "experiment"])
def test_pages(browser, pages, name, width, tmp_path):
    for scheme in ("light", "dark"):
        browser.screen(width, 900, scheme)
        browser.open(pages[name])
        look(browser)
        dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
        assert dark == (scheme == "dark")
        assert [url for url in browser.requests if not url.startswith(("file:", "blob:", "data:"))] == []
        browser.picture(tmp_path / f"{name}-{width}-{scheme}.png")


def test_what_the_reader_changes(browser, pages):
    browser.screen(1440, 900, "light")
    browser.open(pages["three"])
    first = "document.querySelector('.plot')"
    ink = f"getComputedStyle({first}.querySelector('.xtick text')).fill"
    light = browser.run(ink)
    for axis, title in (("tokens", "tokens"), ("train_flops", "FLOPs"), ("time_s", "time of training, seconds")):
        browser.run(f"document.querySelector('input[value={axis}]').click()")
        browser.wait_for(
            f"[...document.querySelectorAll('.xtitle')].some((each) => each.textContent.startsWith('{title}'))"
        )
        look(browser)
    highest = f"{first}.layout.xaxis.range[1]"
    assert browser.run(highest) == pytest.approx(75 * 1.02, rel=0.01), "300 steps of a quarter of a second"
    browser.run("document.getElementById('log').click()")
    browser.wait_for(f"{first}.layout.xaxis.type === 'log'")
    look(browser)
    browser.run("document.querySelector('.arm').click()")
    browser.wait_for(f"{first}.data.some((trace) => trace.visible === false)")
    assert browser.run(f"{first}.data.every((trace) => (trace.visible === false) === (trace.meta.arm === 0))") is True
    browser.run("document.querySelector('.arm').click()")
    browser.screen(1440, 900, "dark")
    browser.wait_for(f"{ink} !== '{light}'")
    look(browser)


def test_a_stretch_is_shown_in_all_figures(browser, pages):
    browser.screen(1440, 900, "light")
    browser.open(pages["one"])
    browser.run(
        "Plotly.relayout(document.querySelector('.plot'), {'xaxis.range[0]': 50, 'xaxis.range[1]': 90}).then(() => 1)"
    )
    browser.wait_for("[...document.querySelectorAll('.plot')].every((plot) => plot.layout.xaxis.range[0] === 50)")
    assert browser.console == []


def test_csv(browser, pages):
    browser.screen(1440, 900, "light")
    browser.open(pages["three"])
    browser.run(
        "window.saved = []; URL.createObjectURL = (blob) => { window.saved.push(blob); return 'data:,'; };"
        "document.getElementById('curves-csv').click(); document.querySelector('[data-csv=results]').click(); 1"
    )
    curves, results = browser.run("Promise.all(window.saved.map((blob) => blob.text()))")
    header, *rows = curves.splitlines()
    assert header == "figure,arm,curve,name,step,tokens,train_flops,time_s,value"
    assert any(row.startswith("Loss,") and ",300,150000,300000000000,75," in row for row in rows)
    assert results.splitlines()[0].count(",") >= 2 and "±" in results
