"""Files between the stages: errors in one line, atomic writes, locks, JSON with a schema, hashes.

A file is written beside its final name and then renamed. A reader sees the complete old file or the complete new one.
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

from hanorec.run import interrupts


class UserError(ValueError):
    """A mistake that the user can correct. The message names the cause, the place and the remedy."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def printable(text) -> str:
    r"""Escape control characters, line ends and direction marks in a text from the data.

    >>> printable("a\x1b[2Jb\u202ec\n")
    'a\\x1b[2Jb\\u202ec\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def print_main(text: str) -> None:
    """Print a text with `printable`, on the main process alone. The accelerator need not have started."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(printable(text), flush=True)


REMEDIES = {  # by the error number of the operating system
    errno.ENOSPC: "make room on that disk, or choose a folder on another one",
    errno.EDQUOT: "make room within your quota, or choose a folder on another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "change its permissions, or choose another file or folder",
    errno.EPERM: "change its permissions, or choose another file or folder",
}
LONGEST_MESSAGE = 1000  # characters; a message may quote a line of a file, and lines have no maximum length


def disk_message(error: Exception) -> str | None:
    """Return a message for an error of the disk or of permissions, None for any other error."""
    if isinstance(error, OSError):
        number = error.errno
    else:  # libraries written in Rust keep the number in the text of their error
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = int(match[1]) if match else None
    if number not in REMEDIES:
        return None
    place = getattr(error, "filename", None) or ", ".join(getattr(error, "__notes__", ["a file"]))
    return f"{place}: {os.strerror(number)}; {REMEDIES[number]}"


def one_line_errors(main: Callable) -> Callable:
    """Wrap a script's main: end a UserError, or an error in REMEDIES, with one line on stderr and exit code 2.

    From the call of `main` on, Ctrl-C raises KeyboardInterrupt, which ends the process with one line too.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None):
        if main.__name__ == "main":  # not where the options are parsed, before the imports
            interrupts.raise_again()
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
            print(f"{Path(sys.modules[main.__module__].__file__).name}: error: {message}", file=sys.stderr, flush=True)
            raise SystemExit(UserError.exit_code) from error

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes and locks


def partial_name(path: Path, kind: str) -> Path:
    """Return a name beside `path` that no reader uses. `locked` cleans up the files of killed processes."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}.partial")


def delete(path: Path) -> None:
    """Delete a file or a folder, if it exists. A reader sees the complete folder or no folder."""
    if path.is_dir():
        renamed = partial_name(path, "deleted")
        os.replace(path, renamed)
        shutil.rmtree(renamed)
    else:
        path.unlink(missing_ok=True)


def make_readable(*paths: Path) -> None:
    """Give files the permissions of any new file. safetensors writes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        if path.is_file():
            path.chmod(0o666 & ~mask)


def sync_to_disk(*paths: Path) -> None:
    """Wait until these files and folders are on the disk, so that a power cut cannot lose them."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def not_a_folder(path: Path) -> None:
    """Raise UserError if a file cannot be written to `path`, because it is a folder."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the file to write")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or a folder to. It is renamed to `path` when the block ends.

    After an error, `path` is what it was before.

    Raises:
        UserError: a file was written, and `path` is a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = partial_name(path, "new"), partial_name(path, "old")
    delete(new)  # left by a killed process that had the same process id
    try:
        yield new
        if not new.is_dir():
            not_a_folder(path)
        written = [new, *new.rglob("*")]
        make_readable(*written)
        sync_to_disk(*written)
        if path.is_dir():
            os.replace(path, old)
        os.replace(new, path)
        sync_to_disk(path.parent)
    except Exception as error:
        error.add_note(str(path))  # disk_message names this place if the error names none
        raise
    finally:
        if old.exists() and not path.exists():  # the second rename failed
            os.replace(old, path)
        delete(new)
        delete(old)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create and lock `folder`, so that one process at a time writes to it. Clean up after killed processes.

    Raises:
        UserError: another process has locked the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # the lock ends when this file is closed, or the process is killed
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another process; wait for it, or choose another --out") from error
        except OSError as error:
            raise UserError(f"{folder} cannot be locked ({error}); choose an --out on another disk") from error
        for partial in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
            match = re.fullmatch(r"\.(.+)\.\d+\.old\.partial", partial.name)
            if match and not partial.with_name(match[1]).exists():  # killed between the two renames of `replacing`
                os.replace(partial, partial.with_name(match[1]))
            else:
                delete(partial)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def write_json(path: Path, value) -> None:
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, lines: Iterable) -> None:
    """Write each element on one line: a dict, or a string that is JSON already."""
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        for line in lines:
            file.write((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n")


def require(value, fields: dict, place: str, remedy: str) -> dict:
    """Return `value` if it is a JSON object with these fields, else raise UserError.

    Args:
        fields: the type of each field, by name.
        place: the file, and the line if there are several, for the message.
        remedy: what the user can do, for the message.
    """
    if not isinstance(value, dict):
        raise UserError(f"{place}: no JSON object; {remedy}")
    for name, kind in fields.items():
        if name not in value:
            raise UserError(f"{place}: no {name!r}; {remedy}")
        if not isinstance(value[name], kind):
            raise UserError(f"{place}: {name!r} cannot be {json.dumps(value[name])}; {remedy}")
    return value


def read_jsonl(path: Path, fields: dict, remedy: str, whole: bool = False) -> list[dict]:
    """Read a file with one JSON object on each line, and check each as `require` does.

    Args:
        whole: the file is one JSON object.
    """
    objects = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate([file.read()] if whole else file, 1):
                place = str(path) if whole else f"{path}, line {number}"
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place}: not JSON ({error}); {remedy}") from error
                objects.append(require(value, fields, place, remedy))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {remedy}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    return objects


def read_json(path: Path, fields: dict, remedy: str) -> dict:
    """Read the JSON object in `path` and check it as `require` does."""
    return read_jsonl(path, fields, remedy, whole=True)[0]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def value_hash(value) -> str:
    """Return the SHA-256 of a JSON value. The order of keys does not change it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
