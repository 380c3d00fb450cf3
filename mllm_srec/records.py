"""A file of lines that takes long to write: shared out over processes, safe against a crash, continued by the next run.

Each process appends to a part of its own; in the end all parts together are the file. A part begins with a key, a hash
of what its lines are made of. Parts with another key are begun anew. A line that was cut off is dropped.
"""

import json
from collections.abc import Callable
from pathlib import Path

from hanorec.run.files import replacing, write_jsonl


class Record:
    """The file while it is written.

    Args:
        path: of the finished file.
        key: a hash of what its lines are made of.

    Attributes:
        done: the lines that earlier runs left, of all processes.
    """

    def __init__(self, path: Path, key: str, accelerator):
        self.path, self.key, self.accelerator = path, key, accelerator
        self.done = self.lines()
        accelerator.wait_for_everyone()  # every process has read the parts
        own = path.with_name(f".{path.name}.{accelerator.process_index}.part")
        kept = complete_lines(own) if key_of(own) == key else (json.dumps({"key": key}) + "\n").encode()
        with replacing(own) as new:
            new.write_bytes(kept)
        self.file = open(own, "a", encoding="utf-8")  # closed by finish

    def parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{self.path.name}.*.part"))

    def lines(self) -> list[dict]:
        """The lines of all parts with this key."""
        parts = [part for part in self.parts() if key_of(part) == self.key]
        return [json.loads(line) for part in parts for line in complete_lines(part).splitlines()[1:]]

    def add(self, lines: list[dict]) -> None:
        """Append lines. After that they outlast this process."""
        self.file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.file.flush()

    def finish(self, order: Callable) -> list[dict]:
        """Write the file, its lines sorted by the key `order`, and delete the parts. Returns all lines."""
        self.file.close()
        self.accelerator.wait_for_everyone()
        lines = sorted(self.lines(), key=order)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_jsonl(self.path, lines)
            for part in self.parts():
                part.unlink()
        self.accelerator.wait_for_everyone()
        return lines


def complete_lines(part: Path) -> bytes:
    """A part up to the end of its last complete line."""
    content = part.read_bytes() if part.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def key_of(part: Path) -> str | None:
    """The key that a part begins with."""
    first = complete_lines(part).split(b"\n")[0]
    return json.loads(first)["key"] if first else None
