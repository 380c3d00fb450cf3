"""Show progress: a bar on a terminal, and a line every few seconds in a log that is no terminal."""

import os
import sys
import time
from collections.abc import Iterable, Iterator

from accelerate.utils import tqdm

SECONDS = 10.0  # between two lines


def progress(iterable: Iterable | None = None, *, total: int | None = None, desc: str, unit: str, leave: bool = True):
    """Return a tqdm bar if stderr is a terminal, else `Lines`. Only the main process shows anything.

    Args:
        iterable: what to iterate over; its length is the total.
        total: number of units, without an iterable.
        leave: keep the complete bar on the terminal.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, total=total, desc=desc, unit=unit, leave=leave)
    return Lines(iterable, total, desc)


class Lines:
    """Prints a line to stderr every SECONDS. It has those methods of a tqdm bar that the scripts use."""

    def __init__(self, iterable: Iterable | None, total: int | None, desc: str):
        self.iterable, self.desc = iterable, desc
        self.total = len(iterable) if total is None else total
        self.shown = int(os.environ.get("RANK", 0)) == 0
        self.n, self.initial, self.postfix = 0, 0, ""  # units done in all, and by an earlier process
        self.began = self.printed = time.monotonic()

    def __iter__(self) -> Iterator:
        for value in self.iterable:
            yield value
            self.update()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def set_postfix(self, values: dict) -> None:
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if self.shown and now - self.printed >= SECONDS:
            self.printed = now
            seconds = (now - self.began) / (self.n - self.initial) * (self.total - self.n)
            left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
            line = f"{self.desc}: {self.n} of {self.total}, {left} left{self.postfix}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print nothing: the script prints its result."""
