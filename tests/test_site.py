"""leaderboard.html in a real browser, opened from the disk with no network."""

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright
from test_leaderboard import DENSE, a_cell, a_grid, make_score, small_board, write_cell

from prunebench.leaderboard import build

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update",
             "--disable-sync"]  # fmt: skip
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium binary: apt-get install chromium to test the page"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    files, expected = small_board(tmp_path_factory.mktemp("runs"))
    out = tmp_path_factory.mktemp("site")
    build(files, out, expected_cells=expected, title="Embedded track")
    return out


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, folder):
    """The page at 1280 pixels; any console error, exception or request to a network fails."""
    page, problems = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith("http")
            and problems.append(request.url))  # fmt: skip
    page.goto((folder / "leaderboard.html").as_uri())
    yield page
    page.close()
    assert problems == []


def column(page: Page, name: str) -> list[tuple[str, str]]:
    """(method and recovery, text) of the shown rows in their order on the page."""
    return page.evaluate(
        """(name) => [...document.querySelectorAll("#leaderboard tbody tr:not([hidden])")].map(
        (row) => [row.dataset.method + " " + row.dataset.recovery,
                  row.querySelector("td." + name).innerText])""",
        name,
    )


def methods(page: Page) -> list[str]:
    return [name for name, _ in column(page, "fid")]


def click(page: Page, name: str) -> str:
    """Click a header; returns its aria-sort."""
    head = page.locator(f"th[data-column={name}]")
    head.locator("button").click()
    return head.get_attribute("aria-sort")


PUBLISHED = ["dense none", "steps-5 none", "good none", "mask none", "random none", "broken none",
             "absent none", "good finetune-low"]  # fmt: skip


def test_every_row_is_there_and_every_image_loads(page):
    assert methods(page) == PUBLISHED
    page.wait_for_load_state("load")
    widths = page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert len(widths) == 3 and min(widths) > 0
    assert page.locator("#count").inner_text() == "8 of 8 rows"


def test_sorting_is_numeric_and_keeps_failures_last(page):
    rising = ["dense none", "good finetune-low", "good none", "steps-5 none", "mask none",
              "random none"]  # fmt: skip
    last = ["broken none", "absent none"]
    assert click(page, "fid") == "ascending" and methods(page) == rising + last
    assert click(page, "fid") == "descending" and methods(page) == rising[::-1] + last
    assert click(page, "fid") == "none" and methods(page) == PUBLISHED
    assert click(page, "title") == "ascending"
    assert methods(page)[-2:] == last[::-1] and methods(page)[0] == "dense none"
    assert page.locator("th[data-column=fid]").get_attribute("aria-sort") == "none"


def test_failed_row_shows_dashes_and_its_reason(page):
    assert dict(column(page, "fid"))["broken none"] == "—"
    assert "loss <NaN> at 50%_step" in page.locator("#failed").inner_text()


def test_filters_narrow_the_rows_and_keep_references(page):
    page.select_option("#recovery", "finetune-low")
    assert methods(page) == ["dense none", "steps-5 none", "good finetune-low"]
    page.select_option("#recovery", "")
    page.fill("#search", "good")
    assert methods(page) == ["good none", "good finetune-low"]
    page.fill("#search", "")
    page.select_option("#model", "sit")
    assert len(methods(page)) == 8


def test_links_lead_to_published_files(page, folder):
    page.check("#everything")
    links = page.eval_on_selector_all(
        "a[href]:not([href^='#'])", "(all) => all.map((a) => a.getAttribute('href'))"
    )
    assert sum(link.startswith("raw/") for link in links) == 20
    assert [link for link in links if not (folder / link).is_file()] == []


def test_tooltip_explains_a_column(page):
    page.hover("th[data-column=lpips] button")
    assert "Perceptual distance" in page.locator("#tip").inner_text()


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_itself_never_scrolls_sideways(page, tmp_path, width):
    page.set_viewport_size({"width": width, "height": 900})
    picture = page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert picture.startswith(b"\x89PNG")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_model_filter_hides_the_figures_of_other_models(browser, tmp_path):
    files, _ = small_board(tmp_path / "runs")
    score = make_score(a_cell("dense") | {"model": "unet"}, **DENSE)
    files.append(write_cell(tmp_path / "more", score, a_grid()))
    build(files, tmp_path / "out", expected_cells=None, title="Two models")
    page = browser.new_page()
    page.goto((tmp_path / "out/leaderboard.html").as_uri())
    page.select_option("#model", "unet")
    assert page.locator("figure:visible").count() == 3 and len(methods(page)) == 1
