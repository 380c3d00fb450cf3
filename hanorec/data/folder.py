"""A data folder, data/<name>/: the schema of its files, and the classes that they are read into.

Items are identified by their item index, their line number in items.jsonl, and by their item id, the source's. Files
hold ids; in memory everything is an index.
"""

from dataclasses import dataclass
from pathlib import Path

from hanorec.run.files import UserError, file_hash, read_json, read_jsonl

FILES = ("items", "train", "val", "test", "sequences")  # .jsonl each, listed with their hashes in manifest.json

# The fields of the lines, and their types
ITEM = {"item": str, "title": str, "image": (str, type(None))}
EXAMPLE = {"user": str, "history": list, "target": str, "candidates": list, "rejected": str}
SEQUENCE = {"user": str, "items": list}
MANIFEST = {"options": dict, "seed": int, "files": dict}
ENCODING = {"backbone": str, "max_pixels": int, "dtype": str, "items": str, "tokens": (str, type(None))}

PREPARE_AGAIN = "prepare it with prepare_data.py"


class Items:
    """The items of a data folder, by item index.

    Attributes:
        ids, titles: of each item.
        images: path of each item's image, relative to the data folder; None without one.
        index_of: item index by item id.
    """

    def __init__(self, lines: list[dict]):
        self.ids = [line["item"] for line in lines]
        self.titles = [line["title"] for line in lines]
        self.images = [line.get("image") for line in lines]
        self.index_of = {item: index for index, item in enumerate(self.ids)}
        if len(self.index_of) < len(lines):
            raise UserError("items.jsonl has an item twice; prepare the data again")

    def __len__(self) -> int:
        return len(self.ids)

    def indices(self, ids: list, user: str) -> list[int]:
        """Item indices of item ids. UserError, naming the user, if items.jsonl lacks one."""
        for item in ids:
            if not isinstance(item, str) or item not in self.index_of:
                raise UserError(f"user {user}: {item!r} is not in items.jsonl; prepare the data again")
        return [self.index_of[item] for item in ids]


@dataclass
class Example:
    """A line of train.jsonl, val.jsonl or test.jsonl: a user's history (oldest first), target, candidates with the
    target among them, and one rejected item. Items are item indices."""

    user: str
    history: list[int]
    target: int
    candidates: list[int]
    rejected: int

    @classmethod
    def from_line(cls, line: dict, items: Items) -> "Example":
        """Raises UserError if the line names an unknown item, or lacks a history or a target among its candidates."""
        user = line["user"]
        history, candidates = (items.indices(line[name], user) for name in ("history", "candidates"))
        target, rejected = items.indices([line["target"], line["rejected"]], user)
        if not history or target not in candidates or len(set(candidates)) < len(candidates):
            raise UserError(
                f"user {user}: an example has a history, and its target once among its candidates; {PREPARE_AGAIN}"
            )
        return cls(user, history, target, candidates, rejected)


class DataFolder:
    """A folder that prepare_data.py wrote. It opens no model and renders no prompt.

    Attributes:
        manifest: manifest.json.
        items: the Items.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / "manifest.json", MANIFEST, PREPARE_AGAIN)
        self.items = Items(self.lines("items", ITEM))

    def lines(self, name: str, fields: dict) -> list[dict]:
        """Read <name>.jsonl. UserError if it is not the file that manifest.json lists."""
        path = self.folder / f"{name}.jsonl"
        lines = read_jsonl(path, fields, PREPARE_AGAIN)
        if not lines or self.manifest["files"].get(path.name) != file_hash(path):
            raise UserError(f"{path} is empty, or not what manifest.json lists; {PREPARE_AGAIN}")
        return lines

    def examples(self, split: str, limit: int = 0) -> list[Example]:
        """The examples of train, val or test; only the first `limit` if that is not 0."""
        lines = self.lines(split, EXAMPLE)
        if len({len(line["candidates"]) for line in lines}) != 1:
            raise UserError(f"{self.folder / split}.jsonl has candidates of several lengths; {PREPARE_AGAIN}")
        return [Example.from_line(line, self.items) for line in (lines[:limit] if limit else lines)]

    def sequences(self) -> dict[str, list[int]]:
        """Each training user's whole training sequence, oldest first, as item indices."""
        lines = self.lines("sequences", SEQUENCE)
        return {line["user"]: self.items.indices(line["items"], line["user"]) for line in lines}

    def encodings(self) -> dict[str, tuple[Path, dict]]:
        """The encodings of this folder by backbone: (folder, manifest)."""
        encodings = {}
        for path in sorted(self.folder.glob("encoded/[!.]*/manifest.json")):
            manifest = read_json(path, ENCODING, PREPARE_AGAIN)
            encodings[manifest["backbone"]] = (path.parent, manifest)
        return encodings
