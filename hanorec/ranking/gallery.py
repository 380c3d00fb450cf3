"""The report's gallery: chosen examples with the posters of their histories, and of their candidates in each order."""

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hanorec.data.folder import DataFolder, Example
from hanorec.model.images import open_image
from hanorec.ranking.charts import COLOURS
from hanorec.ranking.markup import Html, element, joined
from hanorec.ranking.metrics import target_ranks
from hanorec.run.files import UserError

GROUPS = ("gained most", "lost most", "at random", "uninformative title")  # how examples are picked
OUTCOMES = ("won", "lost", "hard")
PICKED = 10  # examples of each group
SAME_TITLES = 5  # items with the same words in their titles, from which on such a title says nothing
CANDIDATES = 10  # posters of a ranking; the target is always there
HISTORY = 12  # posters of a history, the last ones
HEIGHTS = (168, 126, 96, 72, 54)  # pixels of a thumbnail; the first with which all thumbnails fit
THUMBNAIL_BYTES = 3_500_000  # of all thumbnails, so that the page stays below 5 MB


@dataclass
class System:
    """A run, or another system, whose rankings are shown.

    Args:
        name: of the row in the results table.
        scores: [R, C], those that rank.
        texts: a function that returns texts about an example by their names, or None.
        run: of a row of several seeds, the run that is shown.
    """

    name: str
    scores: np.ndarray
    texts: Callable[[Example], dict[str, str]] | None = None
    run: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Choose examples


def shares(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the target's share of the probability among the candidates, if scores are log-likelihoods: [R]."""
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return np.take_along_axis(odds, targets[:, None], axis=1)[:, 0] / odds.sum(1)


def says_nothing(titles: Sequence[str]) -> np.ndarray:
    """Return whether each title says nothing: it has no word, or SAME_TITLES or more items have the same words.

    Numbers, punctuation and capitals do not count.

    >>> says_nothing([*(f"Untitled {number}" for number in range(5)), "Jaws", "Jaws 2", "1984"]).tolist()
    [True, True, True, True, True, False, False, True]
    """
    words = [" ".join(re.findall(r"[^\W\d_]+", title.casefold())) for title in titles]
    counts = Counter(words)
    return np.array([not text or counts[text] >= SAME_TITLES for text in words])


def outcomes(systems: Sequence[System], targets: np.ndarray, hard: np.ndarray) -> dict[str, np.ndarray]:
    """Return a mask [R] of the examples for each of OUTCOMES.

    `won` and `lost`: the last system puts the target higher or lower than the first one. Of a single system: the target
    is in the first place, or not among the first three.
    """
    last = target_ranks(systems[-1].scores, targets)
    if len(systems) == 1:
        return {"won": last == 1, "lost": last > 3, "hard": hard}
    first = target_ranks(systems[0].scores, targets)
    return {"won": last < first, "lost": last > first, "hard": hard}


def choose(
    systems: Sequence[System], targets: np.ndarray, untold: np.ndarray, seed: int
) -> tuple[dict[int, list[str]], dict[str, int]]:
    """Choose PICKED examples for each of GROUPS.

    Of two or more systems, the first two groups hold those whose target moved up or down by the most places from the
    first to the last system. Of equal moves, the larger change of the target's share of the probability is taken.

    Args:
        untold: [R], whether the target's title says nothing.
        seed: of the groups that are drawn.

    Returns (the groups of each chosen example, in the order of GROUPS; how many examples each group was chosen from).
    """
    random = np.random.default_rng(seed)
    pools = {"at random": np.arange(len(targets)), "uninformative title": np.flatnonzero(untold)}
    chosen = {name: random.permutation(pool)[:PICKED] for name, pool in pools.items()}
    if len(systems) > 1:
        first, last = systems[0].scores, systems[-1].scores
        moves = target_ranks(first, targets) - target_ranks(last, targets)
        changes = shares(last, targets) - shares(first, targets)
        for name, sign in (("gained most", 1), ("lost most", -1)):
            pools[name] = np.flatnonzero(sign * moves > 0)
            order = np.lexsort((-sign * changes[pools[name]], -sign * moves[pools[name]]))
            chosen[name] = pools[name][order][:PICKED]
    groups: dict[int, list[str]] = {}
    for name in GROUPS:
        for number in chosen.get(name, []):
            groups.setdefault(int(number), []).append(name)
    return groups, {name: len(pools[name]) for name in GROUPS if name in pools}


# ---------------------------------------------------------------------------------------------------------------------
# Posters


class Posters:
    """The posters on the page. Each is stored once, as a rule of the style sheet, and shown by the class of its item.

    Args:
        data: the data folder with the images.

    Attributes:
        images: the largest thumbnail of each item that was shown; None if there is no image, or it cannot be read.
        unreadable: the number of images that cannot be read.
    """

    def __init__(self, data: DataFolder):
        self.data, self.images, self.unreadable = data, {}, 0

    def load(self, item: int) -> Image.Image | None:
        """Open an item's image and make it small."""
        path = self.data.items.images[item]
        try:
            image = open_image(self.data.folder / path) if path else None
        except UserError:
            self.unreadable += 1
            return None
        if image:
            image.thumbnail((2 * HEIGHTS[0], HEIGHTS[0]))
        return image

    def poster(self, item: int, place: int | None = None, target: bool = False) -> Html:
        """Return an item's poster and title.

        Args:
            place: its place in a ranking.
            target: mark it as the target.
        """
        if item not in self.images:
            self.images[item] = self.load(item)
        title = self.data.items.titles[item]
        badge = None if place is None else element("b", place)
        reason = "cannot be read" if self.data.items.images[item] else "no picture"
        empty = None if self.images[item] else reason
        box = element("div", badge, empty, class_=f"poster p{item}", role="img", aria_label=title)
        mark = element("em", "target") if target else None
        caption = element("figcaption", mark, element("bdi", title))
        return element("figure", box, caption, class_="item target" if target else "item", title=title)

    def style(self) -> Html:
        """Return the rules of the style sheet: the images as JPEG, as large as fits into THUMBNAIL_BYTES."""
        images = {item: image for item, image in self.images.items() if image}
        for height in HEIGHTS:
            rules = []
            for item, image in images.items():
                image.thumbnail((2 * height, height))
                file = io.BytesIO()
                image.save(file, "JPEG", quality=75, optimize=True)
                encoded = base64.b64encode(file.getvalue()).decode()
                rules.append(f".p{item}{{background-image:url(data:image/jpeg;base64,{encoded})}}")
            if sum(map(len, rules)) <= THUMBNAIL_BYTES:
                break
        return Html("\n".join(rules))


# ---------------------------------------------------------------------------------------------------------------------
# The page


def strip(posters: Posters, example: Example, scores: np.ndarray) -> Html:
    """Return the first candidates in a system's order, and the target if it is not among them."""
    order = np.argsort(-scores, kind="stable").tolist()
    shown = order[:CANDIDATES]
    tiles = [
        posters.poster(example.candidates[c], p, example.candidates[c] == example.target)
        for p, c in enumerate(shown, 1)
    ]
    target = order.index(example.candidates.index(example.target))
    if target >= CANDIDATES:
        tiles += [element("span", "…", class_="gap"), posters.poster(example.target, target + 1, True)]
    return element("div", *tiles, class_="strip")


def card(
    number: int,
    tags: Sequence[str],
    systems: Sequence[System],
    example: Example,
    targets: np.ndarray,
    posters: Posters,
    is_open: bool = False,
) -> Html:
    """Return one example: a line with the target's places, and below it the history, each system's order and the texts.

    Args:
        number: of the example.
        tags: its groups and outcomes.
        is_open: whether the reader sees more than the line without a click.
    """
    shown = example.history[-HISTORY:]
    left = len(example.history) - len(shown)
    heading = f"history, oldest first ({left} earlier items are not shown)" if left else "history, oldest first"
    history = element("div", *[posters.poster(item) for item in shown], class_="strip")
    blocks, count, line = [], len(example.candidates), []
    for index, system in enumerate(systems):
        place = target_ranks(system.scores[[number]], targets[[number]])[0]
        name = element("span", system.name, class_=f"key c{index % COLOURS}")
        line.append(element("span", name, f" {place:g}"))
        title = element("h4", name, f" {system.run} target in place {place:g} of {count}")
        blocks.append(
            element("section", title, strip(posters, example, system.scores[number]), texts_of(system, example))
        )
    labels = [element("span", tag, class_="tag") for tag in tags]
    prefix = None if example.user.casefold().startswith("user") else "User "
    in_place = element("span", f"target's place (of {count}):", *line, class_="note places")
    title = element("h3", element("span", prefix, element("bdi", example.user)), *labels, in_place)
    classes = " ".join(["card", *(identifier(tag) for tag in tags)])
    sides = element("div", *blocks, class_="sides")
    state = {"open": ""} if is_open else {}
    content = element("details", element("summary", title), element("h4", heading), history, sides, **state)
    return element("article", content, class_=classes)


def texts_of(system: System, example: Example) -> Html | None:
    """Return the texts that a system's prompts have about an example; None if there are none."""
    texts = system.texts(example) if system.texts else {}
    if not texts:
        return None
    lines = [joined([element("dt", name), element("dd", " ".join(text.split()))]) for name, text in texts.items()]
    return element("dl", *lines)


def identifier(text: str) -> str:
    return f"is-{text.replace(' ', '-')}"


def filters(title: str, group: str, counts: dict[str, int], everything: str) -> Html:
    """Return a row of buttons of which one is chosen. The page's style sheet hides the cards of the others.

    Args:
        group: name of the row.
        counts: the number of cards by tag.
        everything: the name of the button that hides nothing.
    """
    parts = [element("legend", title)]
    for index, (tag, count) in enumerate({everything: None, **counts}.items()):
        id_ = f"{group}-{identifier(tag)}"
        checked = {"checked": ""} if index == 0 else {}
        parts.append(element("input", type="radio", name=group, id=id_, **checked))
        parts.append(element("label", tag if count is None else f"{tag} ({count})", for_=id_))
    return element("fieldset", *parts)


def filter_rules(group: str, tags: Sequence[str]) -> Html:
    """Return the rules of the style sheet that make the buttons of a row work."""
    names = [identifier(tag) for tag in tags]
    return Html("\n".join(f"body:has(#{group}-{n}:checked) .card:not(.{n}){{display:none}}" for n in names))
