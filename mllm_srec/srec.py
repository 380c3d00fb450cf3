"""MLLM-SRec (doi 10.1038/s41598-025-14251-1): its prompts as text, the points of time at which a user's preferences are
written, and the chain-of-thought prompts that read them. summarize.py writes the texts; sft.py --prompt cot trains on
them.

A user's timeline is all that the user chose, oldest first. A row of train.jsonl, val.jsonl or test.jsonl stands at a
point of it, its cut: the number of items before its target. Nothing behind the cut enters the row's prompt.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hanorec.model.prompts import Node, Prompts, Row
from hanorec.run import runs
from hanorec.run.runs import UserError

TEXTS = Path(__file__).with_name("mllm_srec.txt")
TEXT = (str, type(None))  # None: what was written is of no use
MANIFEST = {"data": str, "prompts": str}
ITEM = {"item": str, "summary": TEXT, "fault": TEXT}
POINT = {"user": str, "end": int, "paragraph": TEXT, "fault": TEXT, "profile": TEXT, "profile_fault": TEXT}
PICTURES = ("backbone", "items", "tokens")  # of encoded/<backbone>/manifest.json: by which summaries know the pictures
WORDS = {  # of each prompt: what may be filled in
    "item": {"title", "image"},
    "item without a picture": {"title"},
    "item by its picture alone": {"image"},
    "line": {"title", "summary"},
    "line without a summary": {"title"},
    "first preference": {"items"},
    "preference": {"items", "preference"},
    "profile": {"preference"},
    "user": {"profile", "preference", "since"},
    "candidate": {"title", "image"},
    "steps": {"profile", "preference", "since", "last", "title", "summary", "common"},
    "yes": set(),
    "no": set(),
    "nothing": set(),
}


def read_texts(path: Path) -> dict[str, str]:
    """The prompts of a file like mllm_srec.txt by name; UserError where one lacks, is unknown, or wants a word that it
    cannot have."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a file like {TEXTS.name}") from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        name = re.fullmatch(r"\[(.+)\]\s*", line)
        if line.startswith("#"):
            continue
        if name and (name[1] in found or name[1] not in WORDS):
            raise UserError(
                f"{path}, line {number}: [{name[1]}] stands there twice, or is not among {', '.join(WORDS)}"
            )
        if name:
            found[name[1]] = []
        elif found:
            found[list(found)[-1]].append(line)
        elif line.strip():
            raise UserError(f"{path}, line {number}: text before the first [name]")
    texts = {name: "\n".join(lines).strip() for name, lines in found.items()}
    for name, allowed in WORDS.items():
        if not texts.get(name):
            raise UserError(f"{path} has no [{name}]; {TEXTS.name} has it")
        unknown = set(re.findall(r"{(\w+)}", texts[name])) - allowed
        if unknown:
            words = ", ".join(sorted(allowed)) or "nothing"
            raise UserError(f"{path}, [{name}]: {{{min(unknown)}}} cannot stand there, only {words}")
    return texts


def fill(text: str, **values) -> list:
    """The parts of a prompt: its text, {words} filled in, and item rows (integers) where their images stand."""
    parts: list = [""]
    for number, piece in enumerate(re.split(r"{(\w+)}", text)):
        value = values[piece] if number % 2 else piece
        if isinstance(value, int):
            parts += [value, ""]
        else:
            parts[-1] += value
    return [part for part in parts if part != ""]


def item_prompt(texts: dict[str, str], sees: str, catalogue, row: int) -> list:
    """The prompt for an item's summary, and what it shows of the item."""
    pictured = sees != "text" and catalogue.image_length(row) > 0
    name = "item by its picture alone" if sees == "image" else "item"
    text = texts[name if pictured else "item without a picture"]
    return fill(text, title=catalogue.titles[row], image=row)


def timelines(sequences: dict[str, list[int]], rows: Iterable[Row]) -> dict[str, list[int]]:
    """Each user's items in order of time: the training sequence, then what the histories of val and test rows (`rows`,
    in that order) have beyond it. A test row's target is in none."""
    found = {user: list(items) for user, items in sequences.items()}
    for row in rows:
        line = found.setdefault(row.user, [])
        line += [item for item in row.history if item not in line]
    return found


def window_ends(cuts: Iterable[int], window: int, step: int, before: int = 0) -> list[int]:
    """Where a user's windows end, as numbers of items: the first after `window` items, each next one `step` later, up
    to the last cut. window 0: the whole history at each cut. before: begin so many items before the first cut, not
    at the beginning; what comes after that cut does not move it.

    >>> window_ends([4, 8], window=3, step=3), window_ends([4, 8], 3, 1, before=4), window_ends([4, 8], 0, 3)
    ([3, 6], [3, 4, 5, 6, 7, 8], [4, 8])
    """
    cuts = sorted(set(cuts))
    if window == 0:
        return cuts
    start = max(0, cuts[0] - before) if before else 0
    return list(range(start + window, cuts[-1] + 1, step))


class Story:
    """What summarize.py wrote in a folder: summaries of items, and each user's preferences at points of time.

    items: for each row of the catalogue its summary, None where there is no usable one. users: by user [(end, paragraph
    or None, profile or None)], ordered by end: the paragraph was made of the first `end` items of the timeline.
    """

    def __init__(self, texts: dict[str, str], catalogue, lines: dict[str, list[int]], items: list, users: dict):
        self.texts, self.catalogue, self.lines, self.items, self.users = texts, catalogue, lines, items, users
        self.place = {user: {item: i for i, item in enumerate(line)} for user, line in lines.items()}
        counts = Counter(word for row in range(len(items)) for word in self._words(row))
        self.frequent = {word for word, count in counts.items() if 2 * count > len(items)}

    def cut(self, row: Row) -> int:
        """How many items of the user's timeline a row may know: up to the last one of its history."""
        return self.place[row.user][row.history[-1]] + 1

    def line(self, row: int) -> str:
        """An item as it stands in a prompt."""
        title, summary = self.catalogue.titles[row], self.items[row]
        if summary is None:
            return "".join(fill(self.texts["line without a summary"], title=title))
        return "".join(fill(self.texts["line"], title=title, summary=summary))

    def list_of(self, rows: Iterable[int]) -> str:
        return "\n".join(self.line(row) for row in rows) or self.texts["nothing"]

    def preference_prompt(self, rows: Iterable[int], before: str | None) -> list:
        """The prompt for a paragraph about these items, from the paragraph before, if there is one."""
        if before is None:
            return fill(self.texts["first preference"], items=self.list_of(rows))
        return fill(self.texts["preference"], items=self.list_of(rows), preference=before)

    def at(self, row: Row) -> dict[str, str]:
        """profile, preference, since and last at a row's point of time: the last usable profile and paragraph made of
        nothing behind its cut, those items of its history that came after that paragraph, its last item."""
        cut, end, preference, profile = self.cut(row), 0, None, None
        for place, paragraph, line in self.users.get(row.user, []):
            if place <= cut and paragraph is not None:
                end, preference = place, paragraph
            if place <= cut and line is not None:
                profile = line
        since = self.list_of(item for item in row.history if self.place[row.user][item] >= end)
        nothing = self.texts["nothing"]
        last = self.items[row.history[-1]] or self.catalogue.titles[row.history[-1]]
        return {"profile": profile or nothing, "preference": preference or nothing, "since": since, "last": last}

    def _words(self, row: int) -> dict[str, None]:
        text = f"{self.catalogue.titles[row]} {self.items[row] or ''}"
        return dict.fromkeys(re.findall(r"\w{3,}", text.casefold()))

    def common(self, row: int, *texts: str) -> str:
        """The words of an item that these texts have too, without those that most items have."""
        told = (text for text in texts if text != self.texts["nothing"])
        known = set(re.findall(r"\w{3,}", " ".join(told).casefold()))
        words = [word for word in self._words(row) if word in known and word not in self.frequent]
        return ", ".join(words) or self.texts["nothing"]

    def steps(self, values: dict[str, str], candidate: int) -> str:
        """The steps of thought about a candidate, from what `at` gave and the candidate's own texts: whether it is the
        target does not enter."""
        title = self.catalogue.titles[candidate]
        common = self.common(candidate, values["preference"], values["since"])
        summary = self.items[candidate] or title
        return "".join(fill(self.texts["steps"], title=title, summary=summary, common=common, **values)) + "\n"


def data_hash(catalogue, lines: dict[str, list[int]]) -> str:
    """Of the items and timelines that texts are written for."""
    return runs.value_hash([catalogue.ids, catalogue.titles, list(lines.items())])


def story_hash(folder: Path) -> str:
    """Of the texts that summarize.py wrote in a folder and the prompts that go with them, not of how they were made."""
    made = runs.read_json(folder / "manifest.json", MANIFEST, f"run summarize.py --name {folder.name}")
    hashes = [made.get(name, {}).get("hash") for name in ("items", "preferences")]
    return runs.value_hash([made["data"], made["prompts"], *hashes])


def load_story(folder: Path, catalogue, lines: dict[str, list[int]], encoding: dict) -> Story:
    """The story that summarize.py finished in `folder`; lines: see `timelines`; encoding: the manifest of the encoding
    that the data are read by. UserError where it is of other data, or of other pictures than the same encoding's."""
    again = f"run summarize.py --name {folder.name}"
    made = runs.read_json(folder / "manifest.json", MANIFEST, again)
    if "preferences" not in made:
        raise UserError(f"{folder} is not finished; {again}")
    pictures = made.get("pictures")
    same = pictures and pictures["backbone"] == encoding["backbone"]
    if made["data"] != data_hash(catalogue, lines) or (same and any(pictures[n] != encoding[n] for n in PICTURES)):
        raise UserError(f"{folder} was written for another state of its data; {again}")
    texts = read_texts(folder / "prompts.txt")
    if made["prompts"] != runs.value_hash(texts):
        raise UserError(f"{folder}/prompts.txt is not what manifest.json lists; {again}")
    for name in ("items", "preferences"):
        if made[name]["hash"] != runs.file_hash(folder / f"{name}.jsonl"):
            raise UserError(f"{folder / name}.jsonl is not what manifest.json lists; delete it and {again}")
    items = [None] * len(catalogue.ids)
    for line in runs.read_jsonl(folder / "items.jsonl", ITEM, again):
        items[catalogue.row_of[line["item"]]] = line["summary"]
    users: dict[str, list] = {}
    for line in runs.read_jsonl(folder / "preferences.jsonl", POINT, again):
        users.setdefault(line["user"], []).append((line["end"], line["paragraph"], line["profile"]))
    return Story(texts, catalogue, lines, items, users)


class SRecPrompts(Prompts):
    """The chain-of-thought prompts: the user as root, then for each candidate the question, the steps, the answer.

    steps_share: the share of the rows whose steps are trained; the answers of all are. Steps have many more tokens than
    answers, and the loss is over tokens.
    """

    steps_share = 1.0

    def __init__(self, story: Story, *args):
        super().__init__(*args)
        self.story, self.texts = story, story.texts
        self.yes, self.no = story.texts["yes"], story.texts["no"]

    def yesno_questions(self, row: Row, candidates) -> list[Node]:
        values = self.story.at(row)
        tree = [self.append(Node(None, list(self.before)), fill(self.texts["user"] + "\n", **values))]
        for candidate in candidates:
            title = self.catalogue.titles[candidate]
            node = self.append(Node(0, []), fill(self.texts["candidate"], title=title, image=candidate))
            node.ids += [*self.after, *self.text(self.story.steps(values, candidate))]
            tree.append(node)
        return tree

    def sft_tree(self, row: Row, task: str) -> list[Node]:
        """As without steps, with steps to be learned too."""
        tree = super().sft_tree(row, task)
        if zlib.crc32(f"{row.user} {row.target}".encode()) >= self.steps_share * 2**32:
            return tree
        values = self.story.at(row)
        for question, candidate in ((1, row.target), (2, row.rejected)):
            count = len(self.text(self.story.steps(values, candidate)))
            length = len(tree[question].ids)
            tree[question].scored = range(length - count, length)
        return tree

    def check_fit(self, builds, rows: list[Row], max_length: int) -> None:
        """PromptError where a row's tree, with one history item, is longer than max_length tokens: as it stands, and
        with the longest item of all as its candidate."""
        longest = max(range(len(self.story.items)), key=lambda item: len(self.text(self.story.line(item))))
        for row in rows:
            short = replace(row, history=row.history[-1:])
            for build in builds:
                self.fitting(build, short, max_length)
                self.fitting(build, replace(short, rejected=longest), max_length)
