"""The files of a data folder, data/<name>/: their fields, and how they are read.

An item has an item index, its line number in items.jsonl from 0, and an item id, its name in the source. Files contain
item ids; objects in memory contain item indices.
"""

from dataclasses import dataclass
from pathlib import Path

from hanorec.run.files import UserError, file_hash, read_json, read_jsonl

# The targets of test with other candidates. A data folder need not have them
FURTHER_TESTS = ("test_hard", "test_popularity", "test_99")
EVALUATED = ("val", "test", *FURTHER_TESTS)
# Names without .jsonl; manifest.json lists their hashes
FILES = ("items", "train", *EVALUATED, "sequences", "histories")

# The fields of the files, and their types
ITEM = {"item": str, "title": str, "image": (str, type(None))}
EXAMPLE = {"user": str, "history": list, "target": str, "candidates": list, "rejected": str}
SEQUENCE = {"user": str, "items": list}
HISTORY = {"user": str, "items": list, "others": list}
MANIFEST = {"options": dict, "seed": int, "files": dict}
ENCODING = {"backbone": str, "max_pixels": int, "dtype": str, "items": str, "tokens": (str, type(None))}

PREPARE = "prepare the data with prepare_data.py"


class Items:
    """The items of a data folder, by item index.

    Attributes:
        ids: item id of each item.
        titles: title of each item.
        images: path of each item's image, relative to the data folder; None without an image.
        index_of: item index by item id.
    """

    def __init__(self, lines: list[dict]):
        self.ids = [line["item"] for line in lines]
        self.titles = [line["title"] for line in lines]
        self.images = [line.get("image") for line in lines]
        self.index_of = {item: index for index, item in enumerate(self.ids)}
        if len(self.index_of) < len(lines):
            raise UserError(f"items.jsonl has an item twice; {PREPARE}")

    def __len__(self) -> int:
        return len(self.ids)

    def indices(self, ids: list, user: str) -> list[int]:
        """Convert a user's item ids to item indices. Raise UserError for an id that items.jsonl lacks."""
        for item in ids:
            if not isinstance(item, str) or item not in self.index_of:
                raise UserError(f"user {user}: {item!r} is not in items.jsonl; {PREPARE}")
        return [self.index_of[item] for item in ids]


@dataclass
class Example:
    """A line of train.jsonl or of a split in EVALUATED. Items are item indices.

    Args:
        history: the user's last items before the target, oldest first; before the first of several positives.
        target: the item to predict.
        candidates: items to rank, the target among them.
        rejected: a candidate other than the target, which training rejects.
    """

    user: str
    history: list[int]
    target: int
    candidates: list[int]
    rejected: int


class DataFolder:
    """A data folder that prepare_data.py wrote.

    Attributes:
        manifest: content of manifest.json.
        items: the items of items.jsonl.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = read_json(self.folder / "manifest.json", MANIFEST, PREPARE)
        self.items = Items(self.lines("items", ITEM))

    def lines(self, name: str, fields: dict) -> list[dict]:
        """Read <name>.jsonl. Raise UserError if its hash is not the one in manifest.json."""
        path = self.folder / f"{name}.jsonl"
        lines = read_jsonl(path, fields, PREPARE)
        if not lines or self.manifest["files"].get(path.name) != file_hash(path):
            raise UserError(f"{path} is empty, or not what manifest.json lists; {PREPARE}")
        return lines

    def evaluated(self) -> list[str]:
        """Return the splits of EVALUATED that the data folder has."""
        return [split for split in EVALUATED if f"{split}.jsonl" in self.manifest["files"]]

    def examples(self, split: str, limit: int = 0) -> list[Example]:
        """Return the examples of train or of a split in EVALUATED; only the first `limit` if `limit` is not 0.

        Raises:
            UserError: an example has an unknown item, no history, or candidates that do not fit.
        """
        lines = self.lines(split, EXAMPLE)
        if len({len(line["candidates"]) for line in lines}) != 1:
            raise UserError(f"{self.folder / split}.jsonl has candidates of several lengths; {PREPARE}")
        examples = []
        for line in lines[: limit or None]:
            user = line["user"]
            history = self.items.indices(line["history"], user)
            candidates = self.items.indices(line["candidates"], user)
            target, rejected = self.items.indices([line["target"], line["rejected"]], user)
            faults = {
                "an example has no history": not history,
                "the candidates lack the target": target not in candidates,
                "the candidates lack the rejected item": rejected not in candidates,
                "the rejected item is the target": rejected == target,
                "the candidates have an item twice": len(set(candidates)) < len(candidates),
            }
            for fault, is_there in faults.items():
                if is_there:
                    raise UserError(f"{self.folder / split}.jsonl, user {user}: {fault}; {PREPARE}")
            examples.append(Example(user, history, target, candidates, rejected))
        return examples

    def sequences(self) -> dict[str, list[int]]:
        """Return the complete training sequence of each training user: item indices, oldest first."""
        sequences: dict[str, list[int]] = {}
        for line in self.lines("sequences", SEQUENCE):
            if line["user"] in sequences:
                raise UserError(f"{self.folder / 'sequences.jsonl'} has user {line['user']} twice; {PREPARE}")
            sequences[line["user"]] = self.items.indices(line["items"], line["user"])
        return sequences

    def histories(self) -> dict[str, tuple[list[int], list[int]]]:
        """Return each user's whole history and the other items that the user touched: item indices, by user.

        A folder of an earlier version has no histories.jsonl. There a history is the training sequence and the targets
        of validation and test. With --split user, a validation or test user has only the example's history and target.
        """
        if "histories.jsonl" in self.manifest["files"]:
            read = {}
            for line in self.lines("histories", HISTORY):
                user = line["user"]
                read[user] = self.items.indices(line["items"], user), self.items.indices(line["others"], user)
                if not line["items"]:
                    raise UserError(f"user {user} has an empty history in histories.jsonl; {PREPARE}")
            return read
        histories = self.sequences()
        for example in [*self.examples("val"), *self.examples("test")]:
            histories.setdefault(example.user, list(example.history)).append(example.target)
        return {user: (items, []) for user, items in histories.items()}

    def encodings(self) -> dict[str, tuple[Path, dict]]:
        """Return (folder, manifest) of each encoding of this data folder, by backbone."""
        encodings: dict[str, tuple[Path, dict]] = {}
        for path in sorted(self.folder.glob("encoded/[!.]*/manifest.json")):
            manifest = read_json(path, ENCODING, f"encode again: prepare_data.py --encode-only --out {self.folder}")
            backbone = manifest["backbone"]
            if backbone in encodings:
                raise UserError(f"{encodings[backbone][0]} and {path.parent} are both of {backbone}; delete one")
            encodings[backbone] = (path.parent, manifest)
        return encodings
