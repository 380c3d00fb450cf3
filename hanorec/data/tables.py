"""Read the raw files of datasets: delimited text, JSON Lines and Parquet, as rows with their line numbers."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from hanorec.run.files import UserError


def find_file(source: Path | None, *patterns: str) -> Path:
    """Return the one file in `source` that matches the first pattern with any match."""
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
    """Yield (line number, fields) of a delimited text file, without empty lines.

    Args:
        quotes: fields may stand in quotes, as in CSV; else each line is split at the delimiter.
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
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def encoding_of(path: Path) -> str:
    """utf-8 if the whole file is valid UTF-8, else latin-1. MovieLens 10M is the first, MovieLens 1M the second."""
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
        return "utf-8"
    except UnicodeDecodeError:
        return "latin-1"
    except OSError:
        return "utf-8"  # text_rows reports what is wrong with the file


def json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a JSON Lines file, gzipped or not."""
    open_file = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with open_file(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                    yield number, row
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}, near line {max(number, 1)}, cannot be read: {error}") from error


def json_fields(path: Path, names: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, these fields as text) of a JSON Lines file. A missing field is empty."""
    for number, row in json_rows(path):
        try:
            yield number, [field_text(row.get(name)) for name in names]
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error


def field_text(value) -> str:
    """Spell a value of JSON or Parquet as a CSV file would. ValueError for a list or an object."""
    if value is None or value != value:  # pandas writes NaN for a missing value
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError(f"expected a text or a number, got {value}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # ids in a column that also has nulls
    return value.decode() if isinstance(value, bytes) else str(value)


def header_of(rows: Iterator[tuple[int, list[str]]], path: Path) -> list[str]:
    """Take the first row, the header."""
    for _, row in rows:
        return row
    raise UserError(f"{path} is empty")


def column(header: list[str], given: str | None, usual: tuple[str, ...], path: Path, option: str) -> int:
    """Return the position of a column in a header: the one that the option names, else the first usual name."""
    names = (given,) if given else usual
    for name in names:
        if name in header:
            return header.index(name)
    raise UserError(f"{path} has no column {' or '.join(names)}, only {', '.join(header)}; name it with {option}")


def table_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of a CSV, TSV or Parquet file (with pyarrow). The header comes first."""
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
