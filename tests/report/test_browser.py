"""The page in headless Chromium, without a network: it draws and reacts, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from src.loggers.csv import read_table
from src.report.compare import write_comparison
from src.report.page import write_page
from tests.report.runs import answers, metrics, sample, write_run
from tests.report.test_page import HOSTILE

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NETWORK = ("http", "ws", "ftp", "//")
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this system (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A healthy run, one with hostile texts, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    tokens = [" that", " is", " great", ".", "<eos>"]
    mine = [sample(i, row, tokens) for i in (1, 20, 40) for row in range(3)]
    recorded = read_table(Path(__file__).parent / "recorded" / "sentiment_seed_1.csv")
    plain = write_run(folder / "plain", samples=mine, metrics=recorded)
    theirs = [sample(1, 0, [" a", HOSTILE, "\u202eb\x1b[2J"], prompt=HOSTILE)]
    bad = answers(3, before=HOSTILE, after="\u202egnol")
    hostile = write_run(folder / "hostile", metrics=metrics(40, wide=True), samples=theirs, comparison=bad)
    other = write_run(folder / "other", "ppo.clip=0.1", "seed=2", metrics=metrics(20, wide=True), iterations=20)
    return {
        "plain": write_page(plain),
        "hostile": write_page(hostile),
        "comparison": write_comparison([plain, other], failed={"ppo.clip=9": HOSTILE}),
    }


@pytest.fixture
def visit(browser, pages):
    """Open a page; at the end of the test it must have asked for nothing and complained of nothing."""
    seen, contexts = [], []

    def go(name, size=DESK, scheme="light"):
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a busy machine
        page.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: (seen.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: seen.append(request.url) if request.url.startswith(NETWORK) else None)
        page.goto(pages[name].as_uri())
        page.wait_for_function("typeof Bokeh !== 'undefined'")
        return page

    yield go
    for context in contexts:
        context.close()
    assert seen == []


def scroll_through(page):
    height = page.evaluate("document.documentElement.scrollHeight")
    for y in range(0, height, 500):
        page.evaluate(f"scrollTo(0, {y})")
        page.wait_for_timeout(60)


def colors_of(locator):
    """How many colors a picture of an element has."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(locator.screenshot())) as picture:
        return len(picture.convert("RGB").getcolors(1 << 20))


@pytest.mark.parametrize("name", ["plain", "hostile", "comparison"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_every_chart_is_drawn_without_an_error_and_nothing_is_wider_than_the_screen(name, size, visit):
    page = visit(name, size)
    scroll_through(page)
    page.wait_for_timeout(300)
    visible = page.locator(".chart:visible")
    assert visible.count() > 10
    for index in range(visible.count()):
        visible.nth(index).scroll_into_view_if_needed()
        visible.nth(index).locator("canvas").first.wait_for()
    assert colors_of(visible.nth(2)) > 20
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_the_first_screen_shows_what_improved_at_what_kl_and_two_texts(size, scheme, visit):
    page = visit("plain", size, scheme)
    shown = page.locator("#first .card, #first article:visible .two")
    texts = [shown.nth(i).inner_text() for i in range(shown.count())]
    bottoms = [shown.nth(i).bounding_box() for i in range(shown.count())]
    assert all(box["y"] + box["height"] <= size["height"] for box in bottoms)
    assert "0.050 → 2.000" in " ".join(texts[0].split())
    assert "KL to the reference" in texts[2]
    assert "nothing looks wrong" in texts[3]
    assert [text.count("that is") for text in texts[4:]] == [2, 2]


def test_a_chart_answers_the_pointer(visit):
    page = visit("plain")
    chart = page.locator(".chart:visible").nth(3)
    chart.scroll_into_view_if_needed()
    chart.locator("canvas").first.wait_for()
    page.wait_for_timeout(500)
    box = chart.bounding_box()
    for share in (0.5, 0.6):
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] * 0.5)
    tip = page.locator(".bk-tooltip-content:visible").first
    tip.wait_for()
    assert "iteration" in tip.inner_text()


def test_the_dark_page_is_dark_and_its_charts_follow_a_change(visit):
    page = visit("plain", scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 30)"
    chart = page.locator("#curves .chart").first
    chart.scroll_into_view_if_needed()
    page.wait_for_timeout(400)
    before = chart.screenshot()
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(600)
    assert chart.screenshot() != before
    assert colors_of(chart) > 20


def test_the_curves_are_found_by_name_with_the_keyboard(visit):
    page = visit("plain")
    page.locator("#filter").focus()
    page.keyboard.type("variance")
    assert page.locator("#curves figure:visible").count() == 1
    assert "explained variance" in page.locator("#curves figure:visible").inner_text()
    for _ in "variance":
        page.keyboard.press("Backspace")
    assert page.locator("#curves figure:visible").count() > 5


def test_answers_are_leafed_through_and_sorted_with_the_keyboard(visit):
    page = visit("plain")

    def prompts():
        return page.locator("#answers article:visible .prompt").all_inner_texts()

    assert prompts() == ["Film 0", "Film 1"]
    page.locator("#answers-on").focus()
    page.keyboard.press("Enter")
    assert prompts() == ["Film 2", "Film 3"]
    assert page.locator("#answers-place").inner_text() == "3 of 9"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Space")
    assert prompts() == ["Film 8"]
    page.locator("#answers-order").select_option("loss")  # 2 - 0.05 row - 0.1 row: the last one gained least
    assert prompts() == ["Film 8", "Film 7"]


def test_tokens_are_walked_through_with_the_keyboard(visit):
    page = visit("plain")
    assert page.locator("#token-text").inner_text() == " that is great.<eos>"
    page.locator("#token-quantity").focus()
    page.keyboard.press("Tab")
    numbers = page.locator("#token-numbers")
    assert "token 1 of 5, “ that”" in numbers.inner_text()
    page.keyboard.press("ArrowRight")
    assert "token 2 of 5" in numbers.inner_text()
    for part in ("KL to the reference -0.05", "ratio after the update -0.05", "clipped or not 1"):
        assert part in numbers.inner_text()
    page.keyboard.press("End")
    assert "token 5 of 5, “<eos>”" in numbers.inner_text()
    assert numbers.get_attribute("aria-live") == "polite"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    row = page.locator("#token-all tbody tr").nth(1)
    row.wait_for()  # the page draws the table when the browser says, later, that it was opened
    cells = row.locator("th, td").all_inner_texts()
    assert [cell.strip() for cell in cells] == ["is", *["-0.05"] * 7, "1"]


def test_a_token_has_the_color_of_the_chosen_number_and_is_tapped_on_a_phone(visit):
    page = visit("plain", PHONE)

    def tints():
        return page.locator(".token").evaluate_all("all => all.map(b => getComputedStyle(b).backgroundColor)")

    of_kl = tints()
    assert len(set(of_kl)) == 5
    page.locator("#token-quantity").select_option("clipped")
    assert tints() != of_kl
    page.locator("#token-table").select_option("1")
    page.locator(".token").nth(2).click()
    assert "token 3 of 5" in page.locator("#token-numbers").inner_text()


def test_hostile_texts_are_shown_and_not_run(visit):
    page = visit("hostile")
    assert "<script>alert(1)</script>" in page.locator("#answers").inner_text()
    assert "<script>alert(1)</script>" in page.locator("#token-text").inner_text()
    assert page.locator("#token-text").inner_text().endswith("\\u202eb␛[2J")
    assert page.locator("img").count() == 0
