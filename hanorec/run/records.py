"""Write a file of JSON lines that takes long to compute, by several processes, and continue it after a crash.

Each process appends its lines to a file of its own, a part. At the end all parts are joined into the file. The first
line of a part is a key: a hash of everything that the lines are computed from. A part with another key is ignored.
If a crash left an incomplete last line in a part, that line is dropped.
"""

import json
from collections.abc import Callable
from pathlib import Path

from hanorec.run.files import replacing, write_jsonl


class Record:
    """A file of JSON lines while it is written.

    Args:
        path: the file, which `finish` writes.
        key: a hash of everything that the lines are computed from.

    Attributes:
        done: the lines that earlier runs wrote, of all processes; then the lines that this process adds.
    """

    def __init__(self, path: Path, key: str, accelerator):
        self.path, self.key, self.accelerator = path, key, accelerator
        self.done = [json.loads(line) for line in self.read_parts()]
        accelerator.wait_for_everyone()  # until every process has read the parts
        process = accelerator.process_index
        part = path.with_name(f".{path.name}.{process}.part")
        lines = [json.dumps({"key": key}).encode(), *self.read_parts(process)]
        with replacing(part) as new:
            new.write_bytes(b"".join(line + b"\n" for line in lines))
        self.file = open(part, "a", encoding="utf-8")  # closed by finish

    def read_parts(self, process: int | str = "*") -> list[bytes]:
        """Return the complete lines of the parts with this key, without the key: of one process, or of all."""
        lines = []
        for part in sorted(self.path.parent.glob(f".{self.path.name}.{process}.part")):
            content = part.read_bytes()
            part_lines = content[: content.rfind(b"\n") + 1].splitlines()
            if part_lines and json.loads(part_lines[0])["key"] == self.key:
                lines += part_lines[1:]
        return lines

    def add(self, lines: list[dict]) -> None:
        """Append lines to this process's part. From then on a crash does not lose them."""
        self.file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.file.flush()
        self.done += lines

    def finish(self, order: Callable) -> list[dict]:
        """Join all parts into the file and delete the parts. Returns the lines of the file.

        Args:
            order: from a line to its sort key.
        """
        self.file.close()
        self.accelerator.wait_for_everyone()
        lines = sorted(map(json.loads, self.read_parts()), key=order)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_jsonl(self.path, lines)
            for part in self.path.parent.glob(f".{self.path.name}.*.part"):
                part.unlink()
        self.accelerator.wait_for_everyone()
        return lines
