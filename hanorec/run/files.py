"""Files between the stages: errors in one line, atomic writes, locks, JSON with a schema, hashes.

A file is written beside its final name and then renamed. A reader sees the old file or the new one, never a half.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend. The message says what is wrong, where, and what to do."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def printable(text) -> str:
    r"""Return text from the data on one line, with control characters and marks of direction escaped.

    >>> printable("a\x1b[2Jb\u202ec\n")
    'a\\x1b[2Jb\\u202ec\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
LONGEST_MESSAGE = 1000  # characters; a message may quote a line of a file, which may be of any length


def disk_message(error: Exception) -> str | None:
    """Return a message for an error of a disk that is full or read-only; None for any other error."""
    if isinstance(error, OSError):
        number = error.errno
    else:  # libraries written in Rust keep the number in the text of their error
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = int(match[1]) if match else None
    if number not in UNWRITABLE:
        return None
    where = getattr(error, "filename", None) or ", ".join(getattr(error, "__notes__", ["a file"]))
    return f"{where}: {os.strerror(number)}; make room or give leave to write there, or choose another folder"


def one_line_errors(main: Callable) -> Callable:
    """Wrap a script's main: a UserError, or a disk that is full or read-only, ends in one line on stderr and exit 2."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        if isinstance(sys.stdout, io.TextIOWrapper):  # a title may not be in the terminal's encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except Exception as error:
            message = disk_message(error)
            if message is None and not isinstance(error, UserError):
                raise
            message = printable(" ".join((message or str(error)).split()))
            if len(message) > LONGEST_MESSAGE:
                message = f"{message[: LONGEST_MESSAGE // 2]} ... {message[-LONGEST_MESSAGE // 2 :]}"
            script = Path(sys.modules[main.__module__].__file__).name
            print(f"{script}: error: {message}", file=sys.stderr, flush=True)
            raise SystemExit(UserError.exit_code) from error

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes and locks


def partial_name(path: Path, kind: str) -> Path:
    """Return a name beside `path` that no reader uses. `locked` removes what a killed process leaves under it."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}.partial")


def delete(path: Path) -> None:
    """Delete a file or a folder that may be absent. A reader sees all of a folder or nothing."""
    if path.is_dir():
        renamed = partial_name(path, "old")
        os.replace(path, renamed)
        shutil.rmtree(renamed)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(*paths: Path) -> None:
    """Wait until the disk holds these files and folders, so that no power cut can take them back."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or a folder at. It takes the final name once the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = partial_name(path, "new"), partial_name(path, "old")
    delete(new)  # left by a killed process of the same number
    try:
        yield new
        sync_to_disk(new, *new.rglob("*"))
        if path.is_dir():
            os.replace(path, old)
        os.replace(new, path)
        sync_to_disk(path.parent)  # the new name too
    except Exception as error:
        error.add_note(str(path))
        raise
    finally:
        delete(new)
        delete(old)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` (created if absent) for one writer at a time. UserError if another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # closed below; its lock ends with it, also by a kill
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by another process; wait for it, or choose another --out") from error
        for leftover in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:  # of a killed writer
            delete(leftover)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def write_json(path: Path, value) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, lines: Iterable) -> None:
    """Write one line each: a dict, or a string that is JSON already."""
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n")


def require(value, fields: dict, where: str, remedy: str) -> dict:
    """Return `value` if it is an object with these fields (name to type); else UserError with the remedy."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: no JSON object; {remedy}")
    for name, kind in fields.items():
        if name not in value:
            raise UserError(f"{where}: no {name!r}; {remedy}")
        if not isinstance(value[name], kind):
            raise UserError(f"{where}: {name!r} cannot be {json.dumps(value[name])}; {remedy}")
    return value


def read_json(path: Path, fields: dict, remedy: str) -> dict:
    """Read the JSON object in `path`, with these fields (name to type). UserError if it is missing or bad."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    return require(value, fields, str(path), remedy)


def read_jsonl(path: Path, fields: dict, remedy: str) -> list[dict]:
    """Read the objects in `path`, one a line, each with these fields (name to type). UserError names the bad line."""
    lines = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                lines.append(require(json.loads(line), fields, f"{path}, line {number}", remedy))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {remedy}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}, line {len(lines) + 1}: not JSON ({error}); {remedy}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    return lines


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_hash(value) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
