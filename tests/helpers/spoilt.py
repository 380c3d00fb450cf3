"""Spoilt files, and the one line on stderr and exit code 2 that a script must end in where it is given them."""

import json
import re

import numpy as np
import pytest
from layouts import lines

from hanorec.run.files import file_hash

JUNK = np.random.default_rng(0).bytes(3000)
LOG = ["user", "item", "timestamp", "rating"]


def refused(capsys, main, *argv):
    """The one line that main(argv) ends in; progress bars aside, stderr holds nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    err = capsys.readouterr().err.replace("\x1b[A", "\n")  # of stacked bars
    said = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    said = [re.sub(r"^.*?(?=\w+\.py: error: )", "", line) for line in said if "error: " in line or "%|" not in line]
    assert stop.value.code == 2 and len(said) == 1, said
    assert all(c.isprintable() for c in said[0]) and len(said[0]) < 1200
    return said[0]


def half(content):
    return content[: len(content) // 2]


def sign(folder):
    """Update the hashes in manifest.json to its files, so that the check of hashes does not catch the change."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: file_hash(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in folder.glob("encoded/*/manifest.json"):
        known = json.loads(path.read_text()) | {"items": manifest["files"]["items.jsonl"]}
        path.write_text(json.dumps(known))


def changed(name, change):
    """An edit of the first row of a JSON Lines file, or of a JSON file, whose hash is brought up to date."""

    def edit(folder):
        path = folder / name
        if path.suffix == ".json":
            value = json.loads(path.read_text())
            path.write_text(json.dumps(change(value) or value))
            return
        rows = lines(path)
        rows[0] = change(rows[0]) or rows[0]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sign(folder)

    return edit


SPOILT = {"missing": None, "empty": lambda _: b"", "cut": half, "junk": lambda _: JUNK}
SPOILT |= {"a list": lambda _: b"[]\n", "nested": lambda _: b"[" * 100_000}


def spoil(path, how):
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(SPOILT[how](path.read_bytes()))


def set_(**values):
    return lambda row: row | values
