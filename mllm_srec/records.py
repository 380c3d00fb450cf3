"""A file of lines that takes long to write: shared out over processes, safe against a crash, and continued by the next
run."""

import json
from collections.abc import Callable
from pathlib import Path

from hanorec.run import runs


class Record:
    """Each process appends to a part of its own, and in the end all parts together are the file. A part begins with the
    key of what its lines are made of; parts of another key are begun anew, and a line that was cut off is dropped.

    done: the lines that earlier runs have left, of all processes.
    """

    def __init__(self, path: Path, key: str, accelerator):
        self.path, self.key, self.accelerator = path, key, accelerator
        self.done = self.lines()
        accelerator.wait_for_everyone()  # all have read what there is
        own = path.with_name(f".{path.name}.{accelerator.process_index}.part")
        kept = whole(own) if header(own) == key else (json.dumps({"key": key}) + "\n").encode()
        with runs.replacing(own) as beside:
            beside.write_bytes(kept)
        self.file = open(own, "a", encoding="utf-8")  # closed by finish

    def parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{self.path.name}.*.part"))

    def lines(self) -> list[dict]:
        """Those of all parts with this key."""
        parts = [part for part in self.parts() if header(part) == self.key]
        return [json.loads(line) for part in parts for line in whole(part).splitlines()[1:]]

    def add(self, lines: list[dict]) -> None:
        """Append lines; after that they outlast this process."""
        self.file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.file.flush()

    def finish(self, order: Callable) -> list[dict]:
        """Write the file, its lines sorted by the key `order`, and drop the parts. Returns all lines."""
        self.file.close()
        self.accelerator.wait_for_everyone()
        lines = sorted(self.lines(), key=order)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            runs.write_jsonl(self.path, lines)
            for part in self.parts():
                part.unlink()
        self.accelerator.wait_for_everyone()
        return lines


def whole(part: Path) -> bytes:
    """A part up to the end of its last whole line."""
    content = part.read_bytes() if part.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def header(part: Path) -> str | None:
    """The key that a part begins with."""
    first = whole(part).split(b"\n")[0]
    return json.loads(first)["key"] if first else None
