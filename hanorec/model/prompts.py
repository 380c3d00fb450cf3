"""Build prompts: their texts, and the prompt trees that the stages train on and score."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from hanorec.data.folder import Example
from hanorec.model.template import ChatTemplate, load_template
from hanorec.model.trees import Node, tree_length
from hanorec.run.files import UserError, value_hash

# The texts
RANK_QUESTION = "Which candidate comes next in the history? Answer with its title.\nCandidates:\n"
HISTORY = "History, oldest first:\n"
CANDIDATE = "\nCandidate:\n"
YESNO_QUESTION = "\nDoes the candidate come next in the history? Answer Yes or No."
YES, NO = "Yes", "No"
AFTER_HISTORY = "\n"  # before the ranking question, if the history comes first
TEXTS = (RANK_QUESTION, HISTORY, CANDIDATE, YESNO_QUESTION, YES, NO)

Build = Callable[[Example], list[Node]]  # from an example to its prompt tree


class Prompts:
    """Builds the prompt trees of examples for one backbone.

    A title stays text, even if it contains the spelling of a control token.

    Args:
        template: the backbone's ChatTemplate.
        items: the Items of a data folder, for titles.
        tokens: the ImageTokens of a data folder, for the lengths of images.
        candidate_images: show each candidate's image beside its title.
        history_first: the ranking prompt begins with the history, as the Yes/No questions do.
    """

    yes, no = YES, NO
    texts = TEXTS  # what `hash` covers, besides AFTER_HISTORY and the chat template

    def __init__(
        self, template: ChatTemplate, items, tokens, candidate_images: bool = False, history_first: bool = False
    ):
        self.template, self.tokenizer, self.items, self.tokens = template, template.tokenizer, items, tokens
        self.candidate_images, self.history_first = candidate_images, history_first
        self.text = functools.lru_cache(maxsize=200_000)(self._text)

    def hash(self) -> str:
        """Return the SHA-256 of all texts, of their order and of the backbone's chat template."""
        order = [AFTER_HISTORY] if self.history_first else []
        return value_hash([self.texts, self.tokenizer.chat_template, *order])

    def _text(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text. UserError if one of them is a control token."""
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        control = self.template.control.intersection(ids)
        if control:
            token = self.tokenizer.convert_ids_to_tokens(min(control))
            raise UserError(f"the tokenizer makes a control token, {token}, of the text {text!r}; change that text")
        return ids

    # Parts of a prompt

    def add_image(self, node: Node, item: int) -> None:
        """Append an item's image, if it has one."""
        length = self.tokens.lengths[item]
        if length:
            template = self.template
            node.ids += template.image_head + [template.image_token] * length + template.image_tail
            node.images.append(item)

    def add_item(self, node: Node, item: int, image: bool) -> range:
        """Append an item's title and, if `image`, its image. Returns the offsets of the title's tokens.

        The title comes before the image, so that a scored title is not predicted from its own image.
        """
        title = self.text(self.items.titles[item] + "\n")
        offsets = range(len(node.ids), len(node.ids) + len(title))
        node.ids += title
        if image:
            self.add_image(node, item)
        return offsets

    def add_history(self, node: Node, history: Sequence[int]) -> list[range]:
        """Append the history with its images. Returns the offsets of each title's tokens."""
        node.ids += self.text(HISTORY)
        return [self.add_item(node, item, image=True) for item in history]

    def add_parts(self, node: Node, parts: Sequence[str | int]) -> Node:
        """Append parts: texts, and item indices for images. Returns the node."""
        for part in parts:
            if isinstance(part, str):
                node.ids += self.text(part)
            else:
                self.add_image(node, part)
        return node

    def complete_prompt(self, parts: Sequence[str | int]) -> Node:
        """Return a prompt of these parts (see `add_parts`), complete up to the answer."""
        node = self.add_parts(Node(None, list(self.template.head)), parts)
        node.ids += self.template.tail
        return node

    def answer(self, text: str, parent: int) -> Node:
        """Return a scored answer: a text and the end of turn.

        Without the end of turn, "Toy Story 2" could never be more likely than its beginning "Toy Story".
        """
        ids = [*self.text(text), self.template.end_of_turn]
        return Node(parent, ids, scored=range(len(ids)))

    # Questions

    def ranking_prompt(self, history: Sequence[int], candidates: Sequence[int]) -> tuple[list[Node], list[range]]:
        """Build the ranking prompt.

        By default it is one node: the question with its candidates, then the history, so that the answer follows the
        history as the next item would. With history_first it is two nodes: the history, then the question. Packing
        shares the first with the Yes/No questions about the same history.

        Returns (nodes, the offsets of each history title's tokens in node 0). Answers continue the last node.
        """
        root = Node(None, list(self.template.head))
        if self.history_first:
            tree, title_offsets = [root, Node(0, list(self.text(AFTER_HISTORY)))], self.add_history(root, history)
            self.add_ranking_question(tree[1], candidates)
        else:
            self.add_ranking_question(root, candidates)
            tree, title_offsets = [root], self.add_history(root, history)
        tree[-1].ids += self.template.tail
        return tree, title_offsets

    def add_ranking_question(self, node: Node, candidates: Sequence[int]) -> None:
        """Append the ranking question and its candidates."""
        node.ids += self.text(RANK_QUESTION)
        for candidate in candidates:
            self.add_item(node, candidate, image=self.candidate_images)

    def yesno_questions(self, example: Example, candidates: Sequence[int]) -> list[Node]:
        """Build the history, then the Yes/No question about each candidate: nodes 1, 2, ... of the tree."""
        root = Node(None, list(self.template.head))
        self.add_history(root, example.history)
        tree = [root]
        for candidate in candidates:
            node = Node(0, list(self.text(CANDIDATE)))
            self.add_item(node, candidate, image=self.candidate_images)
            node.ids += [*self.text(YESNO_QUESTION), *self.template.tail]
            tree.append(node)
        return tree

    # Trees

    def ranking_tree(self, example: Example, items: Sequence[int]) -> list[Node]:
        """Build an example's ranking prompt with the titles of `items` as its answers."""
        prompt, _ = self.ranking_prompt(example.history, example.candidates)
        return [*prompt, *(self.answer(self.items.titles[item], len(prompt) - 1) for item in items)]

    def language_tree(self, items: Sequence[int], max_length: int, candidates: Sequence[int] = ()) -> list[Node]:
        """Build a tree for the warm-up, in which each title after the first is scored, as in language modelling.

        The oldest items are left out until the tree has at most max_length tokens.

        Args:
            items: at least two, oldest first.
            candidates: if not empty, the tree is the ranking prompt of all items but the last, whose title is the
                answer. So the model meets that prompt in the warm-up too.

        Raises:
            UserError: two items are still too long.
        """
        if len(items) < 2:
            raise ValueError("the warm-up needs at least two items: the first title is not scored")
        for first in range(len(items) - 1):
            if candidates:
                tree, title_offsets = self.ranking_prompt(items[first:-1], candidates)
                tree.append(self.answer(self.items.titles[items[-1]], len(tree) - 1))
            else:
                tree = [Node(None, list(self.template.head))]
                title_offsets = self.add_history(tree[0], items[first:])
            if tree_length(tree) <= max_length:
                tree[0].scored = [offset for offsets in title_offsets[1:] for offset in offsets]
                return tree
        titles = " and ".join(repr(self.items.titles[item]) for item in items[-2:])
        raise UserError(f"{titles}: {tree_length(tree)} tokens in the warm-up; train with a larger --max-length")

    def sft_tree(self, example: Example, task: str) -> list[Node]:
        """Build a training sample.

        Args:
            task: `rank` (the answer is the target's title) or `yesno` (Yes about the target and No about the rejected
                item, after one history, so that the answer does not depend on the history alone).
        """
        if task == "rank":
            return self.ranking_tree(example, [example.target])
        questions = self.yesno_questions(example, [example.target, example.rejected])
        return [*questions, self.answer(self.yes, 1), self.answer(self.no, 2)]

    def pair_tree(self, example: Example, kind: str, rejected: Sequence[int] = ()) -> list[Node]:
        """Build a preference pair: a question, its chosen answer and its rejected answers.

        Args:
            kind: `rank` (chosen: the target's title, rejected: those of the rejected items), `yes` (about the target:
                Yes, No) or `no` (about the example's rejected item: No, Yes).
            rejected: the rejected items of a ranking pair. Default: the example's.
        """
        if kind == "rank":
            return self.ranking_tree(example, [example.target, *(rejected or [example.rejected])])
        if kind == "yes":
            candidate, chosen, rejected = example.target, self.yes, self.no
        else:
            candidate, chosen, rejected = example.rejected, self.no, self.yes
        return [*self.yesno_questions(example, [candidate]), self.answer(chosen, 1), self.answer(rejected, 1)]

    def evaluation_tree(self, example: Example, task: str) -> list[Node]:
        """Build all answers to score, in the order of the candidates: `rank`: their titles, `yesno`: Yes and No."""
        if task == "rank":
            return self.ranking_tree(example, example.candidates)
        tree = self.yesno_questions(example, example.candidates)
        for question in range(1, len(tree)):
            tree += [self.answer(self.yes, question), self.answer(self.no, question)]
        return tree

    # Printing

    def show(self, tree: list[Node]) -> str:
        """Return the tree as text, one node after another, with >>> before the scored part of a node.

        The scored titles of a root (warm-up) are not marked.
        """
        texts = []
        for node in tree:
            marked = node.scored and node.parent is not None
            start = node.scored[0] if marked else len(node.ids)
            texts.append(self.readable(node.ids[:start]))
            if marked:
                texts[-1] += f">>> {self.readable(node.ids[start:])}"
        return "\n".join(texts)

    def readable(self, ids: list[int]) -> str:
        """Return tokens as text. Consecutive image tokens are replaced by their number."""
        texts = []
        for is_image, group in itertools.groupby(ids, lambda token: token == self.template.image_token):
            tokens = list(group)
            texts.append(f"[{len(tokens)} image tokens]" if is_image else self.tokenizer.decode(tokens))
        return "".join(texts)

    # Length

    def check_fit(self, builds: list[Build], examples: list[Example], max_length: int) -> None:
        """UserError if an example's tree, with one history item, is longer than max_length tokens.

        An example of the longest items is tried first. The examples are tried one by one only if that one is too long.
        """
        title_lengths = [len(self.text(title)) for title in self.items.titles]
        item_lengths = [length + self.tokens.lengths[item] for item, length in enumerate(title_lengths)]
        longest_title = title_lengths.index(max(title_lengths))
        longest_item = item_lengths.index(max(item_lengths))
        candidate = longest_item if self.candidate_images else longest_title
        longest = Example("", [longest_item], candidate, [candidate] * len(examples[0].candidates), candidate)
        limit = max_length - max(title_lengths)  # the answer may be a longer title than this candidate's
        if all(tree_length(build(longest)) <= limit for build in builds):
            return
        for example in examples:
            for build in builds:
                fit_to_length(build, replace(example, history=example.history[-1:]), max_length)


def plain_prompts(encoding, candidate_images: bool = False, history_first: bool = False) -> Prompts:
    """Return the Prompts of an Encoding, without chain of thought. For the other arguments see Prompts."""
    template = load_template(encoding.source, encoding.trust)
    return Prompts(template, encoding.items, encoding.tokens, candidate_images, history_first)


def fit_to_length(build: Build, example: Example, max_length: int, shortened: set | None = None) -> list[Node]:
    """Build an example's tree, without its oldest history items as far as max_length tokens require it.

    Args:
        shortened: gets the (user, target) of an example that lost history items.

    Raises:
        UserError: the tree is too long even with one history item.
    """
    for first in range(len(example.history)):
        tree = build(replace(example, history=example.history[first:]))
        length = tree_length(tree)
        if length <= max_length:
            if first and shortened is not None:
                shortened.add((example.user, example.target))
            return tree
    raise UserError(f"user {example.user}: {length} tokens with one history item; train with a larger --max-length")
