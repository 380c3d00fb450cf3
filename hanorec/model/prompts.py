"""The prompts: their texts, and the prompt trees that the stages train on and score."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from hanorec.data.folder import Example
from hanorec.model.template import ChatTemplate
from hanorec.model.trees import Node, tree_length
from hanorec.run.files import UserError

# The texts, in the order in which a prompt has them. They stand here and nowhere else.
RANK_QUESTION = "Which candidate comes next in the history? Answer with its title.\nCandidates:\n"
HISTORY = "History, oldest first:\n"
CANDIDATE = "\nCandidate:\n"
YESNO_QUESTION = "\nDoes the candidate come next in the history? Answer Yes or No."
YES, NO = "Yes", "No"
TEXTS = (RANK_QUESTION, HISTORY, CANDIDATE, YESNO_QUESTION, YES, NO)

Build = Callable[[Example], list[Node]]  # from an example to its prompt tree


class Prompts:
    """Builds the prompt trees of examples for one backbone.

    Text stays text: a title that spells a control token does not become one.

    Args:
        items, tokens: the Items and ImageTokens of a data folder, for titles and the lengths of images.
        candidate_images: candidates carry their images, not only titles.
    """

    yes, no = YES, NO
    texts = TEXTS  # everything that the prompts are written with, for hashes

    def __init__(self, template: ChatTemplate, items, tokens, candidate_images: bool = False):
        self.template, self.tokenizer = template, template.tokenizer
        self.items, self.tokens, self.candidate_images = items, tokens, candidate_images
        self.text = functools.lru_cache(maxsize=200_000)(self._text)

    def _text(self, text: str) -> tuple[int, ...]:
        """Tokens of a text. UserError if the tokenizer makes a control token of it."""
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        control = self.template.control.intersection(ids)
        if control:
            token = self.tokenizer.convert_ids_to_tokens(min(control))
            raise UserError(f"the tokenizer makes a control token, {token}, of the text {text!r}; change that title")
        return ids

    # Parts of a prompt

    def add_image(self, node: Node, item: int) -> None:
        """Append an item's image, if it has one."""
        length = self.tokens.length(item)
        if length:
            template = self.template
            node.ids += [*template.image_head, *[template.image_token] * length, *template.image_tail]
            node.images.append(item)

    def add_item(self, node: Node, item: int, image: bool) -> range:
        """Append an item's title and, with `image`, its image. Return the offsets of the title's tokens.

        The title comes first, so that nothing before it gives it away.
        """
        start = len(node.ids)
        node.ids += self.text(self.items.titles[item] + "\n")
        end = len(node.ids)
        if image:
            self.add_image(node, item)
        return range(start, end)

    def add_history(self, node: Node, history: Sequence[int]) -> list[range]:
        """Append the history with its images. Return the offsets of each title's tokens."""
        node.ids += self.text(HISTORY)
        return [self.add_item(node, item, image=True) for item in history]

    def add_parts(self, node: Node, parts: Sequence[str | int]) -> Node:
        """Append texts, and the images of item indices. Return the node."""
        for part in parts:
            if isinstance(part, str):
                node.ids += self.text(part)
            else:
                self.add_image(node, part)
        return node

    def root(self) -> Node:
        """A node that begins a prompt."""
        return Node(None, list(self.template.head))

    def complete_prompt(self, parts: Sequence[str | int]) -> Node:
        """A prompt of these parts (texts and item indices), up to where its answer begins."""
        node = self.add_parts(self.root(), parts)
        node.ids += self.template.tail
        return node

    def answer(self, text: str, parent: int) -> Node:
        """A scored answer: the text and the end of turn (without it, "Toy Story" is a prefix of "Toy Story 2")."""
        ids = [*self.text(text), self.template.end_of_turn]
        return Node(parent, ids, scored=range(len(ids)))

    # Questions

    def ranking_prompt(self, history: Sequence[int], candidates: Sequence[int]) -> tuple[Node, list[range]]:
        """The candidates, then the history, so that the answer stands where the next item would.

        Returns (node, the offsets of each history title's tokens).
        """
        root = self.root()
        root.ids += self.text(RANK_QUESTION)
        for candidate in candidates:
            self.add_item(root, candidate, image=self.candidate_images)
        spans = self.add_history(root, history)
        root.ids += self.template.tail
        return root, spans

    def yesno_questions(self, example: Example, candidates: Sequence[int]) -> list[Node]:
        """The history, then the Yes/No question about each candidate: nodes 1, 2, ... of the tree."""
        root = self.root()
        self.add_history(root, example.history)
        tree = [root]
        for candidate in candidates:
            node = Node(0, list(self.text(CANDIDATE)))
            self.add_item(node, candidate, image=self.candidate_images)
            node.ids += [*self.text(YESNO_QUESTION), *self.template.tail]
            tree.append(node)
        return tree

    # Trees

    def language_tree(self, items: Sequence[int], max_length: int, candidates: Sequence[int] = ()) -> list[Node]:
        """A history in which each title after the first is predicted: plain language modelling, for the warm-up.

        The oldest items are dropped until the tree has at most max_length tokens.

        Args:
            candidates: with them, the ranking question stands before the history and its last title is the answer, so
                that the model meets that prompt too.
        """
        for first in range(len(items) - 1):
            if candidates:
                root, spans = self.ranking_prompt(items[first:-1], candidates)
                tree = [root, self.answer(self.items.titles[items[-1]], 0)]
            else:
                root = self.root()
                tree, spans = [root], self.add_history(root, items[first:])
            if tree_length(tree) <= max_length:
                break
        root.scored = [offset for span in spans[1:] for offset in span]
        return tree

    def sft_tree(self, example: Example, task: str) -> list[Node]:
        """A training sample. task: `rank`, or `yesno`: Yes about the target and No about the rejected item, both behind
        one history, so that the history alone tells neither."""
        if task == "rank":
            root, _ = self.ranking_prompt(example.history, example.candidates)
            return [root, self.answer(self.items.titles[example.target], 0)]
        questions = self.yesno_questions(example, [example.target, example.rejected])
        return [*questions, self.answer(self.yes, 1), self.answer(self.no, 2)]

    def pair_tree(self, example: Example, kind: str) -> list[Node]:
        """A preference pair: a question, its chosen answer and its rejected answer.

        Args:
            kind: `rank` (the target's title over the rejected item's), `yes` (Yes over No about the target) or `no` (No
                over Yes about the rejected item).
        """
        if kind == "rank":
            root, _ = self.ranking_prompt(example.history, example.candidates)
            return [root, *(self.answer(self.items.titles[item], 0) for item in (example.target, example.rejected))]
        if kind == "yes":
            candidate, chosen, rejected = example.target, self.yes, self.no
        else:
            candidate, chosen, rejected = example.rejected, self.no, self.yes
        return [*self.yesno_questions(example, [candidate]), self.answer(chosen, 1), self.answer(rejected, 1)]

    def evaluation_tree(self, example: Example, task: str) -> list[Node]:
        """Every answer to score, in the order of the candidates: with `rank` their titles, with `yesno` Yes and No."""
        if task == "rank":
            root, _ = self.ranking_prompt(example.history, example.candidates)
            return [root, *(self.answer(self.items.titles[candidate], 0) for candidate in example.candidates)]
        tree = self.yesno_questions(example, example.candidates)
        for question in range(1, len(tree)):
            tree += [self.answer(self.yes, question), self.answer(self.no, question)]
        return tree

    # For people

    def show(self, tree: list[Node]) -> str:
        """The tree as text: image tokens folded to their count, >>> before what is scored."""
        parts = []
        for node in tree:
            start = node.scored[0] if node.scored and node.parent is not None else len(node.ids)
            before, scored = self.readable(node.ids[:start]), self.readable(node.ids[start:])
            parts.append(before + (f">>> {scored}" if scored else ""))
        return "\n".join(parts)

    def readable(self, ids: list[int]) -> str:
        """The text of tokens, image tokens folded to their count."""
        parts = []
        for is_image, run in itertools.groupby(ids, lambda token: token == self.template.image_token):
            run = list(run)
            parts.append(f"[{len(run)} image tokens]" if is_image else self.tokenizer.decode(run))
        return "".join(parts)

    # Length

    def check_fit(self, builds: list[Build], examples: list[Example], max_length: int) -> None:
        """UserError if an example's tree, with one history item, is longer than max_length tokens.

        The examples are tried one by one only if an example made of the longest items would be too long.
        """
        titles = [len(self.text(title)) for title in self.items.titles]
        title = max(range(len(titles)), key=lambda item: titles[item])
        item = max(range(len(titles)), key=lambda item: titles[item] + self.tokens.length(item))
        candidate = item if self.candidate_images else title
        worst = Example("", [item], candidate, [candidate] * len(examples[0].candidates), candidate)
        if any(tree_length(build(worst)) + titles[title] > max_length for build in builds):
            for example in examples:
                for build in builds:
                    fit_to_length(build, replace(example, history=example.history[-1:]), max_length)


def fit_to_length(build: Build, example: Example, max_length: int, shortened: set | None = None) -> list[Node]:
    """build(example), without as many of the oldest history items as it takes to stay within max_length tokens.

    Args:
        shortened: gets the (user, target) of an example that lost history items.
    """
    for first in range(len(example.history)):
        tree = build(replace(example, history=example.history[first:]))
        length = tree_length(tree)
        if length <= max_length:
            if first and shortened is not None:
                shortened.add((example.user, example.target))
            return tree
    raise UserError(f"user {example.user}: {length} tokens with one history item; raise --max-length")
