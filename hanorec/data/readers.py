"""Raw datasets in their own layouts.

A reader is one function from the options of prepare_data.py to a `Raw`: interactions in input order, titles, images.
READERS names them all. To add a dataset, write one such function.
"""

import argparse
import csv
import gzip
import html
import itertools
import json
import math
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from hanorec.run.runs import UserError

# ---------------------------------------------------------------------------------------------------------------------
# What a reader gives


class Interactions:
    """Interactions as they are read; users and items are numbered by first appearance."""

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


NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters


@dataclass
class Raw:
    """A dataset as its reader finds it. An item with an empty title is known but untitled."""

    found: Interactions
    titles: dict[str, str]
    images: dict[str, Path]
    files: list[Path]
    split: dict[str, str] = field(default_factory=dict)  # user to train, val or test, where the source has its own

    def __post_init__(self):
        texts = itertools.chain(self.found.user_codes, self.found.item_codes, self.titles, self.titles.values())
        for text in texts:
            if NO_TEXT.search(text):
                names = " and ".join(map(str, self.files))
                raise UserError(f"{names}: {text!r} is no text (UTF-16, perhaps); save the files as UTF-8")

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """users and items (codes by first appearance), times, ratings: [M] each, in input order."""
        arrays = (self.found.users, self.found.items, self.found.times, self.found.ratings)
        return tuple(np.frombuffer(values, dtype=values.typecode) for values in arrays)


# ---------------------------------------------------------------------------------------------------------------------
# Reading files


def only(source: Path | None, *patterns: str) -> Path:
    """The one file in `source` that matches the first pattern that any matches."""
    if source is None or not source.is_dir():
        raise UserError(f"--source {source} is not a folder; give the unpacked dataset")
    for pattern in patterns:
        found = sorted(source.glob(pattern))
        if len(found) > 1:
            raise UserError(f"{source} holds {len(found)} files {pattern}; keep one dataset in a folder")
        if found:
            return found[0]
    raise UserError(f"{source} holds no {' or '.join(patterns)}; --source is the folder that holds it")


def text_rows(
    path: Path, delimiter: str = ",", encoding: str = "utf-8-sig", quotes: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a delimited text file, empty lines left out."""
    try:
        with open(path, encoding=encoding, newline="") as file:
            if quotes:
                reader = csv.reader(file, delimiter=delimiter, strict=True)
                yield from ((reader.line_num, row) for row in reader if row and row != [""])
            else:
                rows = (line.rstrip("\r\n").split(delimiter) for line in file)
                yield from ((number, row) for number, row in enumerate(rows, 1) if row != [""])
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def encoding_of(path: Path) -> str:
    """utf-8 where the whole file is, else latin-1: MovieLens 10M is the one, MovieLens 1M the other."""
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
        return "utf-8"
    except UnicodeDecodeError:
        return "latin-1"
    except OSError:
        return "utf-8"  # text_rows says what is wrong with it


def json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of a JSON Lines file, gzipped or not."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield number, row
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}, near line {max(number, 1)}, cannot be read: {error}") from error


def json_fields(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number, these fields as text) of a JSON Lines file; a field that is missing is empty."""
    for number, row in json_rows(path):
        try:
            yield number, [field_text(row.get(name)) for name in names]
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error


def field_text(value) -> str:
    """A value of JSON or Parquet as a CSV would spell it; ValueError for one that holds others."""
    if value is None or value != value:  # pandas writes NaN for what is missing
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError(f"expected a text or a number, got {value}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # ids in a column that also has nulls
    return value.decode() if isinstance(value, bytes) else str(value)


def header_of(rows: Iterator[tuple[int, list[str]]], path: Path) -> list[str]:
    for _, row in rows:
        return row
    raise UserError(f"{path} is empty")


def column(header: list[str], given: str | None, usual: tuple[str, ...], path: Path, option: str) -> int:
    """The place of a column in a header: the one that the option gives, else the first of its usual names."""
    names = (given,) if given else usual
    for name in names:
        if name in header:
            return header.index(name)
    raise UserError(f"{path} has no column {' or '.join(names)}, only {', '.join(header)}; name it with {option}")


def moment(text: str) -> float:
    """A time as a number: a number as it is, an ISO date in seconds since 1970 (UTC where it names no zone)."""
    try:
        return float(text)
    except ValueError:
        time = datetime.fromisoformat(text.strip())
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def collect(rows: Iterable[tuple[int, list]], path: Path, user: int, item: int, time=None, rating=None) -> Interactions:
    """Interactions from rows of fields, whose places are given; times may be missing (input order then), or ratings."""
    found = Interactions()
    found.timed, found.rated = time is not None, rating is not None
    for number, row in rows:
        try:
            when = moment(row[time]) if time is not None else 0.0
            found.add(row[user], row[item], when, float(row[rating]) if rating is not None else 1.0)
        except (IndexError, ValueError, OverflowError) as error:
            what = "user, item" + ", time" * (time is not None) + ", rating" * (rating is not None)
            raise UserError(f"{path}, line {number}: expected {what}, got {row} ({error})") from error
    if not found.users:
        raise UserError(f"{path} holds no interactions")
    return found


def one_line(title: str) -> str:
    """A title on one line: prompts hold one item a line."""
    return " ".join(title.split())


def read_titles(path: Path, rows: Iterable[tuple[int, list[str]]], item: int, title: int, width: int) -> dict[str, str]:
    """Titles by item, from rows of at most `width` fields (more of them: a comma in a title that has no quotes)."""
    titles: dict[str, str] = {}
    for number, row in rows:
        if not max(item, title) < len(row) <= width:
            raise UserError(f"{path}, line {number}: expected an item and its title, {width} fields, got {row}")
        name, text = row[item].strip(), one_line(row[title])
        if text and titles.get(name, text) != text and titles[name]:
            raise UserError(f"{path}, line {number}: item {name} is {titles[name]!r} above and {text!r} here")
        titles[name] = text or titles.get(name, "")
    return titles


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def find_images(given: Path | None, source: Path | None, *names: str) -> dict[str, Path]:
    """Item to picture, from --images or the first of these folders of `source` that exists; a file's name is the id."""
    if given and not given.is_dir():
        raise UserError(f"--images {given} is not a folder")
    if given:
        folders = [given]
    else:
        folders = [path for name in names if source for path in sorted(source.glob(name)) if path.is_dir()]
    paths = sorted(folders[0].iterdir()) if folders else []
    found = {path.stem: path for path in paths if path.suffix.lower() in IMAGE_ENDINGS}
    if given and not found:
        raise UserError(f"--images {given} holds no picture; they are named <item>{', '.join(IMAGE_ENDINGS)}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The readers


def read_movielens(options: argparse.Namespace) -> Raw:
    """MovieLens as GroupLens ships it: ratings.dat and movies.dat (1M, 10M), or ratings.csv and movies.csv (20M, 25M,
    32M, latest); posters, which it does not ship, in posters/<movieId>.jpg."""
    ratings = only(options.source, "ratings.dat", "ratings.csv")
    movies = ratings.with_name(f"movies{ratings.suffix}")
    if ratings.suffix == ".dat":
        rows, names = (text_rows(path, "::", encoding_of(path), quotes=False) for path in (ratings, movies))
    else:
        rows, names = text_rows(ratings), text_rows(movies)
        for path, table, expected in (
            (ratings, rows, "userId,movieId,rating,timestamp"),
            (movies, names, "movieId,title,genres"),
        ):
            if (header := ",".join(header_of(table, path))) != expected:
                raise UserError(f"{path}, line 1: expected {expected}, got {header}")
    found = collect(rows, ratings, user=0, item=1, time=3, rating=2)
    titles = read_titles(movies, names, 0, 1, width=3)
    return Raw(found, titles, find_images(options.images, options.source, "posters"), [ratings, movies])


def item_titles(path: Path) -> dict[str, str]:
    """`item,title` with that header or with none."""
    rows = text_rows(path)
    first = header_of(rows, path)
    headed = [name.strip().lower() for name in first[:2]] == ["item", "title"]
    return read_titles(path, rows if headed else itertools.chain([(1, first)], rows), 0, 1, width=2)


def sequence_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, [user, item]) of `user<TAB>item item ...`, items in order of time."""
    for number, row in text_rows(path, "\t", quotes=False):
        if len(row) != 2 or not row[0].strip() or not row[1].split():
            raise UserError(f"{path}, line {number}: expected a user, a tab, and items with spaces between, got {row}")
        for item in row[1].split():
            yield number, [row[0].strip(), item]


def read_microlens(options: argparse.Namespace) -> Raw:
    """MicroLens: <Name>_pairs.tsv (`user<TAB>item item ...`, in order of time) or <Name>_pairs.csv (`user,item,
    timestamp`), <Name>_titles.csv (`item,title`), covers in <Name>_covers/<item>.jpg."""
    pairs, names = only(options.source, "*_pairs.tsv", "*_pairs.csv"), only(options.source, "*_titles.csv")
    if pairs.suffix == ".tsv":
        found = collect(sequence_rows(pairs), pairs, user=0, item=1)
    else:
        rows = text_rows(pairs)
        header = header_of(rows, pairs)
        places = (column(header, None, (name,), pairs, "its header") for name in ("user", "item", "timestamp"))
        found = collect(rows, pairs, *places)
    images = find_images(options.images, options.source, "*_covers", "covers", "images")
    return Raw(found, item_titles(names), images, [pairs, names])


def read_hanorec(options: argparse.Namespace) -> Raw:
    """The layout of HaNoRec's authors: train.tsv, val.tsv and test.tsv (`user<TAB>item item ...`), whose users are the
    split, <Name>_titles.csv, images/<item>.jpg."""
    files = {split: only(options.source, f"{split}.tsv") for split in ("train", "val", "test")}
    found, owner = Interactions(), {}
    for split, path in files.items():
        before = len(owner)
        for number, (user, item) in sequence_rows(path):
            if owner.setdefault(user, (split, number)) != (split, number):
                told = f"user {user} stands in {owner[user][0]}.tsv too"
                raise UserError(f"{path}, line {number}: {told}; one row a user")
            found.add(user, item)
        if len(owner) == before:
            raise UserError(f"{path} holds no interactions")
    names = only(options.source, "*_titles.csv")
    images = find_images(options.images, options.source, "images", "*_images", "covers")
    return Raw(found, item_titles(names), images, [*files.values(), names], {u: s for u, (s, _) in owner.items()})


def read_amazon(options: argparse.Namespace) -> Raw:
    """Amazon Reviews 2023: <Category>.jsonl[.gz] (user_id, parent_asin, rating, timestamp), meta_<Category>.jsonl[.gz]
    (parent_asin, title), pictures in images/<parent_asin>.jpg. Products without a title are known but untitled."""
    meta = only(options.source, "meta_*.jsonl", "meta_*.jsonl.gz")
    category = meta.name.removeprefix("meta_").split(".jsonl")[0]
    reviews = only(options.source, f"{category}.jsonl", f"{category}.jsonl.gz")
    rows = json_fields(reviews, ("user_id", "parent_asin", "timestamp", "rating"))
    found = collect(rows, reviews, user=0, item=1, time=2, rating=3)
    titles = dict.fromkeys(found.item_codes, "")
    for _, (item, title) in json_fields(meta, ("parent_asin", "title")):
        if item.strip() in titles:
            titles[item.strip()] = one_line(html.unescape(title))
    return Raw(found, titles, find_images(options.images, options.source, "images"), [reviews, meta])


def from_tables(options, interactions: Path, items: Path, rows_of: Callable, titled: tuple, suffix: str = "") -> Raw:
    """A dataset of two tables with headers. A column is the one that its option names, else the usual one: `user` and
    `item` with this suffix, `timestamp`, `rating`, one of `titled`. Times and ratings may be missing."""
    rows = rows_of(interactions)
    header = [name.split(":")[0] if suffix else name for name in header_of(rows, interactions)]
    places = []
    for name, usual in (
        ("user", f"user{suffix}"),
        ("item", f"item{suffix}"),
        ("time", "timestamp"),
        ("rating", "rating"),
    ):
        given = getattr(options, f"{name}_column")
        optional = name in ("time", "rating") and not given and usual not in header
        places.append(None if optional else column(header, given, (usual,), interactions, f"--{name}-column"))
    if places[2] is None:
        print(f"{interactions} has no column timestamp: its order is taken for the order of time (see --time-column)")
    found = collect(rows, interactions, *places)
    rows = rows_of(items)
    header = [name.split(":")[0] if suffix else name for name in header_of(rows, items)]
    item = column(header, options.item_column, (f"item{suffix}",), items, "--item-column")
    title = column(header, options.title_column, titled, items, "--title-column")
    images = find_images(options.images, options.source, "images")
    return Raw(found, read_titles(items, rows, item, title, len(header)), images, [interactions, items])


def read_recbole(options: argparse.Namespace) -> Raw:
    """RecBole's atomic files: <name>.inter and <name>.item, with types in the header (`user_id:token`), tabs between;
    pictures in images/<item_id>.jpg."""
    inter, item = only(options.source, "*.inter"), only(options.source, "*.item")
    titled = ("title", "movie_title", "name")
    return from_tables(options, inter, item, partial(text_rows, delimiter="\t", quotes=False), titled, suffix="_id")


def frame_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a CSV file or, where pyarrow is installed, a Parquet file; the header comes first."""
    if path.suffix != ".parquet":
        yield from text_rows(path, "\t" if path.suffix == ".tsv" else ",")
        return
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; install it, or give a CSV file") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield 1, list(file.schema_arrow.names)
            number = 1
            for batch in file.iter_batches():
                for row in zip(*(values.to_pylist() for values in batch.columns), strict=True):
                    number += 1
                    yield number, [field_text(value) for value in row]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_csv(options: argparse.Namespace) -> Raw:
    """Any two tables: --interactions FILE and --items FILE (CSV, .tsv or .parquet, with a header), pictures in
    --images; columns are named by --user-column, --item-column, --time-column, --rating-column and --title-column."""
    return from_tables(options, options.interactions, options.items, frame_rows, ("title",))


READERS: dict[str, Callable[[argparse.Namespace], Raw]] = {
    "movielens": read_movielens,
    "microlens": read_microlens,
    "hanorec": read_hanorec,
    "amazon": read_amazon,
    "recbole": read_recbole,
    "csv": read_csv,
}
