"""Load the texts of MLLM-SRec about items and users, and choose those that an example's prompt may use.

A user's timeline is a list of the items that the user chose, oldest first. An example's cut is the number of timeline
items up to the end of its history. The target comes after the cut: it is the next item or, with prepare_data.py
--protocol official, the third one. An example's prompt uses only paragraphs and profiles that were written from items
before its cut.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hanorec.data.folder import DataFolder, Example, Items
from hanorec.model.encoding import Encoding
from hanorec.run.files import UserError, file_hash, read_json, read_jsonl, value_hash
from mllm_srec.texts import fill, read_texts

# The fields of the files in data/<data>/summaries/<name>/, and their types. An unusable text is None.
TEXT = (str, type(None))
MANIFEST = {"data": str, "prompts": str}
SUMMARY = {"item": str, "summary": TEXT, "fault": TEXT}
PREFERENCE = {"user": str, "end": int, "paragraph": TEXT, "fault": TEXT, "profile": TEXT, "profile_fault": TEXT}


def timelines(data: DataFolder) -> dict[str, list[int]]:
    """Return the timeline of each user, as item indices.

    It is the user's training sequence, then the items that the histories of validation and test examples add. With
    leave-one-out, it ends where the test example's history ends. With --split user, a training user's timeline ends
    with the last training target, and another user's timeline is the history of the user's only example.

    Raises:
        UserError: the data folder has items twice in a history. A cut would not be known.
    """
    if data.manifest["options"].get("repeats") == "all":
        remedy = "prepare the data with --repeats first or last"
        raise UserError(f"{data.folder} has items twice in a history, and MLLM-SRec takes each once; {remedy}")
    timelines = {user: list(items) for user, items in data.sequences().items()}
    for example in [*data.examples("val"), *data.examples("test")]:
        timeline = timelines.setdefault(example.user, [])
        for item in example.history:
            if item not in timeline:
                timeline.append(item)
    return timelines


def window_ends(cuts: Iterable[int], window: int, step: int, before: int = 0) -> list[int]:
    """Return where a user's windows end, as numbers of timeline items.

    The first window ends after `window` items. The next ones end every `step` items, at the last cut at the latest.

    Args:
        cuts: of the user's examples.
        window: items in a window. 0: a window is everything before a cut, one for each cut.
        before: 0: the first window begins where the timeline begins. Otherwise it begins so many items before the first
            cut, and items that are added to the timeline later do not move it.

    >>> window_ends([4, 8], window=3, step=3), window_ends([4, 8], 3, 1, before=4), window_ends([4, 8], 0, 3)
    ([3, 6], [3, 4, 5, 6, 7, 8], [4, 8])
    """
    cuts = sorted(set(cuts))
    if window == 0:
        return cuts
    start = max(0, cuts[0] - before) if before else 0
    return list(range(start + window, cuts[-1] + 1, step))


@functools.lru_cache(maxsize=10_000)
def words_of(text: str) -> dict[str, None]:
    """Return the distinct words of a text, in order, as the keys of a dict."""
    return dict.fromkeys(re.findall(r"\w{3,}", text.casefold()))


class UserTexts:
    """The texts about items and users, and the parts of prompts that are made from them.

    Args:
        texts: the prompts by name.
        timelines: by user, as the function `timelines` returns them.
        summaries: [N], by item index; None where there is no usable summary.
        users: by user [(end, paragraph or None, profile or None)], ordered by end. The texts were written from the
            first `end` items of the timeline.
    """

    def __init__(self, texts: dict[str, str], items: Items, timelines: dict, summaries: list, users: dict):
        self.texts, self.items, self.timelines, self.summaries, self.users = texts, items, timelines, summaries, users
        self.position = {u: {item: i for i, item in enumerate(timeline)} for u, timeline in timelines.items()}
        counts = Counter(word for item in range(len(summaries)) for word in self.item_words(item))
        self.frequent = {word for word, count in counts.items() if 2 * count > len(summaries)}

    def cut(self, example: Example) -> int:
        """Return the number of timeline items up to the end of the example's history."""
        return self.position[example.user][example.history[-1]] + 1

    def item_lines(self, items: Iterable[int]) -> str:
        """Return a line about each item for a prompt: its title and, if it is usable, its summary."""
        lines = []
        for item in items:
            title, summary = self.items.titles[item], self.summaries[item]
            if summary is None:
                parts = fill(self.texts["line without a summary"], title=title)
            else:
                parts = fill(self.texts["line"], title=title, summary=summary)
            lines.append("".join(parts))
        return "\n".join(lines) or self.texts["nothing"]

    def preference_prompt(self, items: Iterable[int], previous: str | None) -> list[str | int]:
        """Return the parts of the prompt for a preference paragraph.

        Args:
            items: the items of the window.
            previous: the user's paragraph of an earlier window; None if there is none.
        """
        if previous is None:
            return fill(self.texts["first preference"], items=self.item_lines(items))
        return fill(self.texts["preference"], items=self.item_lines(items), preference=previous)

    def prompt_values(self, example: Example) -> dict[str, str]:
        """Return what the prompt says about an example's user, by placeholder.

        Returns:
            preference, profile: the last usable ones that were written from items before the cut.
            since: the lines of the history items after that paragraph's window.
            last: the summary, or else the title, of the last history item.
        """
        cut, paragraph_end = self.cut(example), 0
        values = {"profile": self.texts["nothing"], "preference": self.texts["nothing"]}
        for end, paragraph, profile in self.users.get(example.user, []):
            if end > cut:
                break
            if paragraph is not None:
                paragraph_end, values["preference"] = end, paragraph
            if profile is not None:
                values["profile"] = profile
        position, last = self.position[example.user], example.history[-1]
        values["since"] = self.item_lines(item for item in example.history if position[item] >= paragraph_end)
        values["last"] = self.summaries[last] or self.items.titles[last]
        return values

    def about(self, example: Example) -> dict[str, str]:
        """Return the texts to show beside an example, by name. A text that is not usable is left out."""
        values = self.prompt_values(example)
        texts = {"profile": values["profile"], "preferences": values["preference"]}
        texts = {name: text for name, text in texts.items() if text != self.texts["nothing"]}
        for name, item in (("last item", example.history[-1]), ("target", example.target)):
            if self.summaries[item] is not None:
                texts[f"summary of the {name}"] = self.summaries[item]
        return texts

    def item_words(self, item: int) -> list[str]:
        """Return the distinct words of an item's title and summary, in order."""
        return list(words_of(f"{self.items.titles[item]} {self.summaries[item] or ''}"))

    def shared_words(self, item: int, *texts: str) -> str:
        """Return the words of an item that also are in one of the texts. Words of more than half of all items do not
        count."""
        written = " ".join(text for text in texts if text != self.texts["nothing"])
        text_words = words_of(written)
        words = [word for word in self.item_words(item) if word in text_words and word not in self.frequent]
        return ", ".join(words) or self.texts["nothing"]

    def steps(self, values: dict[str, str], candidate: int) -> str:
        """Return the steps of thought about a candidate. They do not depend on the label.

        Args:
            values: what `prompt_values` returns for the example.
        """
        title = self.items.titles[candidate]
        summary = self.summaries[candidate] or title
        shared = self.shared_words(candidate, values["preference"], values["since"])
        return "".join(fill(self.texts["steps"], title=title, summary=summary, common=shared, **values)) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The summaries folder


def summaries_folder(data: DataFolder, encoding: Encoding, name: str | None) -> Path:
    """Return the path of a summaries folder. Without a name, it has the encoding's name."""
    if encoding.tokens.blank_images:
        raise UserError("summaries describe the pictures, also with --blank-images; give one of the two, not both")
    return data.folder / "summaries" / (name or encoding.folder.name)


def sources(encoding: Encoding, timelines: dict[str, list[int]]) -> tuple[str, dict]:
    """Identify what texts are written about.

    Returns (the SHA-256 of the items and timelines, the entries of the encoding's manifest that identify its pictures).
    Without stored image tokens, a changed picture is not noticed.
    """
    data = value_hash([encoding.items.ids, encoding.items.titles, list(timelines.items())])
    return data, {name: encoding.manifest[name] for name in ("backbone", "items", "tokens")}


def summarize_command(folder: Path) -> str:
    """Return the advice at the end of an error message: the command that writes this summaries folder."""
    return f"run python -m mllm_srec.summarize --data {folder.parent.parent} --name {folder.name}"


def load_user_texts(folder: Path, encoding: Encoding, timelines: dict[str, list[int]]) -> UserTexts:
    """Load a finished summaries folder.

    Raises:
        UserError: it is unfinished or changed, or was written for other data, or for other pictures of this backbone.
    """
    remedy = summarize_command(folder)
    manifest = read_json(folder / "manifest.json", MANIFEST, remedy)
    if "preferences" not in manifest:
        raise UserError(f"{folder} is not finished; {remedy}")
    data, current = sources(encoding, timelines)
    pictures = manifest.get("pictures")  # None: written without pictures
    other_pictures = pictures and pictures["backbone"] == current["backbone"] and pictures != current
    if other_pictures or manifest["data"] != data:
        raise UserError(f"{folder} was written for other items, timelines or pictures; {remedy}")
    texts = read_texts(folder / "prompts.txt")
    if manifest["prompts"] != value_hash(texts):
        raise UserError(f"{folder}/prompts.txt is not what manifest.json lists; {remedy}")
    for name in ("items", "preferences"):
        path = folder / f"{name}.jsonl"
        if not path.exists() or manifest[name]["hash"] != file_hash(path):
            raise UserError(f"{path} is missing, or not what manifest.json lists; {remedy}")
    summaries = [None] * len(encoding.items)
    for line in read_jsonl(folder / "items.jsonl", SUMMARY, remedy):
        summaries[encoding.items.index_of[line["item"]]] = line["summary"]
    users: dict[str, list] = {}
    for line in read_jsonl(folder / "preferences.jsonl", PREFERENCE, remedy):
        users.setdefault(line["user"], []).append((line["end"], line["paragraph"], line["profile"]))
    return UserTexts(texts, encoding.items, timelines, summaries, users)
