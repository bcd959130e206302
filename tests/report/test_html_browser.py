"""The page of a sweep in a browser: what a reader sees, points at, switches off, prints.

It needs Chromium ($FEDRAY_CHROMIUM, or one on the PATH) and playwright, and is skipped without. The quick tier opens
the page a few times, the full tier tries every control.
"""

import os
import shutil

import pytest
from many_runs import write_grid, write_one

from fedray.report.html import write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("FEDRAY_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
CHARTS = ("curves", "front", "bytes", "layers", "clients", "masks")
LIMIT_BYTES = 8_000_000

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'fedray[dev]'")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: install it, or name its program in FEDRAY_CHROMIUM"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Open a file; anything that the page says on the console or asks of a network fails the test."""
    contexts, said = [], []

    def go(path, *, width=1280, height=800, ready="html[data-drawn]", **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda asked: said.append(asked.url) if asked.url != path.as_uri() else None)
        page.goto(path.as_uri())
        page.wait_for_selector(ready, state="attached")
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The page of a small sweep: 3 pruners x 2 sparsities x 2 seeds, and a run that failed."""
    folder = tmp_path_factory.mktemp("grid")
    write_grid(
        folder, pruners=("magnitude", "feddst", "snip"), sparsities=(0.5, 0.9), alphas=(0.3,), seeds=(0, 1), rounds=20
    )
    write_one(folder / "bad", seed=9, status="failed", error="client 8 sent nan", log="Traceback: it broke")
    return write_page(folder, title="A small grid")[0]


def tip_of(page, chart, x=0.6, y=0.5):
    """What a chart says where the pointer is, at a fraction of its width and height."""
    place = page.locator(f"#chart-{chart}")
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    page.mouse.move(box["x"] + x * box["width"] - 3, box["y"] + y * box["height"])
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    shown = place.locator(".tip")
    shown.wait_for(state="visible")
    return shown.inner_text()


def tip_of_mark(page, chart):
    """What a chart says of the first of its outlined circles: a 10th percentile, a setting on the front."""
    place = page.locator(f"#chart-{chart}")
    place.scroll_into_view_if_needed()
    place.locator("path[stroke='#1b1f24'][d^='M1 0']").first.hover(force=True)
    shown = place.locator(".tip")
    shown.wait_for(state="visible")
    return shown.inner_text()


def lines_of(page, chart="curves"):
    """How many lines of a method's width a chart has."""
    return page.locator(f"#chart-{chart} svg path[stroke-width='2.2']").count()


def redrawn(page, action):
    """Do something and wait until all charts have followed."""
    before = page.locator("html").get_attribute("data-drawn")
    action()
    page.wait_for_selector(f"html[data-drawn]:not([data-drawn='{before}'])", state="attached")


def test_every_chart_is_drawn_and_nothing_is_wider_than_a_laptop(opened, grid):
    page = opened(grid)
    for chart in CHARTS:
        assert page.locator(f"#chart-{chart} svg path").count() > 3, chart
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#table").evaluate("table => table.offsetWidth <= table.parentElement.clientWidth")
    assert page.locator(".still").is_hidden()
    assert page.locator("summary", has_text="client 8 sent nan").is_visible()
    assert page.get_by_text("Traceback: it broke").is_visible()


def test_pointing_at_a_curve_names_every_setting_there_with_what_was_recorded(opened, grid):
    page = opened(grid)
    text = tip_of(page, "curves")
    assert text.startswith("test/accuracy at round")
    for label in ("magnitude 0.5", "magnitude 0.9", "feddst 0.5", "feddst 0.9", "snip 0.5", "snip 0.9"):
        assert label in text
    assert text.count("±") == 6


@pytest.mark.full
def test_pointing_at_the_other_charts_says_what_is_there(opened, grid):
    page = opened(grid)
    assert "up: mask" in tip_of(page, "bytes")
    assert "sparsity" in tip_of(page, "layers")
    assert "10th percentile" in tip_of_mark(page, "clients")
    assert "On the Pareto front" in tip_of_mark(page, "front")


def test_a_method_that_is_switched_off_leaves_the_charts_and_the_table_and_comes_back(opened, grid):
    page = opened(grid)
    rows = page.locator("#table tbody tr:visible")
    button = page.locator("[data-facet=pruner][data-value=snip]")
    assert (lines_of(page), rows.count()) == (6, 6)
    redrawn(page, button.click)
    assert button.get_attribute("aria-pressed") == "false"
    assert (lines_of(page), rows.count()) == (4, 4)
    assert "snip" not in tip_of(page, "curves")
    redrawn(page, page.locator("#reset").click)
    assert (lines_of(page), rows.count()) == (6, 6)


def test_no_two_settings_have_the_same_line(opened, tmp_path):
    for at in range(10):
        for sparsity in (0.5, 0.8, 0.9)[: 3 if at < 2 else 1]:
            write_one(tmp_path / f"{at}-{sparsity}", pruner=f"p{at}", sparsity=sparsity)
    page = opened(write_page(tmp_path)[0])
    if page.locator("[data-lines=every]").get_attribute("aria-pressed") == "false":
        redrawn(page, page.locator("[data-lines=every]").click)
    lines = page.locator("#chart-curves svg path[stroke-width='2.2']").evaluate_all(
        "paths => paths.map(path => [path.getAttribute('stroke'), path.getAttribute('stroke-dasharray')].join(' '))"
    )
    assert len(lines) == 14
    assert len(set(lines)) == 14


@pytest.mark.full
def test_bold_follows_what_is_shown(opened, grid):
    page = opened(grid)

    def bold():
        (column,) = [
            at for at, text in enumerate(page.locator("#table thead th").all_inner_texts()) if text == "test/accuracy"
        ]
        cells = page.locator(f"#table tbody tr:visible td:nth-child({column + 1})")
        values = cells.evaluate_all(
            "cells => cells.map(cell => [Number(cell.dataset.value), cell.className.includes('best')])"
        )
        return [is_best for _, is_best in values], [value == max(value for value, _ in values) for value, _ in values]

    found, expected = bold()
    assert found == expected
    redrawn(page, page.locator("[data-facet='pruner.sparsity'][data-value='0.5']").click)
    found, expected = bold()
    assert len(found) == 3
    assert found == expected


@pytest.mark.full
def test_best_of_each_method_draws_one_line_for_each(opened, grid):
    page = opened(grid)
    redrawn(page, page.locator("[data-lines=best]").click)
    assert lines_of(page) == 3
    assert page.locator("#table tbody tr:visible").count() == 6
    assert "3 lines" in page.locator("#shown").inner_text()


@pytest.mark.full
def test_metric_axis_and_cost_can_be_chosen(opened, grid):
    page = opened(grid)
    page.select_option("#metric", "train/loss")
    page.select_option("#across", "mb")
    text = tip_of(page, "curves", 0.4)
    assert text.startswith("train/loss at")
    assert "MB" in text
    assert "(round " in text
    page.select_option("#cost", "sparsity")
    assert "sparsity" in page.locator("#chart-front").get_attribute("aria-label")
    assert page.locator("#across option").all_inner_texts() == ["round", "cumulative MB", "wall time (s)"]


@pytest.mark.full
def test_single_seeds_add_a_thin_line_for_each(opened, grid):
    page = opened(grid)
    thin = page.locator("#chart-curves svg path[stroke-width='0.8']")
    assert thin.count() == 0
    page.check("#seeds")
    assert thin.count() == 12


@pytest.mark.full
def test_a_column_sorts_both_ways(opened, grid):
    page = opened(grid)
    head = page.locator("#table thead th").filter(has_text="test/loss")
    column = page.locator("#table thead th").all_inner_texts().index("test/loss") + 1

    def values():
        return [float(text.split()[0]) for text in page.locator(f"#table td:nth-child({column})").all_inner_texts()]

    head.get_by_role("button").click()
    assert (head.get_attribute("aria-sort"), values()) == ("ascending", sorted(values()))
    head.get_by_role("button").click()
    assert (head.get_attribute("aria-sort"), values()) == ("descending", sorted(values(), reverse=True))


@pytest.mark.full
def test_the_keyboard_reaches_every_point_of_a_curve_and_says_it(opened, grid):
    page = opened(grid)
    page.locator("#chart-curves").focus()
    page.keyboard.press("ArrowRight")
    says = page.locator("#says")
    first = says.inner_text()
    assert first.startswith("feddst 0.5: ")
    assert first.endswith("at round 1")
    page.keyboard.press("ArrowRight")
    assert says.inner_text().endswith("at round 2")
    page.keyboard.press("ArrowDown")
    assert says.inner_text().startswith("feddst 0.9: ")
    assert page.locator("#chart-curves .tip").is_visible()
    page.locator("#chart-bytes").focus()
    page.keyboard.press("ArrowDown")
    assert "MB mask" in says.inner_text()


@pytest.mark.full
def test_dark_follows_the_system_and_the_button_overrules_it(opened, grid):
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened(grid), opened(grid, color_scheme="dark")
    white, black = light.evaluate(paper), dark.evaluate(paper)
    assert white != black
    for _ in range(2):
        redrawn(dark, dark.locator("#theme").click)
    assert dark.locator("#theme").inner_text() == "Theme: light"
    assert dark.evaluate(paper) == white
    redrawn(light, light.locator("#theme").click)
    assert light.evaluate(paper) == black


@pytest.mark.full
def test_print_is_light_without_controls_and_with_every_row(opened, grid):
    page = opened(grid, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#filters").is_hidden()
    assert page.locator("#results .scroll").evaluate("box => getComputedStyle(box).maxHeight") == "none"
    assert lines_of(page) == 6
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen", color_scheme="dark")
    assert page.locator("html").get_attribute("data-theme") is None
    assert len(page.pdf(format="A4")) > 20_000


@pytest.mark.full
def test_a_narrow_window_scrolls_in_one_direction(opened, grid):
    page = opened(grid, width=420)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.full
def test_without_scripts_the_table_the_failures_and_a_still_picture_are_there(opened, grid):
    page = opened(grid, ready="#table", java_script_enabled=False)
    assert page.locator("#table tbody tr").count() == 6
    assert page.locator(".still polyline").count() == 6
    assert page.locator("summary", has_text="client 8 sent nan").is_visible()
    assert page.locator("#chart-curves").is_hidden()
    assert page.locator("#metric").is_hidden()


def test_a_hostile_name_is_shown_and_never_run(opened, tmp_path):
    rows = write_one(tmp_path / "a", pruner=HOSTILE, log=HOSTILE) / "rounds.jsonl"
    rows.write_text(rows.read_text().replace("conv2.weight", HOSTILE).replace("fc1.weight", f"{HOSTILE} 2"))
    write_one(tmp_path / "b", pruner="snip")
    write_one(tmp_path / "c", pruner="x", status="failed", error=HOSTILE, log=HOSTILE)
    page = opened(write_page(tmp_path, title=HOSTILE)[0])
    assert HOSTILE in tip_of(page, "curves")
    assert "up: mask" in tip_of(page, "bytes", 0.6, 0.4)
    assert HOSTILE in tip_of_mark(page, "clients")
    page.select_option("#layer-group", "0")
    assert HOSTILE in tip_of(page, "layers", 0.6)
    page.select_option("#compare-a", "0")
    assert HOSTILE in page.locator("#compare").inner_text()
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None


@pytest.mark.full
def test_settings_can_be_compared_two_by_two(opened, grid):
    page = opened(grid)
    page.select_option("#compare-a", label="magnitude 0.5")
    page.select_option("#compare-b", label="magnitude 0.9")
    assert page.locator("#compare tbody tr").all_inner_texts() == ["pruner.sparsity\t0.5\t0.9"]


@pytest.mark.full
def test_a_page_of_failures_alone_opens(opened, tmp_path):
    write_one(tmp_path / "bad", status="failed", error="it broke")
    page = opened(write_page(tmp_path)[0], ready="html[data-ready]")
    assert page.locator("summary", has_text="it broke").is_visible()


@pytest.mark.full
def test_one_run_alone_has_a_page(opened, tmp_path):
    write_one(tmp_path / "a", pruner="none", overlap=False)
    page = opened(write_page(tmp_path)[0])
    assert lines_of(page) == 1
    assert "runs without a mask have none" in page.locator("#chart-layers").inner_text()


@pytest.mark.full
def test_540_runs_are_below_8_MB_and_can_be_used(opened, tmp_path):
    write_grid(tmp_path, rounds=200)
    path, page = write_page(tmp_path)
    assert page.counts == {"finished": 540}
    assert path.stat().st_size < LIMIT_BYTES
    page = opened(path)
    assert page.locator("#table tbody tr").count() == 180
    assert lines_of(page) == 6  # the best of each pruner
    assert "rigl" in tip_of(page, "curves")
    redrawn(page, page.locator("[data-facet=pruner][data-value=rigl]").click)
    assert (page.locator("#table tbody tr:visible").count(), lines_of(page)) == (150, 5)
    redrawn(page, page.locator("[data-lines=every]").click)
    assert page.locator("#chart-curves svg path[stroke-width='1.2']").count() >= 150
    assert "and 138 more" in tip_of(page, "curves")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
