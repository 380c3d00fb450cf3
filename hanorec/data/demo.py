"""The demo dataset: invented films, their posters, and users who choose films by the colours of posters."""

import argparse
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
GENRES = ["Romance", "Mystery", "Western", "Comedy", "Horror", "Fantasy", "Thriller", "Musical"]
COLOURS = {
    "red": (200, 30, 40),
    "orange": (240, 140, 20),
    "yellow": (240, 220, 40),
    "green": (40, 160, 60),
    "cyan": (40, 200, 220),
    "blue": (40, 60, 200),
    "purple": (130, 40, 170),
    "pink": (240, 130, 190),
}
SHAPES = ("circle", "square", "triangle")


def read_demo(options: argparse.Namespace) -> Raw:
    """Make the demo dataset of 400 users and 400 films, and draw the posters into the data folder.

    The films are 8 genres x 50 places, both in the title. The poster has one of 8 colours, which is in no title. The
    next film of a user has, with probability 0.5, the genre that belongs to the colour of the last poster; with
    probability 0.35, the genre of the last film; else any genre. Films of some places are more popular.
    """
    folder = options.out
    rng = np.random.default_rng([options.seed, 7])
    count = len(GENRES) * len(PLACES)
    genre = np.arange(count) // len(PLACES)
    colour = rng.integers(len(COLOURS), size=count)
    genre_of_colour = rng.permutation(len(GENRES))
    popularity = np.tile(rng.permutation(np.arange(1, len(PLACES) + 1)) ** -0.5, len(GENRES))
    ids = [f"film{item:03d}" for item in range(count)]
    rows = []
    for user in range(400):
        history = draw_history(genre, genre_of_colour[colour], popularity, rng)
        rows += [(f"user{user:03d}", ids[item], time) for time, item in enumerate(history)]
    titles = [f"{GENRES[genre[item]]} in {PLACES[item % len(PLACES)]}" for item in range(count)]
    descriptions = []
    colour_names = list(COLOURS)
    with replacing(folder / "images") as new:
        new.mkdir()
        for item, name in enumerate(ids):
            colour_name = colour_names[colour[item]]
            shape = draw_poster(new / f"{name}.png", COLOURS[colour_name], rng)
            descriptions.append(describe(name, GENRES[genre[item]], colour_name, shape))
    write_jsonl(folder / "descriptions.jsonl", descriptions)
    images = {name: folder / "images" / f"{name}.png" for name in ids}
    interactions = read_interactions(enumerate(rows), folder, user=0, item=1, time=2)
    return Raw(interactions, dict(zip(ids, titles, strict=True)), images, [])


def draw_history(genre: np.ndarray, genre_by_poster: np.ndarray, popularity: np.ndarray, rng) -> list[int]:
    """Draw the films of a user, each at most once.

    Args:
        genre: [films].
        genre_by_poster: [films], the genre that belongs to the colour of the film's poster.
        popularity: [films].
    """
    films = len(genre)
    history = [int(rng.choice(films, p=popularity / popularity.sum()))]
    for _ in range(rng.integers(9, 15)):
        last, draw = history[-1], rng.random()
        weight = popularity.copy()
        if draw < 0.5:
            weight *= genre == genre_by_poster[last]
        elif draw < 0.85:
            weight *= genre == genre[last]
        weight[history] = 0
        history.append(int(rng.choice(films, p=weight / weight.sum())))
    return history


def describe(item: str, genre: str, colour: str, shape: str) -> dict:
    """Return a film's line of descriptions.jsonl. mllm_srec.teach trains on it and measures summaries by it."""
    text = f"{genre} film, its poster {colour} with a {shape}."
    return {"item": item, "text": text, "facts": {"genre": genre, "colour": colour, "shape": shape}}


def read_descriptions(folder: Path) -> list[str]:
    """Return the texts of descriptions.jsonl, [] without the file. The tiny backbone's tokenizer is trained on them."""
    path = folder / "descriptions.jsonl"
    if not path.exists():
        return []
    return [line["text"] for line in read_jsonl(path, {"text": str}, "correct or delete it")]


def draw_poster(path: Path, colour: tuple[int, int, int], rng: np.random.Generator) -> str:
    """Draw a poster of 84 x 112 pixels in a colour, with a random shape and two bars. Returns the shape's name."""
    background = np.clip(np.array(colour) + rng.integers(-12, 13, 3), 0, 255)
    image = Image.new("RGB", (84, 112), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    x, y, size = rng.integers((10, 15, 16), (45, 55, 32)).tolist()
    shade = int(rng.choice([20, 235]))
    box, fill = (x, y, x + size, y + size), (shade,) * 3
    shape = SHAPES[rng.integers(3)]
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=fill)
    for line in range(2):
        left, right = int(rng.integers(8, 25)), int(rng.integers(50, 76))
        draw.rectangle((left, 94 + 8 * line, right, 96 + 8 * line), fill=(255 - shade,) * 3)
    image.save(path)
    return shape
