"""The report in a real browser: no error on its console, no request, every poster, filters, light and dark, a phone."""

import io

import numpy as np
import pytest
from browser import CHROMIUM, browser
from conftest import Opened, draw_posters, movielens, words
from PIL import Image
from reports import write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")

# The posters that are on the screen now: their items, sizes, and the images of those that have one, once decoded
POSTERS = """Promise.all([...document.querySelectorAll('.card .poster')].map(async poster => {
    const box = poster.getBoundingClientRect(), image = new Image()
    const address = getComputedStyle(poster).backgroundImage.match(/^url\\("(data:image.*)"\\)$/)
    if (address) { image.src = address[1]; await image.decode() }
    return [+poster.classList[1].slice(1), box.width, box.height, address ? image.naturalHeight : 0]
}))"""
OPEN_ALL = "document.querySelectorAll('.card details').forEach(card => { card.open = true })"
VISIBLE = "[...document.querySelectorAll('.card')].filter(card => card.offsetHeight).map(card => card.className)"
# The contrast of each text to the nearest background that is not transparent, as WCAG computes it; texts of 3 or less
FAINT = """(() => {
    const numbers = text => text.match(/[\\d.]+/g).map(Number)
    const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
    const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255)
    const ground = node => { for (; node; node = node.parentElement) {
        const colour = numbers(getComputedStyle(node).backgroundColor); if (colour[3] !== 0) return colour }
        return [255, 255, 255] }
    const faint = []
    for (const node of document.querySelectorAll('body *')) {
        const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())
        if (!own || !node.getClientRects().length) continue
        const style = getComputedStyle(node), ink = numbers(node instanceof SVGElement ? style.fill : style.color)
        const [high, low] = [light(ink), light(ground(node))].sort((a, b) => b - a)
        if ((high + .05) / (low + .05) < 4.5) faint.push([node.tagName, node.className, node.textContent.slice(0, 30)])
    }
    return faint })()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def report(prepared, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    made = write_page(prepared, path)
    return path, made


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_shows_every_poster_and_no_error(page, report, width, dark):
    path, (_, systems, data, *_) = report
    page.look(width, 900, dark)
    page.open(path)
    page.value(OPEN_ALL)
    posters = page.value(POSTERS)
    assert len(posters) > 300 and page.value("document.querySelectorAll('.card .target').length") == (
        len(systems) * page.value("document.querySelectorAll('.card').length")
    )
    for item, box_width, box_height, image_height in posters:
        assert box_width > 40 and box_height > 50
        assert (image_height > 0) == (data.items.images[item] is not None), data.items.ids[item]
    assert page.messages == [] and page.requests() == [path.resolve().as_uri()]
    assert page.value("window.broken") is None and page.value("document.querySelectorAll('h1').length") == 1
    assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
    charts = page.value("[...document.querySelectorAll('.charts')].map(row => [row.scrollWidth, row.clientWidth])")
    assert charts and all((whole > shown) == (width == 360 and whole > 360) for whole, shown in charts)
    assert any(whole > shown for whole, shown in charts) == (width == 360)
    tables = page.value("[...document.querySelectorAll('.scroll')].map(box => [box.scrollWidth, box.clientWidth])")
    assert tables and all(whole <= shown for whole, shown in tables)
    assert page.value(FAINT) == []
    ink, ground = (page.value(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    brightness = [sum(map(int, text[4:-1].split(","))) for text in (ink, ground)]
    assert (brightness[0] > brightness[1]) == dark


@pytest.mark.parametrize("width", [1200, 360])
def test_an_example_is_a_line_until_it_is_opened(page, report, width):
    """The first example of each group is open. The line names the target's place in each run."""
    page.look(width, 900)
    page.open(report[0])
    lines = page.value("[...document.querySelectorAll('.card')].map(c => [c.offsetHeight, c.children[0].open])")
    assert sum(is_open for _, is_open in lines) <= 4 < len(lines)
    assert lines[0][1] and all((height > 200) == is_open and height < 2000 for height, is_open in lines)
    assert all(height < 130 for height, is_open in lines if not is_open)
    number = [is_open for _, is_open in lines].index(False)
    card = f"document.querySelectorAll('.card')[{number}]"
    text = page.value(f"{card}.innerText")
    assert "target's place (of 10)" in text and "history" not in text
    page.value(f"{card}.querySelector('summary').click()")
    assert page.value(f"{card}.offsetHeight") > 200 and "history, oldest first" in page.value(f"{card}.innerText")


def test_the_filters_hide_the_other_cards(page, report):
    page.look()
    page.open(report[0])
    cards = page.value("[...document.querySelectorAll('.card')].map(card => card.className)")
    assert page.value(VISIBLE) == cards
    ids = page.value("[...document.querySelectorAll('fieldset label')].map(label => label.htmlFor)")
    picked, outcome = ([id_ for id_ in ids if id_.startswith(group)] for group in ("picked", "outcome"))
    assert len(picked) == 5 and len(outcome) == 4
    hidden = 0
    for one in picked:
        for two in outcome:
            for id_ in (one, two):
                page.value(f"document.querySelector('label[for=\"{id_}\"]').click()")
            tags = [id_.partition("-")[2] for id_ in (one, two) if not id_.endswith(("is-all", "is-any"))]
            expected = [card for card in cards if set(tags) <= set(card.split())]
            assert page.value(VISIBLE) == expected
            hidden += len(cards) - len(expected)
    assert hidden > len(cards)


def test_the_colours_of_the_posters_are_on_the_screen(page, tmp_path):
    """A picture of the page has as much of each poster's colour as the number of its tiles says."""
    import prepare_data

    movielens(tmp_path / "raw", users=12)
    draw_posters(tmp_path / "raw" / "posters")
    colours = {}
    for number, path in enumerate(sorted((tmp_path / "raw" / "posters").iterdir())):
        colours[path.stem] = (number % 4 * 80, number // 4 % 4 * 80, number // 16 * 80)
        Image.new("RGB", (60, 90), colours[path.stem]).save(path)
    argv = ["--dataset", "movielens", "--source", tmp_path / "raw", "--out", tmp_path / "data", "--max-pixels", 784]
    prepare_data.main(words(*argv, "--min-interactions", 5))
    write_page(tmp_path / "data", tmp_path / "report.html")
    page.look()
    page.open(tmp_path / "report.html")
    page.value(OPEN_ALL)
    tiles = {}
    for item, width, height, _ in page.value(POSTERS):
        tiles[item] = tiles.get(item, 0) + width * height
    pixels = np.asarray(Image.open(io.BytesIO(page.picture())).convert("RGB")).reshape(-1, 3).astype(np.int16)
    pixels = pixels[(pixels < 248).all(1)]
    nearest = (pixels + 40) // 80
    pixels = nearest[(np.abs(pixels - 80 * nearest) < 8).all(1)]  # JPEG changes the colours a little
    counts = np.bincount(pixels @ [1, 4, 16], minlength=64)
    ids = Opened(tmp_path / "data").items.ids
    assert len(tiles) > 20
    for item, area in tiles.items():
        if ids[item] in colours:
            red, green, blue = (value // 80 for value in colours[ids[item]])
            assert 0.6 * area < counts[red + 4 * green + 16 * blue], ids[item]
