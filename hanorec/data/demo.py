"""The demo dataset: a made-up world of films and users in which the probability of every next film is known.

A film has a genre and a band; together they are its kind. Its poster shows both: the colour of the poster is the
genre's, and the lower part of the poster, the band, is black or white. The title may name the genre, another genre, or
none. A user has a hidden taste, which is one of the kinds and drifts now and then. The next film depends on the taste
and on the kind of the film, never on the title.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hanorec.data.readers import Raw, read_interactions
from hanorec.run.files import read_jsonl, replacing, write_jsonl

PLACES = """
    Alder Avon Basil Birch Cairn Cedar Clover Cobalt Delta Dover Ember Fallow Fern Garnet Glen Harbor Hazel
    Heron Indigo Iris Jasper Juniper Kestrel Larch Linden Lotus Maple Marlow Mercer Nettle Nova Oakley Olive
    Opal Orchid Pebble Piper Quartz Raven Reed Robin Rowan Saffron Sorrel Sterling Thistle Umber Vesper Willow
    Yarrow
""".split()
GENRES = ["Romance", "Mystery", "Western", "Comedy", "Horror", "Fantasy"]
COLOURS = {  # RGB of the posters' upper part, one for each genre, in the order of GENRES
    "orange": (240, 140, 20),
    "blue": (40, 60, 200),
    "yellow": (240, 220, 40),
    "pink": (240, 130, 190),
    "green": (40, 160, 60),
    "purple": (130, 40, 170),
}
BANDS = {"black": (15, 15, 15), "white": (240, 240, 240)}
KINDS = len(GENRES) * len(BANDS)
FILMS_OF_A_KIND = 25
UNTITLED = 5  # films of a kind whose title names no genre
MISLEADING = 3  # films of a kind whose title names another genre
POPULARITY = 0.4  # the weight of the r-th film of a kind is r ** -POPULARITY

USERS = 700
LENGTHS = (10, 16)  # films of a user: from 10 to 15
DRIFT = 0.05  # probability that the taste is drawn anew before a film
OWN_GENRE = 0.75  # probability that a film is of the taste's genre; else the genre is drawn from all
OWN_BAND = 0.9  # probability that a film has the taste's band; otherwise it has the other one


@dataclass
class World:
    """The films and users of the demo, and the hidden facts that decide what the users choose. Films are numbers.

    Args:
        titles: [N].
        genre, band: [N], numbers in GENRES and BANDS. The kind of a film is genre * len(BANDS) + band.
        word: [N], the genre that the title names; -1: none.
        weight: [N], probability of the film among the films of its kind.
        histories: by user, the films in order of time.
    """

    titles: list[str]
    genre: np.ndarray
    band: np.ndarray
    word: np.ndarray
    weight: np.ndarray
    histories: dict[str, list[int]]

    @property
    def kind(self) -> np.ndarray:
        """The kind of each film: [N]."""
        return self.genre * len(BANDS) + self.band


def item_id(film: int) -> str:
    """Return the item id of a film."""
    return f"film{film:03d}"


@functools.cache
def make_world(seed: int) -> World:
    """Make the films and the users. Every caller with the same seed gets the same object: do not change it."""
    rng = np.random.default_rng([seed, 7])
    kind = np.repeat(np.arange(KINDS), FILMS_OF_A_KIND)
    genre, band = kind // len(BANDS), kind % len(BANDS)
    weight = np.arange(1, FILMS_OF_A_KIND + 1) ** -POPULARITY
    weights = np.concatenate([rng.permutation(weight / weight.sum()) for _ in range(KINDS)])
    word = np.concatenate([rng.permutation(title_words(number // len(BANDS), rng)) for number in range(KINDS)])
    world = World(draw_titles(word, rng), genre, band, word, weights, {})
    for user in range(USERS):
        world.histories[f"user{user:03d}"] = draw_history(kind, weights, rng)
    return world


def title_words(genre: int, rng: np.random.Generator) -> np.ndarray:
    """Return the genres that the titles of a kind's films name: [FILMS_OF_A_KIND]. See World.word."""
    others = [other for other in range(len(GENRES)) if other != genre]
    honest = FILMS_OF_A_KIND - UNTITLED - MISLEADING
    return np.concatenate([np.full(honest, genre), np.full(UNTITLED, -1), rng.choice(others, MISLEADING)])


def draw_titles(word: np.ndarray, rng: np.random.Generator) -> list[str]:
    """Return the titles, such as "Western in Avon" and "Untitled 14". No two are equal."""
    titles = np.empty(len(word), dtype=object)
    for genre, name in enumerate(GENRES):
        films = np.flatnonzero(word == genre)
        titles[films] = [f"{name} in {place}" for place in spread(PLACES, len(films), rng)]
    untitled = np.flatnonzero(word < 0)
    titles[untitled] = [f"Untitled {number}" for number in rng.permutation(len(untitled)) + 1]
    return titles.tolist()


def spread(places: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Return `count` different names of places in random order: first the places, then "New" ones."""
    names = [*places, *(f"New {place}" for place in places)]
    names = names[: max(count, len(places))]
    return [names[number] for number in rng.permutation(len(names))[:count]]


def kind_probabilities() -> np.ndarray:
    """Return P(kind of the next film | taste): [KINDS, KINDS], a row for each taste."""
    tastes, kinds = np.arange(KINDS)[:, None], np.arange(KINDS)
    same_genre = tastes // len(BANDS) == kinds // len(BANDS)
    same_band = tastes % len(BANDS) == kinds % len(BANDS)
    genre = OWN_GENRE * same_genre + (1 - OWN_GENRE) / len(GENRES)
    return genre * np.where(same_band, OWN_BAND, 1 - OWN_BAND)


def draw_history(kind: np.ndarray, weight: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Draw the films of a user. A history that has a film twice is drawn again as a whole.

    So the probability of a history is that of its films under the taste's Markov chain, times a constant.

    Args:
        kind, weight: [N], see World.
    """
    films_of = [np.flatnonzero(kind == number) for number in range(KINDS)]
    of_taste = kind_probabilities()
    while True:
        history, taste = [], rng.integers(KINDS)
        for _ in range(rng.integers(*LENGTHS)):
            if rng.random() < DRIFT:
                taste = rng.integers(KINDS)
            films = films_of[rng.choice(KINDS, p=of_taste[taste])]
            history.append(int(rng.choice(films, p=weight[films])))
        if len(set(history)) == len(history):
            return history


# ---------------------------------------------------------------------------------------------------------------------
# Files


def labels_of(world: World) -> list[tuple[str, str]]:
    """Return the labels of each film: its genre, and whether its title names this genre."""
    honest = world.word == world.genre
    return [(f"{genre}", f"{own}") for genre, own in zip(world.genre, honest, strict=True)]


def read_demo(options: argparse.Namespace) -> Raw:
    """Make the world of --seed, draw its posters and write its descriptions into the data folder."""
    folder, world = options.out, make_world(options.seed)
    rng = np.random.default_rng([options.seed, 8])
    ids = [item_id(film) for film in range(len(world.titles))]
    descriptions = []
    with replacing(folder / "images") as new:
        new.mkdir()
        for film, name in enumerate(ids):
            colour, band = list(COLOURS)[world.genre[film]], list(BANDS)[world.band[film]]
            draw_poster(new / f"{name}.png", COLOURS[colour], BANDS[band], rng)
            word = GENRES[world.word[film]] if world.word[film] >= 0 else "Untitled"
            facts = {"title": word, "colour": colour, "band": band}
            text = f"{word} film, its poster {colour} over {band}."
            descriptions.append({"item": name, "text": text, "facts": facts})
    write_jsonl(folder / "descriptions.jsonl", descriptions)
    rows = [(user, ids[film], time) for user, films in world.histories.items() for time, film in enumerate(films)]
    interactions = read_interactions(enumerate(rows), folder, user=0, item=1, time=2)
    images = {name: folder / "images" / f"{name}.png" for name in ids}
    titles = dict(zip(ids, world.titles, strict=True))
    return Raw(interactions, titles, images, [], labels=dict(zip(ids, labels_of(world), strict=True)))


def read_descriptions(folder: Path) -> list[str]:
    """Return the texts of descriptions.jsonl, [] without the file. The tiny backbone's tokenizer is trained on them."""
    path = folder / "descriptions.jsonl"
    if not path.exists():
        return []
    return [line["text"] for line in read_jsonl(path, {"text": str}, "correct or delete it")]


def draw_poster(path: Path, colour: tuple, band: tuple, rng: np.random.Generator) -> None:
    """Draw a poster of 84 x 112 pixels: a random shape on the colour, and the band below. Colours are RGB."""
    shift = rng.integers(-12, 13, (2, 3))
    upper, lower = (tuple(rgb) for rgb in np.clip(np.array([colour, band]) + shift, 0, 255).tolist())
    image = Image.new("RGB", (84, 112), upper)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 56, 84, 112), fill=lower)
    x, y, size = rng.integers((8, 8, 12), (50, 22, 24)).tolist()
    box, fill = (x, y, x + size, y + size), (int(rng.choice([20, 235])),) * 3
    if rng.random() < 0.5:
        draw.ellipse(box, fill=fill)
    else:
        draw.rectangle(box, fill=fill)
    image.save(path)
