"""What mllm_srec.teach teaches: descriptions of items and, by a rule, preference paragraphs and profiles."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np

from hanorec.data.folder import DataFolder, Items
from hanorec.model.prompts import Prompts
from hanorec.model.trees import Node, common_length
from hanorec.run.files import UserError, read_jsonl
from mllm_srec.preferences import SUMMARY, UserTexts
from mllm_srec.texts import fill, item_prompt

KINDS = 3  # samples of an item: its summary, a paragraph about a window, a profile


def taught_items(count: int, share: float, seed: int) -> list[int]:
    """The items that are taught: a share of them, drawn from the seed."""
    return sorted(np.random.default_rng([seed, 11]).permutation(count)[: max(1, round(share * count))].tolist())


def read_descriptions(path: Path, items: Items) -> dict[int, dict]:
    """The lines of descriptions.jsonl by item index."""
    found = {}
    remedy = "give a file of lines with item and text by --descriptions"
    for line in read_jsonl(path, {"item": str, "text": str}, remedy):
        if line["item"] not in items.index_of or not line["text"].strip():
            raise UserError(f"{path}: item {line['item']} has no text, or is not in items.jsonl")
        found[items.index_of[line["item"]]] = line
    return found


def short_description(line: dict) -> str:
    """An item in a few words: its first two facts, or its text."""
    facts = [str(value) for value in line.get("facts", {}).values()]
    return " ".join(facts[:2]) or line["text"].rstrip(".")


def window_paragraph(window: list[dict], before: str | None) -> str:
    """The rule by which paragraphs are taught: the window's items, and the first part of the paragraph before."""
    earlier = re.match(r"Lately (.*?)(; before|\.$)", before or "")
    return f"Lately {', '.join(map(short_description, window))}" + (f"; before {earlier[1]}." if earlier else ".")


def profile_of(paragraph: str) -> str:
    """The rule by which profiles are taught: the two most frequent words of the paragraph."""
    words = re.findall(r"\w{3,}", paragraph.replace("Lately", "").replace("before", ""))
    counts = Counter(words)
    frequent = sorted(counts, key=lambda word: (-counts[word], words.index(word)))
    return f"Likes {' and '.join(frequent[:2])}."


class Lessons:
    """The samples: prompts of mllm_srec.summarize with the replies that are taught.

    Args:
        descriptions: the line of each taught item, by item index.
        window: items in a window.
    """

    def __init__(
        self,
        encoding,
        prompts: Prompts,
        texts: dict[str, str],
        descriptions: dict[int, dict],
        window: int,
        seed: int,
    ):
        self.encoding, self.prompts, self.texts, self.descriptions = encoding, prompts, texts, descriptions
        self.window, self.seed, self.items = window, seed, sorted(descriptions)
        summaries = [descriptions[i]["text"] if i in descriptions else None for i in range(len(encoding.items))]
        self.user_texts = UserTexts(texts, encoding.items, {}, summaries, {})

    def sample(self, number: int, step: int) -> tuple[int, list, str]:
        """Sample `number`: (which prompt, its parts, the reply). Windows are drawn anew in each optimizer step."""
        item, kind = self.items[number // KINDS], number % KINDS
        if kind == 0:
            parts = item_prompt(self.texts, "both", self.encoding, item)
            return 0, parts, f"Summary: {self.descriptions[item]['text']}"
        rng = np.random.default_rng([self.seed, step, number])
        *earlier, window = rng.choice(self.items, size=(3, self.window)).tolist()
        before, windows_before = None, rng.choice([0, 1, 2, 2])
        for items in earlier[:windows_before]:
            before = window_paragraph([self.descriptions[item] for item in items], before)
        paragraph = window_paragraph([self.descriptions[item] for item in window], before)
        if kind == 2:
            return 1, fill(self.texts["profile"], preference=paragraph), profile_of(paragraph)
        return 3 if before is None else 2, self.user_texts.preference_prompt(window, before), paragraph

    def trees(self, numbers: list[int], step: int) -> list[list[Node]]:
        """Prompt trees of a batch. Prompts of one kind share what they begin with."""
        trees, samples = [], sorted((self.sample(number, step) for number in numbers), key=lambda sample: sample[0])
        for _, group in itertools.groupby(samples, key=lambda sample: sample[0]):
            group = [(self.prompts.complete_prompt(parts), reply) for _, parts, reply in group]
            shared = common_length([node.ids for node, _ in group], self.prompts.template.image_token)
            for node, reply in group:
                root, rest = Node(None, node.ids[:shared]), Node(0, node.ids[shared:], node.images)
                trees.append([root, rest, self.prompts.answer(reply, 1)])
        return trees


# ---------------------------------------------------------------------------------------------------------------------
# Score


def score_summaries(
    folder: Path, descriptions: dict[int, dict], taught: set[int], data: DataFolder
) -> dict[str, float]:
    """Measure how many summaries name a fact's value and no other value of that fact, and print the shares.

    Args:
        folder: that mllm_srec.summarize wrote.
        descriptions: by item index; only items with facts count.
        taught: the items that the model was taught.

    Returns the share among the items that were not taught, by fact.
    """
    summaries = {}
    for line in read_jsonl(folder / "items.jsonl", SUMMARY, "give a folder that mllm_srec.summarize wrote"):
        summaries[data.items.index_of[line["item"]]] = (line["summary"] or "").casefold()
    names = list(dict.fromkeys(name for line in descriptions.values() for name in line.get("facts", {})))
    if not names:
        raise UserError("no description has facts; --score needs them")
    return {name: score_fact(name, summaries, descriptions, taught) for name in names}


def score_fact(name: str, summaries: dict[int, str], descriptions: dict[int, dict], taught: set[int]) -> float:
    """The share for one fact, printed beside the share of the most frequent value."""
    values = {
        item: str(line["facts"][name]).casefold()
        for item, line in descriptions.items()
        if name in line.get("facts", {})
    }
    patterns = {value: re.compile(rf"(?<!\w){re.escape(value)}(?!\w)") for value in values.values()}
    right = {}
    for item, value in values.items():
        named = {other for other, pattern in patterns.items() if pattern.search(summaries.get(item, ""))}
        right[item] = named == {value}
    parts = {"not taught": [i for i in values if i not in taught], "taught": [i for i in values if i in taught]}
    shares = {part: float(np.mean([right[i] for i in items])) for part, items in parts.items() if items}
    rest = parts["not taught"]
    most_frequent = max(Counter(values[item] for item in rest).values(), default=0) / max(len(rest), 1)
    shown = ", ".join(f"{share:.3f} of {len(parts[part])} {part}" for part, share in shares.items())
    print(f"{name}: {shown}; the most frequent value {most_frequent:.3f}")
    return shares.get("not taught", float("nan"))
