"""Raw datasets in their own layouts.

A reader is one function from the options of prepare_data.py to a `Raw`: interactions in input order, titles, images.
READERS lists them all. To add a dataset, write one such function.
"""

import argparse
import html
import itertools
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from hanorec.data.tables import column, encoding_of, find_file, header_of, json_fields, table_rows, text_rows
from hanorec.run.files import UserError


class Interactions:
    """Interactions in input order. Users and items have codes: numbers in order of first appearance."""

    def __init__(self):
        self.user_codes: dict[str, int] = {}
        self.item_codes: dict[str, int] = {}
        self.users, self.items, self.times, self.ratings = (array(code) for code in "qqdf")
        self.timed = self.rated = False  # whether the source has times, and ratings

    def add(self, user: str, item: str, time: float = 0.0, rating: float = 1.0) -> None:
        user, item = str(user).strip(), str(item).strip()
        if not user or not item:
            raise ValueError("a user or an item without an id")
        if not math.isfinite(time) or not math.isfinite(rating):
            raise ValueError("a time or a rating that is no number")
        self.users.append(self.user_codes.setdefault(user, len(self.user_codes)))
        self.items.append(self.item_codes.setdefault(item, len(self.item_codes)))
        self.times.append(time)
        self.ratings.append(rating)


NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters


@dataclass
class Raw:
    """A dataset as its reader finds it.

    Args:
        titles: by item id. An empty title: the item is known but untitled.
        images: path of each item's image, by item id.
        files: the files that were read, for the manifest.
        split: user id to train, val or test, if the source has its own split.
    """

    interactions: Interactions
    titles: dict[str, str]
    images: dict[str, Path]
    files: list[Path]
    split: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        ids = itertools.chain(self.interactions.user_codes, self.interactions.item_codes)
        for text in itertools.chain(ids, self.titles, self.titles.values()):
            if NOT_TEXT.search(text):
                names = " and ".join(map(str, self.files))
                raise UserError(f"{names}: {text!r} is no text (UTF-16, perhaps); save the files as UTF-8")

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return users and items (codes), times, ratings: [M] each, in input order."""
        own = self.interactions
        return tuple(np.frombuffer(v, dtype=v.typecode) for v in (own.users, own.items, own.times, own.ratings))


def timestamp(text: str) -> float:
    """A number as it is; an ISO date in seconds since 1970, UTC if it names no zone."""
    try:
        return float(text)
    except ValueError:
        time = datetime.fromisoformat(text.strip())
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def read_interactions(
    rows: Iterable[tuple[int, list]], path: Path, user: int, item: int, time: int | None = None, rating=None
) -> Interactions:
    """Read interactions from numbered rows.

    Args:
        path: the file, for errors.
        user, item, time, rating: positions in a row. Without times the input order is the order of time.
    """
    interactions = Interactions()
    interactions.timed, interactions.rated = time is not None, rating is not None
    for number, row in rows:
        try:
            when = timestamp(row[time]) if time is not None else 0.0
            interactions.add(row[user], row[item], when, float(row[rating]) if rating is not None else 1.0)
        except (IndexError, ValueError, OverflowError) as error:
            expected = "user, item" + ", time" * (time is not None) + ", rating" * (rating is not None)
            raise UserError(f"{path}, line {number}: expected {expected}, got {row} ({error})") from error
    if not interactions.users:
        raise UserError(f"{path} holds no interactions")
    return interactions


def one_line(title: str) -> str:
    """A title on one line: prompts hold one item a line."""
    return " ".join(title.split())


def read_titles(path: Path, rows: Iterable[tuple[int, list[str]]], item: int, title: int, width: int) -> dict[str, str]:
    """Read titles by item id.

    Args:
        item, title: positions in a row.
        width: the most fields of a row. More of them come from a comma in a title without quotes.
    """
    titles: dict[str, str] = {}
    for number, row in rows:
        if not max(item, title) < len(row) <= width:
            raise UserError(f"{path}, line {number}: expected an item and its title, {width} fields, got {row}")
        name, text = row[item].strip(), one_line(row[title])
        before = titles.get(name, "")
        if text and before and text != before:
            raise UserError(f"{path}, line {number}: item {name} is {before!r} above and {text!r} here")
        titles[name] = text or before
    return titles


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def find_images(given: Path | None, source: Path | None, *names: str) -> dict[str, Path]:
    """Return the image of each item id: files named <item id>.jpg and the like.

    Args:
        given: the folder of --images. Without it, the first existing folder of `source` with one of these names.
    """
    if given and not given.is_dir():
        raise UserError(f"--images {given} is not a folder")
    folders = [given] if given else []
    for name in names if source and not given else ():
        folders += [path for path in sorted(source.glob(name)) if path.is_dir()]
    paths = sorted(folders[0].iterdir()) if folders else []
    images = {path.stem: path for path in paths if path.suffix.lower() in IMAGE_ENDINGS}
    if given and not images:
        raise UserError(f"--images {given} holds no picture; they are named <item>{', '.join(IMAGE_ENDINGS)}")
    return images


# ---------------------------------------------------------------------------------------------------------------------
# The readers


def read_movielens(options: argparse.Namespace) -> Raw:
    """MovieLens as GroupLens ships it: ratings.dat and movies.dat (1M, 10M), or ratings.csv and movies.csv (20M, 25M,
    32M, latest). Posters, which it does not ship, in posters/<movieId>.jpg."""
    ratings = find_file(options.source, "ratings.dat", "ratings.csv")
    movies = ratings.with_name(f"movies{ratings.suffix}")
    if ratings.suffix == ".dat":
        rating_rows, movie_rows = (text_rows(p, "::", encoding_of(p), quotes=False) for p in (ratings, movies))
    else:
        rating_rows, movie_rows = text_rows(ratings), text_rows(movies)
        check_header(ratings, rating_rows, "userId,movieId,rating,timestamp")
        check_header(movies, movie_rows, "movieId,title,genres")
    interactions = read_interactions(rating_rows, ratings, user=0, item=1, time=3, rating=2)
    titles = read_titles(movies, movie_rows, 0, 1, width=3)
    return Raw(interactions, titles, find_images(options.images, options.source, "posters"), [ratings, movies])


def check_header(path: Path, rows: Iterator, expected: str) -> None:
    header = ",".join(header_of(rows, path))
    if header != expected:
        raise UserError(f"{path}, line 1: expected {expected}, got {header}")


def item_titles(path: Path) -> dict[str, str]:
    """Read `item,title`, with that header or with none."""
    rows = text_rows(path)
    first = header_of(rows, path)
    headed = [name.strip().lower() for name in first[:2]] == ["item", "title"]
    return read_titles(path, rows if headed else itertools.chain([(1, first)], rows), 0, 1, width=2)


def sequence_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, [user, item]) of `user<TAB>item item ...`, items in order of time."""
    for number, row in text_rows(path, "\t", quotes=False):
        if len(row) != 2 or not row[0].strip() or not row[1].split():
            raise UserError(f"{path}, line {number}: expected a user, a tab, and items with spaces between, got {row}")
        for item in row[1].split():
            yield number, [row[0].strip(), item]


def read_microlens(options: argparse.Namespace) -> Raw:
    """MicroLens: <Name>_pairs.tsv (`user<TAB>item item ...`, in order of time) or <Name>_pairs.csv (`user,item,
    timestamp`), <Name>_titles.csv (`item,title`), covers in <Name>_covers/<item>.jpg."""
    pairs, names = find_file(options.source, "*_pairs.tsv", "*_pairs.csv"), find_file(options.source, "*_titles.csv")
    if pairs.suffix == ".tsv":
        interactions = read_interactions(sequence_rows(pairs), pairs, user=0, item=1)
    else:
        rows = text_rows(pairs)
        header = header_of(rows, pairs)
        positions = [column(header, None, (name,), pairs, "its header") for name in ("user", "item", "timestamp")]
        interactions = read_interactions(rows, pairs, *positions)
    images = find_images(options.images, options.source, "*_covers", "covers", "images")
    return Raw(interactions, item_titles(names), images, [pairs, names])


def read_hanorec(options: argparse.Namespace) -> Raw:
    """The layout of HaNoRec's authors: train.tsv, val.tsv and test.tsv (`user<TAB>item item ...`), whose users are the
    split, <Name>_titles.csv, images/<item>.jpg."""
    files = {split: find_file(options.source, f"{split}.tsv") for split in ("train", "val", "test")}
    interactions, first_line = Interactions(), {}  # user id to (split, line number)
    for split, path in files.items():
        users_before = len(first_line)
        for number, (user, item) in sequence_rows(path):
            owner, line = first_line.setdefault(user, (split, number))
            if (owner, line) != (split, number):
                raise UserError(f"{path}, line {number}: user {user} stands in {owner}.tsv too; one row a user")
            interactions.add(user, item)
        if len(first_line) == users_before:
            raise UserError(f"{path} holds no interactions")
    names = find_file(options.source, "*_titles.csv")
    images = find_images(options.images, options.source, "images", "*_images", "covers")
    splits = {user: split for user, (split, _) in first_line.items()}
    return Raw(interactions, item_titles(names), images, [*files.values(), names], splits)


def read_amazon(options: argparse.Namespace) -> Raw:
    """Amazon Reviews 2023: <Category>.jsonl[.gz] (user_id, parent_asin, rating, timestamp), meta_<Category>.jsonl[.gz]
    (parent_asin, title), pictures in images/<parent_asin>.jpg. Products without a title are known but untitled."""
    meta = find_file(options.source, "meta_*.jsonl", "meta_*.jsonl.gz")
    category = meta.name.removeprefix("meta_").split(".jsonl")[0]
    reviews = find_file(options.source, f"{category}.jsonl", f"{category}.jsonl.gz")
    rows = json_fields(reviews, ("user_id", "parent_asin", "timestamp", "rating"))
    interactions = read_interactions(rows, reviews, user=0, item=1, time=2, rating=3)
    titles = dict.fromkeys(interactions.item_codes, "")
    for _, (item, title) in json_fields(meta, ("parent_asin", "title")):
        if item.strip() in titles:
            titles[item.strip()] = one_line(html.unescape(title))
    return Raw(interactions, titles, find_images(options.images, options.source, "images"), [reviews, meta])


def read_two_tables(
    options: argparse.Namespace, interactions: Path, items: Path, rows_of: Callable, titled: tuple, suffix: str = ""
) -> Raw:
    """Read a dataset of two tables with headers. Times and ratings may be missing.

    Args:
        rows_of: from a path to its numbered rows.
        titled: the usual names of the title's column.
        suffix: of the usual names of users and items, `user_id`; then a header's types (`user_id:token`) are cut off.
    """
    rows = rows_of(interactions)
    header = [name.split(":")[0] if suffix else name for name in header_of(rows, interactions)]
    usual_names = {"user": f"user{suffix}", "item": f"item{suffix}", "time": "timestamp", "rating": "rating"}
    positions = {}
    for name, usual in usual_names.items():
        given = getattr(options, f"{name}_column")
        optional = name in ("time", "rating") and not given and usual not in header
        positions[name] = None if optional else column(header, given, (usual,), interactions, f"--{name}-column")
    if positions["time"] is None:
        print(f"{interactions} has no column timestamp: its order is taken for the order of time (see --time-column)")
    found = read_interactions(rows, interactions, **positions)
    rows = rows_of(items)
    header = [name.split(":")[0] if suffix else name for name in header_of(rows, items)]
    item = column(header, options.item_column, (f"item{suffix}",), items, "--item-column")
    title = column(header, options.title_column, titled, items, "--title-column")
    images = find_images(options.images, options.source, "images")
    return Raw(found, read_titles(items, rows, item, title, len(header)), images, [interactions, items])


def read_recbole(options: argparse.Namespace) -> Raw:
    """RecBole's atomic files: <name>.inter and <name>.item, with types in the header (`user_id:token`), tabs between;
    pictures in images/<item_id>.jpg."""
    inter, item = find_file(options.source, "*.inter"), find_file(options.source, "*.item")
    rows_of = partial(text_rows, delimiter="\t", quotes=False)
    return read_two_tables(options, inter, item, rows_of, ("title", "movie_title", "name"), suffix="_id")


def read_csv(options: argparse.Namespace) -> Raw:
    """Any two tables: --interactions FILE and --items FILE (CSV, .tsv or .parquet, with a header), pictures in
    --images. --user-column, --item-column, --time-column, --rating-column and --title-column name their columns."""
    return read_two_tables(options, options.interactions, options.items, table_rows, ("title",))


READERS: dict[str, Callable[[argparse.Namespace], Raw]] = {
    "movielens": read_movielens,
    "microlens": read_microlens,
    "hanorec": read_hanorec,
    "amazon": read_amazon,
    "recbole": read_recbole,
    "csv": read_csv,
}
