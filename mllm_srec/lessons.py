"""The samples of mllm_srec.teach: descriptions of items, and preference paragraphs and profiles made by a rule."""

import itertools
import operator
import re
from collections import Counter
from pathlib import Path

import numpy as np

from hanorec.data.folder import DataFolder, Items
from hanorec.model.prompts import Prompts
from hanorec.model.trees import Node
from hanorec.run.files import UserError, read_jsonl
from mllm_srec.preferences import SUMMARY, UserTexts
from mllm_srec.texts import fill, item_prompt

KINDS = 3  # the samples of an item: 0 its summary, 1 a preference paragraph about random items, 2 a profile


def taught_items(count: int, share: float, seed: int) -> list[int]:
    """Draw the item indices that are taught: a share of the `count` items, decided by the seed."""
    shuffled = np.random.default_rng([seed, 11]).permutation(count)
    return sorted(shuffled[: max(1, round(share * count))].tolist())


def read_descriptions(path: Path, items: Items) -> dict[int, dict]:
    """Read descriptions.jsonl. Return its lines by item index."""
    descriptions = {}
    remedy = "give a file of lines with item and text by --descriptions"
    for line in read_jsonl(path, {"item": str, "text": str}, remedy):
        if line["item"] not in items.index_of or not line["text"].strip():
            raise UserError(f"{path}: item {line['item']} has an empty text, or is not in items.jsonl")
        descriptions[items.index_of[line["item"]]] = line
    return descriptions


def window_paragraph(window: list[dict], previous: str | None) -> str:
    """Return the preference paragraph of a window: "Lately <its items>; before <items of the previous paragraph>."

    An item is described by its first two facts, or by its text if it has no facts.

    Args:
        window: the descriptions of the window's items.
        previous: the paragraph of the previous window; None for the first window.
    """
    descriptions = []
    for line in window:
        facts = [str(value) for value in line.get("facts", {}).values()]
        descriptions.append(" ".join(facts[:2]) or line["text"].rstrip("."))
    paragraph = f"Lately {', '.join(descriptions)}"
    previous_items = re.match(r"Lately (.*?)(; before|\.$)", previous or "")
    if previous_items:
        paragraph += f"; before {previous_items[1]}"
    return paragraph + "."


def profile_of(paragraph: str) -> str:
    """Return the profile that belongs to a paragraph: "Likes" and its two most frequent words."""
    words = re.findall(r"\w{3,}", paragraph.replace("Lately", "").replace("before", ""))
    counts = Counter(words)
    frequent = sorted(counts, key=lambda word: (-counts[word], words.index(word)))
    return f"Likes {' and '.join(frequent[:2])}."


class Lessons:
    """Builds the samples: a prompt of mllm_srec.summarize and the reply to learn.

    Args:
        texts: the texts of the prompts, by name.
        descriptions: the line of descriptions.jsonl of each taught item, by item index.
        window: items in a window.
    """

    def __init__(
        self, encoding, prompts: Prompts, texts: dict[str, str], descriptions: dict[int, dict], window: int, seed: int
    ):
        self.encoding, self.prompts, self.texts, self.descriptions = encoding, prompts, texts, descriptions
        self.items = sorted(descriptions)
        self.window, self.seed = window, seed
        summaries = [descriptions[i]["text"] if i in descriptions else None for i in range(len(encoding.items))]
        self.user_texts = UserTexts(texts, encoding.items, {}, summaries, {})

    def sample(self, number: int, step: int) -> tuple[int, list, str]:
        """Return sample `number`: (number of its prompt's text, parts of the prompt, reply).

        The numbers of the texts are 0 item, 1 profile, 2 preference and 3 first preference. Each optimizer step draws
        new windows. A paragraph has 0, 1 or (half of the time) 2 windows before its own.
        """
        item, kind = self.items[number // KINDS], number % KINDS
        if kind == 0:
            parts = item_prompt(self.texts, "both", self.encoding, item)
            return 0, parts, f"Summary: {self.descriptions[item]['text']}"
        rng = np.random.default_rng([self.seed, step, number])
        *earlier, window = rng.choice(self.items, size=(3, self.window)).tolist()
        previous = None
        for items in earlier[: rng.choice([0, 1, 2, 2])]:
            previous = window_paragraph([self.descriptions[item] for item in items], previous)
        paragraph = window_paragraph([self.descriptions[item] for item in window], previous)
        if kind == 2:
            return 1, fill(self.texts["profile"], preference=paragraph), profile_of(paragraph)
        prompt = 3 if previous is None else 2
        return prompt, self.user_texts.preference_prompt(window, previous), paragraph

    def trees(self, numbers: list[int], step: int) -> list[list[Node]]:
        """Return the prompt trees of a batch. Prompts from the same text share their first tokens as a root.

        The root ends before the first image. It does not have the last token of any prompt, so that no node is empty.
        """
        samples = sorted((self.sample(number, step) for number in numbers), key=operator.itemgetter(0))
        image_token, trees = self.prompts.template.image_token, []
        for _, group in itertools.groupby(samples, key=operator.itemgetter(0)):
            prompts = [(self.prompts.complete_prompt(parts), reply) for _, parts, reply in group]
            shared = 0  # the number of tokens in the root
            for tokens in zip(*[node.ids[:-1] for node, _ in prompts], strict=False):
                if tokens[0] == image_token or len(set(tokens)) > 1:
                    break
                shared += 1
            for node, reply in prompts:
                root = Node(None, node.ids[:shared])
                rest = Node(0, node.ids[shared:], node.images)
                trees.append([root, rest, self.prompts.answer(reply, 1)])
        return trees


# ---------------------------------------------------------------------------------------------------------------------
# Score


def score_summaries(
    folder: Path, descriptions: dict[int, dict], taught: set[int], data: DataFolder
) -> dict[str, float]:
    """Print, for each fact, the share of summaries that name its right value and none of its other values.

    Args:
        folder: a summaries folder of mllm_srec.summarize.
        descriptions: lines of descriptions.jsonl by item index. Only items with facts count.
        taught: the item indices that the model was taught.

    Returns the share of the items that were not taught, by name of the fact.
    """
    summaries = {}
    for line in read_jsonl(folder / "items.jsonl", SUMMARY, "give a folder that mllm_srec.summarize wrote"):
        summaries[data.items.index_of[line["item"]]] = (line["summary"] or "").casefold()
    facts = [line.get("facts", {}) for line in descriptions.values()]
    names = dict.fromkeys(itertools.chain(*facts))  # each name once, in order
    if not names:
        raise UserError("no description has facts; --score needs them")
    return {name: score_fact(name, summaries, descriptions, taught) for name in names}


def score_fact(name: str, summaries: dict[int, str], descriptions: dict[int, dict], taught: set[int]) -> float:
    """Print and return the share for one fact. Also prints the share of always naming the most frequent value."""
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
    not_taught = [item for item in values if item not in taught]
    parts = {"not taught": not_taught, "taught": [item for item in values if item in taught]}
    shares = {part: float(np.mean([right[item] for item in items])) for part, items in parts.items() if items}
    counts = Counter(values[item] for item in not_taught)
    most_frequent = max(counts.values(), default=0) / max(len(not_taught), 1)
    shown = ", ".join(f"{share:.3f} of {len(parts[part])} {part}" for part, share in shares.items())
    print(f"{name}: {shown}; the most frequent value {most_frequent:.3f}")
    return shares.get("not taught", float("nan"))
