"""Spoil files, and check that a script refuses them with one line on stderr and exit code 2."""

import json
import re

import numpy as np
import pytest
from layouts import lines

from hanorec.run.files import file_hash

JUNK = np.random.default_rng(0).bytes(3000)
LOG = ["user", "item", "timestamp", "rating"]


def refused(capsys, main, *argv):
    """Run main(argv), which must end with exit code 2 and one line on stderr, progress aside. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    err = capsys.readouterr().err.replace("\x1b[A", "\n")  # between progress bars that stand one above the other
    printed = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    printed = [line for line in printed if "error: " in line or not re.search(r"%\||: \d+ of \d+, ", line)]
    # An error may stand behind a progress bar on the same line
    printed = [re.sub(r"^.*?(?=\w+\.py: error: )", "", line, count=1) for line in printed]
    assert stop.value.code == 2 and len(printed) == 1, printed
    assert printed[0].isprintable() and len(printed[0]) < 1200
    return printed[0]


def half(content):
    return content[: len(content) // 2]


def sign(folder):
    """Update the hashes in manifest.json to its files, so that the check of hashes does not catch the change."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: file_hash(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in folder.glob("encoded/*/manifest.json"):
        encoding_manifest = json.loads(path.read_text()) | {"items": manifest["files"]["items.jsonl"]}
        path.write_text(json.dumps(encoding_manifest))


def changed(name, change):
    """A function that edits a JSON file, or the first line of a JSON Lines file, and updates the file's hash.

    Args:
        change: gets the JSON object and changes it, or returns a new one.
    """

    def edit(folder):
        path = folder / name
        if path.suffix == ".json":
            value = json.loads(path.read_text())
            path.write_text(json.dumps(change(value) or value))
            return
        values = lines(path)
        values[0] = change(values[0]) or values[0]
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        sign(folder)

    return edit


SPOILT = {"missing": None, "empty": lambda _: b"", "cut": half, "junk": lambda _: JUNK}
SPOILT |= {"a list": lambda _: b"[]\n", "nested": lambda _: b"[" * 100_000}


def spoil(path, how):
    """Spoil a file in one of the ways in SPOILT."""
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(SPOILT[how](path.read_bytes()))


def set_(**values):
    """A change that sets these fields."""
    return lambda fields: fields | values
