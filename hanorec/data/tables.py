"""Find raw files, and read delimited text, JSON Lines and Parquet as rows with line numbers."""

import argparse
import contextlib
import csv
import gzip
import itertools
import json
import re
import shlex
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from hanorec.run.files import UserError


def find_file(source: Path | None, *patterns: str) -> Path:
    """Return the file in `source` that matches a pattern. The first pattern with a match decides."""
    if source is None or not source.is_dir():
        raise UserError(f"--source {source} is not a folder; give the unpacked dataset")
    for pattern in patterns:
        paths = sorted(source.glob(pattern))
        if len(paths) > 1:
            raise UserError(f"{source} holds {len(paths)} files named {pattern}; keep one dataset in a folder")
        if paths:
            return paths[0]
    raise UserError(f"{source} holds no {' or '.join(patterns)}; --source must be the folder of this file")


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def find_images(options: argparse.Namespace, *names: str) -> dict[str, Path]:
    """Return the path of each image by item id, from files named <item id>.jpg or with another of IMAGE_ENDINGS.

    Args:
        names: patterns of folders in --source. Without --images, the first folder that exists is read.

    Raises:
        UserError: --images is no folder or holds no picture, or two pictures have the same item id.
    """
    folder = options.images
    if folder and not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder; give the folder of the pictures")
    if options.source and not folder:
        matches = itertools.chain.from_iterable(sorted(options.source.glob(name)) for name in names)
        folder = next(filter(Path.is_dir, matches), None)
    paths = sorted(folder.iterdir()) if folder else []
    images: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() in IMAGE_ENDINGS and not path.is_dir():
            if path.stem in images:
                raise UserError(f"{images[path.stem]} and {path} are pictures of one item; keep one")
            images[path.stem] = path
    if options.images and not images:
        raise UserError(f"--images {folder} holds no picture named <item>{', '.join(IMAGE_ENDINGS)}; rename them")
    return images


def text_rows(
    path: Path, delimiter: str = ",", encoding: str = "utf-8-sig", quotes: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of a delimited text file. Skip empty lines.

    Args:
        quotes: allow quotes around fields, as in CSV. If False, each line is split at the delimiter.
    """
    try:
        with open(path, encoding=encoding, newline="") as file:
            if quotes:
                reader = csv.reader(file, delimiter=delimiter, strict=True)
                numbered = ((reader.line_num, row) for row in reader)
            else:
                numbered = enumerate((line.rstrip("\r\n").split(delimiter) for line in file), 1)
            for number, row in numbered:
                if row and row != [""]:
                    yield number, row
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: it is not UTF-8 ({error}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def encoding_of(path: Path) -> str:
    """Return UTF-8 if the complete file is valid UTF-8, as MovieLens 10M is, else latin-1, as MovieLens 1M is.

    The name of UTF-8 is utf-8-sig, with which a byte order mark is no part of the first field.
    """
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
        return "utf-8-sig"
    except UnicodeDecodeError:
        return "latin-1"
    except OSError:
        return "utf-8-sig"  # text_rows will report the error


def json_fields(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, the named fields as text) of a JSON Lines file, gzipped or not. A missing field is empty."""
    open_file = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError("not a JSON object")
                    yield number, [field_text(value.get(name)) for name in names]
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}, near line {max(number, 1)}, cannot be read: {error}") from error


def field_text(value) -> str:
    """Convert a value of JSON or Parquet to the text of a CSV file. Raise ValueError for a list or an object."""
    if value is None or value != value:  # pandas writes NaN for a missing value
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError(f"expected a text or a number, got {value}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # an id: Parquet stores integers as floats if the column has nulls
    return str(value)


def header_of(rows: Iterator[tuple[int, list[str]]], path: Path, typed: bool = False) -> list[str]:
    """Return the fields of the first row, the header. The iterator then stands at the second row.

    Args:
        typed: remove RecBole's types from the names (`user_id:token` becomes `user_id`).
    """
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} is empty")
    return [name.split(":")[0] for name in first[1]] if typed else first[1]


def column(header: list[str], chosen: str | None, usual: tuple[str, ...], path: Path, remedy: str) -> int:
    """Return the position of a column in a header.

    Args:
        chosen: the name that the user gave. If None, the first of the usual names is used.
        remedy: what to do if there is no such column, for the error.
    """
    names = (chosen,) if chosen else usual
    for name in names:
        if name in header:
            return header.index(name)
    raise UserError(f"{path} has no column {' or '.join(names)}, only {', '.join(header)}; {remedy}")


# How words begin in the names of columns that are not named as usual: ordered_at, OrderDate, created, ts are times
NAMES = {
    "user": "user|customer|client|kunde|buyer|member|visitor",
    "item": "item|product|article|sku|artikel|produkt",
    "time": "(order|purchase)?(time|date)|[a-z]*datum|(created|ordered|purchased)(?!.*by)|(ts|at|when|day|zeit)$",
    "rating": "rating|stars|score|bewertung",
    "title": "title|(product|item|article)?name|[a-z]*titel|[a-z]*bezeichnung",
}
DATE = re.compile(r"\s*(\d{4}-\d\d?-\d\d?|\d\d?([./])\d\d?\2\d{2,4})\b")  # the form of a date, in any order


def likeness(name: str, meaning: str) -> int:
    """Return how surely a column's name has a meaning of NAMES: 3 if it is that word, 2 as its id, 1 as a part, else 0.

    >>> [likeness(name, "item") for name in ("Product", "productId", "main_product", "byproduct")]
    [3, 2, 1, 0]
    """
    words, name = NAMES[meaning], re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    for value, form in ((3, words), (2, rf"({words})[\W_]?id"), (1, rf"(.*[\W_])?({words}).*")):
        if re.fullmatch(form, name):
            return value
    return 0


def column_options(header: list[str], item_header: list[str], usual: dict[str, tuple], chosen: dict) -> str:
    """Return the options that name all columns which do not have their usual names: a remedy, with guesses.

    Args:
        header, item_header: of the interactions, and of the items.
        usual, chosen: the usual names of each column, and the name that the user gave or None.
    """
    words, columns = [], {}  # the column of each meaning, as far as it is known
    for name in NAMES:
        names = item_header if name == "title" else header
        wanted = (chosen[name],) if chosen[name] else usual[name]
        columns[name] = next((one for one in wanted if one in names or one == "none"), None)
    for name in NAMES:
        if not columns[name] and (chosen[name] or name != "rating"):
            others = [columns["item"]] if name == "title" else columns.values()
            found = [one for one in (item_header if name == "title" else header) if one not in others]
            # The column of items is in both tables
            found.sort(key=lambda one: (name == "item" and one in item_header, likeness(one, name)), reverse=True)
            columns[name] = next((one for one in found if likeness(one, name)), None)
        required = name in ("user", "item", "title")  # the other columns may be missing
        unusual = columns[name] not in usual[name] and (columns[name] or required)
        if chosen[name] or unusual:
            words += [f"--{name}-column", shlex.quote(columns[name] or "NAME")]
    both = columns["item"] in header and columns["item"] in item_header
    same = "" if both else "; the column of items must have one name in both tables"
    return f"name the columns: {' '.join(words)}{same}" if words else f"add this column{same}"


def column_remedy(options: str, header: list[str], path: Path) -> str:
    """Return the remedy for a missing column: `options`, or another separator if a text file's header is one field."""
    if len(header) > 1 or path.suffix == ".parquet":
        return options
    tabs_alone = path.suffix in (".tsv", ".inter", ".item")
    return f"separate the fields by {'tabs' if tabs_alone else 'commas, semicolons or tabs'}"


def ask_for_times(rows: Iterator, path: Path, header: list[str], positions: dict[str, int | None]) -> Iterator:
    """Print that the order of the lines is used. Returns the rows.

    Args:
        rows: the numbered rows after the header.
        positions: the columns with another meaning.

    Raises:
        UserError: a column looks like times, by its name or because its first value is a date.
    """
    first = next(rows, (0, []))
    for number, (name, value) in enumerate(zip(header, first[1], strict=False)):
        if number in positions.values():
            continue
        if likeness(name, "time") or DATE.match(value):
            question = f"{path} has no column timestamp. Does {name!r}, with {value!r}, hold the times?"
            raise UserError(f"{question} Then give --time-column {shlex.quote(name)}; otherwise --time-column none")
    print(f"{path} has no column timestamp: the order of its lines is used (see --time-column)")
    return itertools.chain([first] if first[1] else [], rows)


def separator(path: Path) -> str:
    """Return what separates the fields of a CSV file: a semicolon or a tab if its header has no comma, else a comma."""
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8-sig") as file:
        header = next(filter(str.strip, file), "")
        return next((mark for mark in ",;\t" if mark in header), ",")
    return ","  # text_rows will report the error


def timestamp(text: str) -> float:
    """Convert text to a time: a number, or a date to seconds since 1970 (UTC if it names no zone).

    Dates are ISO dates, or have the day first and points: 31.12.2025, 31.12.2025 14:05.

    >>> timestamp("02.01.1970 01:00") == timestamp("1970-01-02T01:00") == 25 * 3600
    True
    """
    with contextlib.suppress(ValueError):
        return float(text)
    date = re.sub(r"^(\d{1,2})\.(\d{1,2})\.(\d{4})(?=$|\D)", iso_date, text.strip())
    try:
        time = datetime.fromisoformat(date)
    except ValueError as error:
        forms = "a number, 2025-12-31, 2025-12-31 14:05 or 31.12.2025"
        raise ValueError(f"{text!r} is no time that can be read; write times as {forms}") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def iso_date(match: re.Match) -> str:
    day, month, year = match.groups()
    return f"{year}-{month:0>2}-{day:0>2}"


def table_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of a CSV, TSV or Parquet file (with pyarrow). The header comes first.

    Of a Parquet file only columns of text, numbers and times are read.
    """
    if path.suffix != ".parquet":
        yield from text_rows(path, "\t" if path.suffix == ".tsv" else separator(path))
        return
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs pyarrow; install it, or give a CSV file") from error

    def readable(kind) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
        return is_text or is_number or types.is_temporal(kind)

    try:
        with parquet.ParquetFile(path) as file:
            header = [field.name for field in file.schema_arrow if readable(field.type)]
            yield 1, header
            number = 1
            for batch in file.iter_batches(columns=header):
                for row in zip(*(values.to_pylist() for values in batch.columns), strict=True):
                    number += 1
                    yield number, [field_text(value) for value in row]
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
