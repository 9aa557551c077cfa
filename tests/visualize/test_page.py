import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright: fastroute[browser]")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page):
    """Return a function that opens the page offline; fail after the test on any message in the console."""
    messages, contexts = [], []

    def open_page(width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.goto(page.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overflows(opened, width, scheme):
    tab = opened(width, scheme)
    outside = """[...document.querySelectorAll("body *")].filter((element) => {
        const { left, right } = element.getBoundingClientRect();
        return !element.closest(".scroll > *, .drawing svg *") && (right > innerWidth + 0.5 || left < 0)
    }).map((element) => element.outerHTML)"""
    assert tab.evaluate("document.documentElement.scrollWidth") <= width and tab.evaluate(outside) == []
    assert tab.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth && image.alt)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_themes(opened, scheme):
    tab = opened(scheme=scheme)
    colours = """["body", ".drawing > svg text"].map((place) => {
        const style = getComputedStyle(document.querySelector(place));
        return place === "body" ? [style.color, style.backgroundColor] : [style.fill, ""]})"""
    (ink, paper), (text, _) = tab.evaluate(colours)
    ink_level, paper_level = (sum(map(int, rgb[4:-1].split(", "))) for rgb in (ink, paper))
    assert text == ink and abs(ink_level - paper_level) > 500
    assert (ink_level > paper_level) == (scheme == "dark")


def test_controls_choose_the_image_and_edges_say_their_gate(opened):
    tab = opened()
    picture, reading = tab.locator("#picture"), tab.locator("#reading")
    first = picture.get_attribute("src"), tab.locator("#flow").inner_html()
    tab.select_option("#list", "3")
    assert tab.input_value("#slider") == "3" and picture.get_attribute("alt").startswith("Image 4:")
    assert picture.get_attribute("alt") == f"Image 4: {tab.locator('#caption').inner_text()}"
    assert picture.get_attribute("src") != first[0] and tab.locator("#flow").inner_html() != first[1]
    tab.focus("#slider")
    tab.keyboard.press("ArrowRight")
    assert tab.input_value("#list") == "4" and picture.get_attribute("alt").startswith("Image 5:")

    gate = tab.evaluate("JSON.parse(document.getElementById('flow-data').textContent)[4].layers[1].gates[1][0]")
    edge = tab.locator('.edge[aria-label^="stack1: g21"]')
    assert tab.locator(".flow .value").all_text_contents()[4] == f"{gate:.2f}"
    assert edge.count() == 1 and tab.locator(".edge").count() == 2 + 3 * 4
    edge.dispatch_event("pointerenter")
    assert reading.inner_text() == f"stack1: g21 = {gate:.3f}, of path 2 to path 1"
    tab.locator(".edge").first.focus()
    assert reading.inner_text().startswith("stem: g11 = ")
