"""The demo: made-up films, their posters, and users who follow the posters' colours."""

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
    """Make the demo, its posters drawn into the data folder."""
    rows, titles, images = make_demo(options.out, options.seed)
    interactions = read_interactions(enumerate(rows), options.out, user=0, item=1, time=2)
    return Raw(interactions, titles, images, [])


def make_demo(folder: Path, seed: int, users: int = 400) -> tuple[list[tuple], dict[str, str], dict[str, Path]]:
    """Make 400 films: 8 genres x 50 places, both in the title. The poster has one of 8 colours, which no title tells.

    A user's next film is, with probability 0.5, of the genre that belongs to the last poster's colour; with 0.35 of the
    last film's genre; else of any. Films of some places are more popular than others.

    Returns ((user, item, time) of each interaction, titles by item, paths of posters by item).
    """
    rng = np.random.default_rng([seed, 7])
    count = len(GENRES) * len(PLACES)
    genre, colour = np.arange(count) // len(PLACES), rng.integers(len(COLOURS), size=count)
    genre_of_colour = rng.permutation(len(GENRES))
    popularity = np.tile(rng.permutation(np.arange(1, len(PLACES) + 1)) ** -0.5, len(GENRES))
    ids = [f"film{item:03d}" for item in range(count)]
    rows = []
    for user in range(users):
        history = draw_history(genre, genre_of_colour[colour], popularity, rng)
        rows += [(f"user{user:03d}", ids[item], time) for time, item in enumerate(history)]
    titles = [f"{GENRES[genre[item]]} in {PLACES[item % len(PLACES)]}" for item in range(count)]
    descriptions, names = [], list(COLOURS)
    with replacing(folder / "images") as new:
        new.mkdir()
        for item, name in enumerate(ids):
            shape = draw_poster(new / f"{name}.png", COLOURS[names[colour[item]]], rng)
            descriptions.append(describe(name, GENRES[genre[item]], names[colour[item]], shape))
    write_jsonl(folder / "descriptions.jsonl", descriptions)
    images = {name: folder / "images" / f"{name}.png" for name in ids}
    return rows, dict(zip(ids, titles, strict=True)), images


def draw_history(
    genre: np.ndarray, genre_by_poster: np.ndarray, popularity: np.ndarray, rng: np.random.Generator
) -> list[int]:
    """Draw a user's films, none of them twice.

    Args:
        genre, genre_by_poster, popularity: [films]; the second is the genre that belongs to a poster's colour.
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
    """The truth about a film and its poster: mllm_srec.teach teaches it, and measures summaries by it."""
    text = f"{genre} film, its poster {colour} with a {shape}."
    return {"item": item, "text": text, "facts": {"genre": genre, "colour": colour, "shape": shape}}


def read_descriptions(folder: Path) -> list[str]:
    """The texts of a data folder's descriptions.jsonl, if it has one. The tiny backbone's tokenizer knows them."""
    path = folder / "descriptions.jsonl"
    if not path.exists():
        return []
    return [line["text"] for line in read_jsonl(path, {"text": str}, "mend or delete it")]


def draw_poster(path: Path, colour: tuple[int, int, int], rng: np.random.Generator) -> str:
    """Draw a poster of 84 x 112 pixels: the colour, and a shape and two bars that mean nothing. Returns the shape."""
    background = np.clip(np.array(colour) + rng.integers(-12, 13, 3), 0, 255)
    image = Image.new("RGB", (84, 112), tuple(background.tolist()))
    draw = ImageDraw.Draw(image)
    x, y, size = (int(v) for v in rng.integers((10, 15, 16), (45, 55, 32)))
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
        left, right = (int(v) for v in (rng.integers(8, 25), rng.integers(50, 76)))
        draw.rectangle((left, 94 + 8 * line, right, 96 + 8 * line), fill=(255 - shade,) * 3)
    image.save(path)
    return shape
