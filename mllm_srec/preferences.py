"""What MLLM-SRec knows about a user at a point of time: item summaries, preference paragraphs and profiles.

A user's timeline is everything that the user chose, oldest first. An example stands at a point of it, its cut: the
number of items before its target. Nothing behind the cut enters the example's prompt.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hanorec.data.folder import DataFolder, Example, Items
from hanorec.model.encoding import Encoding
from hanorec.run.files import UserError, file_hash, read_json, read_jsonl, value_hash
from mllm_srec.texts import fill, fill_text, read_texts

# The fields of the files in data/<name>/summaries/<name>/, and their types. A text of None cannot be used.
TEXT = (str, type(None))
MANIFEST = {"data": str, "prompts": str}
SUMMARY = {"item": str, "summary": TEXT, "fault": TEXT}
PREFERENCE = {"user": str, "end": int, "paragraph": TEXT, "fault": TEXT, "profile": TEXT, "profile_fault": TEXT}
PICTURES = ("backbone", "items", "tokens")  # of the encoding's manifest: they identify the pictures


def timelines(data: DataFolder) -> dict[str, list[int]]:
    """Everything that each user chose before the test target, oldest first, as item indices.

    It is the training sequence, then what the histories of validation and test examples have beyond it.
    """
    found = {user: list(items) for user, items in data.sequences().items()}
    for example in [*data.examples("val"), *data.examples("test")]:
        timeline = found.setdefault(example.user, [])
        timeline += [item for item in example.history if item not in timeline]
    return found


def window_ends(cuts: Iterable[int], window: int, step: int, before: int = 0) -> list[int]:
    """Where a user's windows end, as numbers of items: after `window` items, then every `step` items to the last cut.

    Args:
        cuts: of the user's examples.
        window: items in a window; 0: the whole history at each cut.
        before: begin so many items before the first cut, not at the beginning. Later items do not move it.

    >>> window_ends([4, 8], window=3, step=3), window_ends([4, 8], 3, 1, before=4), window_ends([4, 8], 0, 3)
    ([3, 6], [3, 4, 5, 6, 7, 8], [4, 8])
    """
    cuts = sorted(set(cuts))
    if window == 0:
        return cuts
    start = max(0, cuts[0] - before) if before else 0
    return list(range(start + window, cuts[-1] + 1, step))


class UserTexts:
    """The texts about items and users, as prompts read them.

    Args:
        texts: the prompts by name.
        timelines: by user, as `timelines` gives them.
        summaries: [N], by item index; None without a usable summary.
        users: by user [(end, paragraph or None, profile or None)], ordered by end. The paragraph was made of the first
            `end` items of the timeline.
    """

    def __init__(
        self, texts: dict[str, str], items: Items, timelines: dict[str, list[int]], summaries: list, users: dict
    ):
        self.texts, self.items, self.timelines, self.summaries, self.users = texts, items, timelines, summaries, users
        self.position = {u: {item: i for i, item in enumerate(timeline)} for u, timeline in timelines.items()}
        counts = Counter(word for item in range(len(summaries)) for word in self.words(item))
        self.frequent = {word for word, count in counts.items() if 2 * count > len(summaries)}

    def cut(self, example: Example) -> int:
        """How many items of the user's timeline an example may know: up to the last one of its history."""
        return self.position[example.user][example.history[-1]] + 1

    def line(self, item: int) -> str:
        """An item as it stands in a prompt."""
        title, summary = self.items.titles[item], self.summaries[item]
        if summary is None:
            return fill_text(self.texts["line without a summary"], title=title)
        return fill_text(self.texts["line"], title=title, summary=summary)

    def lines(self, items: Iterable[int]) -> str:
        return "\n".join(self.line(item) for item in items) or self.texts["nothing"]

    def preference_prompt(self, items: Iterable[int], before: str | None) -> list[str | int]:
        """The prompt for a paragraph about these items. before: the paragraph before, None for a user's first."""
        if before is None:
            return fill(self.texts["first preference"], items=self.lines(items))
        return fill(self.texts["preference"], items=self.lines(items), preference=before)

    def at(self, example: Example) -> dict[str, str]:
        """What is known about the user at an example's cut.

        Returns profile and preference (the last usable ones that nothing behind the cut entered), since (the items of
        the history after that paragraph) and last (its last item).
        """
        cut, nothing = self.cut(example), self.texts["nothing"]
        preference_end, preference, profile = 0, nothing, nothing
        for end, paragraph, line in self.users.get(example.user, []):
            if end <= cut and paragraph is not None:
                preference_end, preference = end, paragraph or nothing
            if end <= cut and line is not None:
                profile = line or nothing
        position, last = self.position[example.user], example.history[-1]
        return {
            "profile": profile,
            "preference": preference,
            "since": self.lines(item for item in example.history if position[item] >= preference_end),
            "last": self.summaries[last] or self.items.titles[last],
        }

    def words(self, item: int) -> list[str]:
        """The distinct words of an item's title and summary, in order."""
        text = f"{self.items.titles[item]} {self.summaries[item] or ''}"
        return list(dict.fromkeys(re.findall(r"\w{3,}", text.casefold())))

    def common(self, item: int, *texts: str) -> str:
        """The words of an item that these texts have too, without the words that most items have."""
        others = " ".join(text for text in texts if text != self.texts["nothing"])
        known = set(re.findall(r"\w{3,}", others.casefold()))
        words = [word for word in self.words(item) if word in known and word not in self.frequent]
        return ", ".join(words) or self.texts["nothing"]

    def steps(self, values: dict[str, str], candidate: int) -> str:
        """The steps of thought about a candidate, from `at` and the candidate's texts. The label enters nowhere."""
        title = self.items.titles[candidate]
        summary = self.summaries[candidate] or title
        common = self.common(candidate, values["preference"], values["since"])
        return fill_text(self.texts["steps"], title=title, summary=summary, common=common, **values) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The summaries folder


def summaries_folder(data: DataFolder, encoding: Encoding, name: str | None) -> Path:
    """The folder of summaries of this name; of the encoding's name if None or empty."""
    if encoding.tokens.blank_images:
        raise UserError("summaries tell what the pictures show: with them --blank-images hides little")
    return data.folder / "summaries" / (name or encoding.folder.name)


def data_hash(items: Items, timelines: dict[str, list[int]]) -> str:
    """SHA-256 of the items and timelines that texts are written for."""
    return value_hash([items.ids, items.titles, list(timelines.items())])


def summaries_hash(folder: Path) -> str:
    """SHA-256 of the texts in a summaries folder and of their prompts, but not of how they were written."""
    manifest = read_json(folder / "manifest.json", MANIFEST, remedy(folder))
    hashes = [manifest.get(name, {}).get("hash") for name in ("items", "preferences")]
    return value_hash([manifest["data"], manifest["prompts"], *hashes])


def remedy(folder: Path) -> str:
    return f"run mllm_srec.summarize --name {folder.name}"


def load_user_texts(folder: Path, encoding: Encoding, timelines: dict[str, list[int]]) -> UserTexts:
    """Load a finished summaries folder.

    Raises:
        UserError: it is unfinished or changed, or was written for other data, or for other pictures of this backbone.
    """
    again = remedy(folder)
    manifest = read_json(folder / "manifest.json", MANIFEST, again)
    if "preferences" not in manifest:
        raise UserError(f"{folder} is not finished; {again}")
    pictures = manifest.get("pictures")
    other_pictures = False
    if pictures and pictures["backbone"] == encoding.backbone:
        other_pictures = any(pictures[name] != encoding.manifest[name] for name in PICTURES)
    if manifest["data"] != data_hash(encoding.items, timelines) or other_pictures:
        raise UserError(f"{folder} was written for another state of its data; {again}")
    texts = read_texts(folder / "prompts.txt")
    if manifest["prompts"] != value_hash(texts):
        raise UserError(f"{folder}/prompts.txt is not what manifest.json lists; {again}")
    for name in ("items", "preferences"):
        if manifest[name]["hash"] != file_hash(folder / f"{name}.jsonl"):
            raise UserError(f"{folder / name}.jsonl is not what manifest.json lists; delete it and {again}")
    summaries = [None] * len(encoding.items)
    for line in read_jsonl(folder / "items.jsonl", SUMMARY, again):
        summaries[encoding.items.index_of[line["item"]]] = line["summary"]
    users: dict[str, list] = {}
    for line in read_jsonl(folder / "preferences.jsonl", PREFERENCE, again):
        users.setdefault(line["user"], []).append((line["end"], line["paragraph"], line["profile"]))
    return UserTexts(texts, encoding.items, timelines, summaries, users)
