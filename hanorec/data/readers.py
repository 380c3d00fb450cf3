"""Read raw datasets in their own layouts.

Each reader is a function from the options of prepare_data.py to a `Raw`. To add one, add it to READERS.
"""

import argparse
import html
import itertools
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from hanorec.data.tables import (
    ask_for_times,
    column,
    column_options,
    column_remedy,
    encoding_of,
    find_file,
    find_images,
    header_of,
    json_fields,
    table_rows,
    text_rows,
    timestamp,
)
from hanorec.run.files import UserError


@dataclass
class Interactions:
    """Interactions in input order. Users and items have codes: numbers in the order of their first interaction.

    timed, rated: whether the source has times and ratings.
    """

    timed: bool = False
    rated: bool = False
    user_codes: dict[str, int] = field(default_factory=dict)
    item_codes: dict[str, int] = field(default_factory=dict)
    users: array = field(default_factory=partial(array, "q"))
    items: array = field(default_factory=partial(array, "q"))
    times: array = field(default_factory=partial(array, "d"))
    ratings: array = field(default_factory=partial(array, "f"))

    def add(self, user: str, item: str, time: float = 0.0, rating: float = 1.0) -> None:
        """Append an interaction. Raise ValueError for an empty id, or a time or rating that is not finite."""
        user, item = str(user).strip(), str(item).strip()
        if not user or not item:
            raise ValueError("a user or an item without an id")
        if not math.isfinite(time) or not math.isfinite(rating):
            raise ValueError("a time or a rating that is no number")
        self.users.append(self.user_codes.setdefault(user, len(self.user_codes)))
        self.items.append(self.item_codes.setdefault(item, len(self.item_codes)))
        self.times.append(time)
        self.ratings.append(rating)


NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL and surrogates


@dataclass
class Raw:
    """A dataset as its reader returns it.

    Args:
        titles: title by item id. An empty title means that the source lists the item without a title.
        images: path of the image by item id.
        files: the files that were read, for the manifest.
        split: train, val or test by user id, if the source has its own split.
        labels: labels by item id, the most important first, equally many for each item. The candidates of
            test_hard.jsonl share them; without labels there is no test_hard.jsonl.
    """

    interactions: Interactions
    titles: dict[str, str]
    images: dict[str, Path]
    files: list[Path]
    split: dict[str, str] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self):
        ids = (self.interactions.user_codes, self.interactions.item_codes, self.titles)
        for text in filter(NOT_TEXT.search, itertools.chain(*ids, self.titles.values())):
            names = " and ".join(map(str, self.files))
            raise UserError(f"{names}: {text!r} is no text (perhaps UTF-16); save the files as UTF-8")
        read = self.interactions
        # User codes, item codes, times and ratings: [M] each, in input order
        self.columns = tuple(np.frombuffer(v, v.typecode) for v in (read.users, read.items, read.times, read.ratings))


def read_interactions(
    rows: Iterable[tuple[int, list]], path: Path, user: int, item: int, time: int | None = None, rating=None
) -> Interactions:
    """Read interactions from numbered rows.

    Args:
        path: the file, for errors.
        user, item, time, rating: positions in a row. If time is None, the input order is the order of time.
    """
    interactions = Interactions(timed=time is not None, rated=rating is not None)
    for number, row in rows:
        try:
            when = timestamp(row[time]) if time is not None else 0.0
            interactions.add(row[user], row[item], when, float(row[rating]) if rating is not None else 1.0)
        except (IndexError, ValueError, OverflowError) as error:
            positions = {"user": user, "item": item, "time": time, "rating": rating}
            expected = ", ".join(name for name, position in positions.items() if position is not None)
            raise UserError(f"{path}, line {number}: expected {expected}, got {row} ({error})") from error
    if not interactions.users:
        raise UserError(f"{path} holds no interactions")
    return interactions


def read_titles(path: Path, rows: Iterable[tuple[int, list[str]]], item: int, title: int, width: int) -> dict[str, str]:
    """Read titles by item id.

    Args:
        item, title: positions in a row.
        width: maximum number of fields in a row. A title with a comma and without quotes gives more.
    """
    titles = {}
    for number, row in rows:
        if not max(item, title) < len(row) <= width:
            raise UserError(f"{path}, line {number}: expected an item and its title, {width} fields, got {row}")
        name = row[item].strip()
        text = " ".join(row[title].split())  # on one line: prompts have one line for each item
        before = titles.get(name, "")
        if text and before and text != before:
            raise UserError(f"{path}, line {number}: item {name} is {before!r} above and {text!r} here; keep one")
        titles[name] = text or before
    return titles


# ---------------------------------------------------------------------------------------------------------------------
# The readers


def read_movielens(options: argparse.Namespace) -> Raw:
    """Read MovieLens: ratings.dat and movies.dat (1M, 10M), or ratings.csv and movies.csv (20M, 25M, 32M, latest).

    GroupLens has no posters; add them as posters/<movieId>.jpg.
    """
    ratings = find_file(options.source, "ratings.dat", "ratings.csv")
    movies = ratings.with_name(f"movies{ratings.suffix}")
    rows = movielens_rows(ratings, "userId,movieId,rating,timestamp")
    interactions = read_interactions(rows, ratings, user=0, item=1, time=3, rating=2)
    titles = read_titles(movies, movielens_rows(movies, "movieId,title,genres"), 0, 1, width=3)
    return Raw(interactions, titles, find_images(options, "posters"), [ratings, movies])


def movielens_rows(path: Path, expected: str) -> Iterator[tuple[int, list[str]]]:
    """Read a file of MovieLens. A .dat has no header. A .csv must have the expected one, else raise UserError."""
    if path.suffix == ".dat":
        return text_rows(path, "::", encoding_of(path), quotes=False)
    rows = text_rows(path)
    header = ",".join(header_of(rows, path))
    if header != expected:
        raise UserError(f"{path}, line 1: expected {expected}, got {header}; check that MovieLens wrote this file")
    return rows


def item_titles(path: Path) -> dict[str, str]:
    """Read titles by item id from rows `item,title`. The header is optional."""
    rows = text_rows(path)
    first = header_of(rows, path)
    if [name.strip().lower() for name in first[:2]] != ["item", "title"]:
        rows = itertools.chain([(1, first)], rows)
    return read_titles(path, rows, 0, 1, width=2)


def sequence_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, [user, item]) from lines `user<TAB>item item ...`, whose items are in order of time."""
    for number, row in text_rows(path, "\t", quotes=False):
        if len(row) != 2 or not row[0].strip() or not row[1].split():
            raise UserError(f"{path}, line {number}: expected a user, a tab, and items separated by spaces, got {row}")
        for item in row[1].split():
            yield number, [row[0].strip(), item]


def read_microlens(options: argparse.Namespace) -> Raw:
    """Read MicroLens: <Name>_pairs.tsv or .csv, <Name>_titles.csv, <Name>_covers/<item>.jpg.

    The .tsv has lines `user<TAB>item item ...` in order of time. The .csv has the columns user, item, timestamp.
    """
    pairs = find_file(options.source, "*_pairs.tsv", "*_pairs.csv")
    titles = find_file(options.source, "*_titles.csv")
    if pairs.suffix == ".tsv":
        interactions = read_interactions(sequence_rows(pairs), pairs, user=0, item=1)
    else:
        rows = text_rows(pairs)
        header = header_of(rows, pairs)
        positions = [column(header, None, (n,), pairs, "add a header line") for n in ("user", "item", "timestamp")]
        interactions = read_interactions(rows, pairs, *positions)
    return Raw(interactions, item_titles(titles), find_images(options, "*_covers", "covers", "images"), [pairs, titles])


def read_hanorec(options: argparse.Namespace) -> Raw:
    """Read the datasets of HaNoRec's authors: train.tsv, val.tsv, test.tsv, <Name>_titles.csv, images/<item>.jpg.

    The .tsv files have lines `user<TAB>item item ...`. The file of a user gives the user's split.
    """
    files = {split: find_file(options.source, f"{split}.tsv") for split in ("train", "val", "test")}
    interactions = Interactions()
    line_of_user = {}  # (split, line number) by user id
    for split, path in files.items():
        users_before = len(line_of_user)
        for number, (user, item) in sequence_rows(path):
            first = line_of_user.setdefault(user, (split, number))
            if first != (split, number):
                raise UserError(f"{path}, line {number}: user {user} is also in {first[0]}.tsv; keep one line a user")
            interactions.add(user, item)
        if len(line_of_user) == users_before:
            raise UserError(f"{path} holds no interactions")
    titles = find_file(options.source, "*_titles.csv")
    images = find_images(options, "images", "*_images", "covers")
    splits = {user: split for user, (split, _) in line_of_user.items()}
    return Raw(interactions, item_titles(titles), images, [*files.values(), titles], splits)


def read_amazon(options: argparse.Namespace) -> Raw:
    """Read Amazon Reviews 2023: <Category>.jsonl, meta_<Category>.jsonl (both may be .gz), images/<parent_asin>.jpg.

    An item that the meta file lacks gets an empty title.
    """
    meta = find_file(options.source, "meta_*.jsonl", "meta_*.jsonl.gz")
    category = meta.name.removeprefix("meta_").split(".jsonl")[0]
    reviews = find_file(options.source, f"{category}.jsonl", f"{category}.jsonl.gz")
    rows = json_fields(reviews, ("user_id", "parent_asin", "timestamp", "rating"))
    interactions = read_interactions(rows, reviews, user=0, item=1, time=2, rating=3)
    titles = dict.fromkeys(interactions.item_codes, "")
    for _, (item, title) in json_fields(meta, ("parent_asin", "title")):
        if item.strip() in titles:
            titles[item.strip()] = " ".join(html.unescape(title).split())
    return Raw(interactions, titles, find_images(options, "images"), [reviews, meta])


def read_two_tables(
    options: argparse.Namespace, interactions: Path, items: Path, rows_of: Callable, titled: tuple, suffix: str = ""
) -> Raw:
    """Read a dataset of two tables with headers. Times and ratings may be missing.

    Args:
        rows_of: function from a path to numbered rows.
        titled: usual names of the title column.
        suffix: ending of the usual names of the user and item columns (`_id` in RecBole's files). If it is not empty,
            the types are removed from the header (`user_id:token`).
    """
    typed = bool(suffix)
    rows, item_rows = rows_of(interactions), rows_of(items)
    header, item_header = header_of(rows, interactions, typed), header_of(item_rows, items, typed)
    usual_names = {"user": (f"user{suffix}",), "item": (f"item{suffix}",), "title": titled}
    usual_names |= {"time": ("timestamp",), "rating": ("rating",)}
    chosen = {name: getattr(options, f"{name}_column") for name in usual_names}
    column_names = column_options(header, item_header, usual_names, chosen)
    remedy = column_remedy(column_names, header, interactions)
    item_remedy = column_remedy(column_names, item_header, items)
    positions = {}
    for name in ("user", "item", "time", "rating"):
        missing = chosen[name] == "none" or (not chosen[name] and usual_names[name][0] not in header)
        left_out = missing and name in ("time", "rating")
        positions[name] = None if left_out else column(header, chosen[name], usual_names[name], interactions, remedy)
    item = column(item_header, chosen["item"], usual_names["item"], items, item_remedy)
    title = column(item_header, chosen["title"], titled, items, item_remedy)
    if positions["time"] is None and chosen["time"] != "none":
        rows = ask_for_times(rows, interactions, header, positions)
    in_order = read_interactions(rows, interactions, **positions)
    titles = read_titles(items, item_rows, item, title, len(item_header))
    return Raw(in_order, titles, find_images(options, "images"), [interactions, items])


def read_recbole(options: argparse.Namespace) -> Raw:
    """Read RecBole's atomic files: <name>.inter and <name>.item, separated by tabs, and images/<item_id>.jpg."""
    inter, item = find_file(options.source, "*.inter"), find_file(options.source, "*.item")
    rows_of = partial(text_rows, delimiter="\t", quotes=False)
    return read_two_tables(options, inter, item, rows_of, ("title", "movie_title", "name"), suffix="_id")


def read_csv(options: argparse.Namespace) -> Raw:
    """Read two tables with headers, --interactions and --items (.csv, .tsv or .parquet), and the folder --images."""
    return read_two_tables(options, options.interactions, options.items, table_rows, ("title",))


READERS: dict[str, Callable[[argparse.Namespace], Raw]] = {
    "movielens": read_movielens,
    "microlens": read_microlens,
    "hanorec": read_hanorec,
    "amazon": read_amazon,
    "recbole": read_recbole,
    "csv": read_csv,
}
