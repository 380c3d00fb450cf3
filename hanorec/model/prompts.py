"""Prompts as trees of tokens: the texts, the chat template, and the trees that the stages train on and score.

A tree is a list of nodes, parents first; node 0 is the root, the history. A question continues the root, and answers
continue a question, so that packing (see mllm.py) computes the history once for all that follows it.
"""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

# The texts, in the order they are read. They stand here and nowhere else.

RANK_QUESTION = "Which candidate comes next in the history? Answer with its title.\nCandidates:\n"
HISTORY = "History, oldest first:\n"
CANDIDATE = "\nCandidate:\n"
YESNO_QUESTION = "\nDoes the candidate come next in the history? Answer Yes or No."
YES, NO = "Yes", "No"
TEXTS = (RANK_QUESTION, HISTORY, CANDIDATE, YESNO_QUESTION, YES, NO)


class PromptError(ValueError):
    """A row or a chat template that gives no prompt; the message says what, where and what to do."""

    exit_code = 2


@dataclass
class Row:
    """A line of train.jsonl, val.jsonl or test.jsonl, its items as item rows."""

    user: str
    history: list[int]
    target: int
    candidates: list[int]
    rejected: int

    @classmethod
    def of(cls, line: dict, row_of: dict[str, int]) -> "Row":
        """A line of a split; PromptError where it names an item that items.jsonl has not."""
        user = line["user"]
        history, candidates = (item_rows(line[key], row_of, user) for key in ("history", "candidates"))
        target, rejected = item_rows([line["target"], line["rejected"]], row_of, user)
        if not history or target not in candidates or len(set(candidates)) < len(candidates):
            raise PromptError(
                f"user {user}: a row has a history, and its target once among its candidates; prepare the data again"
            )
        return cls(user, history, target, candidates, rejected)


def item_rows(items: list, row_of: dict[str, int], user: str) -> list[int]:
    """Ids as item rows; PromptError where items.jsonl has one not."""
    unknown = [item for item in items if not isinstance(item, str) or item not in row_of]
    if unknown:
        raise PromptError(f"user {user}: {unknown[0]!r} is not in items.jsonl; prepare the data again")
    return [row_of[item] for item in items]


@dataclass
class Node:
    """A stretch of tokens in a prompt tree. `parent` is the node it continues (None: the root), `scored` the offsets
    of its tokens whose log-probabilities are summed, `images` the item rows whose image tokens stand in it in order."""

    parent: int | None
    ids: list[int]
    images: list[int] = field(default_factory=list)
    scored: Sequence[int] = ()


class Prompts:
    """Token ids of the prompts for one backbone: its chat template cut around our texts, and texts that stay texts (a
    title that spells a control token does not become one).

    image_token: the id that stands for an image token. image_text: what the chat template writes for an image and what
    the model's processor puts in its place, {} for the image tokens; None where it writes the image token alone.
    """

    texts, yes, no = TEXTS, YES, NO

    def __init__(
        self,
        tokenizer,
        image_token: int,
        catalogue,
        candidate_images: bool = False,
        image_text: tuple[str, str] | None = None,
    ):
        self.tokenizer, self.image_token, self.catalogue = tokenizer, image_token, catalogue
        self.candidate_images = candidate_images
        self.shortened: set[tuple[str, int]] = set()  # user, target: rows that lost history items to max_length
        added = tokenizer.added_tokens_decoder
        self.control = {image_token, *(number for number, token in added.items() if token.special)}
        mark = "\u2042"
        question = self._template([{"type": "text", "text": mark}])
        if question.count(mark) != 1:
            raise PromptError("the chat template does not place the user's text once")
        self.before, self.after = (self._control(part) for part in question.split(mark))
        begin = tokenizer.encode("")[:1]  # a beginning-of-sequence token, where the tokenizer adds one by itself
        if begin and begin == [tokenizer.bos_token_id] != self.before[:1]:
            self.before = begin + self.before
        self.image_wrapper = self._wrapper(question.split(mark)[0], mark, image_text)
        answered = self._template([{"type": "text", "text": "?"}], answer=mark).split(mark)[1]
        end = self._control(answered)
        self.end_of_turn = end[0] if end else tokenizer.eos_token_id
        self.text = functools.lru_cache(maxsize=200_000)(self._text)

    def _template(self, content: list[dict], answer: str | None = None) -> str:
        messages = [{"role": "user", "content": content}]
        messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else []
        if not self.tokenizer.chat_template:
            raise PromptError(f"the tokenizer of '{self.tokenizer.name_or_path}' has no chat template")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        except Exception as error:  # a template is a program
            raise PromptError(f"the chat template of '{self.tokenizer.name_or_path}' fails: {error}") from error

    def _wrapper(self, before: str, mark: str, image_text: tuple[str, str] | None) -> list[int]:
        """The tokens that the chat template and the model's processor make of an image, one image token among them."""
        token = self.tokenizer.convert_ids_to_tokens(self.image_token)
        placeholder, text = image_text or (token, "{}")
        unknown = [word for word in re.findall("<[^<>]+>", text) if len(self._control(word)) != 1]
        if unknown:
            raise PromptError(f"the tokenizer of '{self.tokenizer.name_or_path}' does not know {unknown[0]}")
        mark_part, image_part = {"type": "text", "text": mark}, {"type": "image"}
        between = self._template([mark_part, image_part, mark_part]).split(mark)
        if len(between) == 3 and placeholder in between[1]:
            written = between[1]
        else:  # templates that write all images before the text
            written = self._template([image_part, mark_part]).split(mark)[0][len(before) :]
        wrapper = self._control(written.replace(placeholder, text.format(token)))
        if wrapper.count(self.image_token) != 1:
            raise PromptError(f"the chat template does not place one image token ({self.image_token}) for an image")
        return wrapper

    def _control(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _text(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        if not self.control.isdisjoint(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(self.control.intersection(ids)))
            raise PromptError(f"the tokenizer makes a control token, {token}, of the text {text!r}; change that title")
        return ids

    def item(self, node: Node, row: int, image: bool) -> range:
        """Append an item's line, and its image after it; the offsets of the line's tokens are returned. The title comes
        first, so that nothing before it gives it away."""
        start = len(node.ids)
        node.ids.extend(self.text(self.catalogue.titles[row] + "\n"))
        end = len(node.ids)
        if image and self.catalogue.image_length(row):
            self.image(node, row)
        return range(start, end)

    def image(self, node: Node, row: int) -> None:
        """Append the image of an item that has one."""
        at, length = self.image_wrapper.index(self.image_token), self.catalogue.image_length(row)
        node.ids += [*self.image_wrapper[:at], *[self.image_token] * length, *self.image_wrapper[at + 1 :]]
        node.images.append(row)

    def append(self, node: Node, parts: Sequence[str | int]) -> Node:
        """The node with texts, and images of item rows that have one, behind what it holds."""
        for part in parts:
            if isinstance(part, str):
                node.ids += self.text(part)
            elif self.catalogue.image_length(part):
                self.image(node, part)
        return node

    def whole(self, parts: Sequence[str | int]) -> Node:
        """A whole prompt of these parts, that waits for its answer."""
        node = self.append(Node(None, list(self.before)), parts)
        node.ids += self.after
        return node

    def _history(self, node: Node, rows: Sequence[int]) -> list[range]:
        node.ids += self.text(HISTORY)
        return [self.item(node, row, image=True) for row in rows]

    def _ranking(self, history: Sequence[int], candidates: Sequence[int]) -> tuple[Node, list[range]]:
        """The ranking question with its candidates, then the history: the answer stands where the next item would. Also
        the offsets of each history title."""
        root = Node(None, [*self.before, *self.text(RANK_QUESTION)])
        for candidate in candidates:
            self.item(root, candidate, image=self.candidate_images)
        spans = self._history(root, history)
        root.ids += self.after
        return root, spans

    def rank_question(self, row: Row) -> list[Node]:
        """The ranking question about a row, its history behind it."""
        return [self._ranking(row.history, row.candidates)[0]]

    def language_tree(self, rows: Sequence[int], max_length: int, candidates: Sequence[int] = ()) -> list[Node]:
        """A history in which each title after the first is predicted: plain language modelling. With candidates, the
        ranking question stands before it and the last title is its answer, so that the warm-up knows that prompt too.
        The oldest items are dropped until it is no longer than max_length tokens."""
        for first in range(len(rows) - 1):
            if candidates:
                root, spans = self._ranking(rows[first:-1], candidates)
                tree = [root, self.answer(self.catalogue.titles[rows[-1]], 0)]
            else:
                root = Node(None, list(self.before))
                tree, spans = [root], self._history(root, rows[first:])
            if tree_length(tree) <= max_length:
                break
        root.scored = [offset for span in spans[1:] for offset in span]
        return tree

    def yesno_questions(self, row: Row, candidates: Sequence[int]) -> list[Node]:
        """The history, then for each candidate the Yes/No question: nodes 1, 2, ... of the tree."""
        root = Node(None, list(self.before))
        self._history(root, row.history)
        tree = [root]
        for candidate in candidates:
            node = Node(0, list(self.text(CANDIDATE)))
            self.item(node, candidate, image=self.candidate_images)
            node.ids += [*self.text(YESNO_QUESTION), *self.after]
            tree.append(node)
        return tree

    def answer(self, text: str, parent: int) -> Node:
        """A scored answer: the text and the end of turn (without which "Toy Story" is a prefix of "Toy Story 2")."""
        ids = [*self.text(text), self.end_of_turn]
        return Node(parent, ids, scored=range(len(ids)))

    def sft_tree(self, row: Row, task: str) -> list[Node]:
        """One training sample. task: `rank`, or `yesno`: Yes about the target and No about the row's rejected item,
        both behind one history, so that the history alone tells neither."""
        if task == "rank":
            return [*self.rank_question(row), self.answer(self.catalogue.titles[row.target], 0)]
        return [
            *self.yesno_questions(row, [row.target, row.rejected]),
            self.answer(self.yes, 1),
            self.answer(self.no, 2),
        ]

    def pair_tree(self, row: Row, kind: str) -> list[Node]:
        """One preference pair: a question, the chosen and the rejected answer. kind: `rank` (the target's title over
        the rejected item's), `yes` (Yes over No about the target), `no` (No over Yes about the rejected item)."""
        if kind == "rank":
            chosen, rejected = (self.catalogue.titles[item] for item in (row.target, row.rejected))
            return [*self.rank_question(row), self.answer(chosen, 0), self.answer(rejected, 0)]
        asked, chosen, rejected = (row.target, self.yes, self.no)
        if kind == "no":
            asked, chosen, rejected = row.rejected, self.no, self.yes
        return [*self.yesno_questions(row, [asked]), self.answer(chosen, 1), self.answer(rejected, 1)]

    def evaluation_tree(self, row: Row, task: str) -> list[Node]:
        """Every answer to score, in the order of row.candidates: with `rank` each one's title, with `yesno` Yes and No
        about each."""
        if task == "rank":
            titles = [self.catalogue.titles[candidate] for candidate in row.candidates]
            return [*self.rank_question(row), *(self.answer(title, 0) for title in titles)]
        tree = self.yesno_questions(row, row.candidates)
        questions = range(1, len(tree))
        return tree + [self.answer(text, question) for question in questions for text in (self.yes, self.no)]

    def fitting(self, build: Callable[[Row], list[Node]], row: Row, max_length: int) -> list[Node]:
        """build(row), its oldest history items dropped until no path is longer than max_length tokens."""
        for first in range(len(row.history)):
            tree = build(replace(row, history=row.history[first:]))
            if tree_length(tree) <= max_length:
                if first:
                    self.shortened.add((row.user, row.target))
                return tree
        raise PromptError(f"user {row.user}: {tree_length(tree)} tokens with one history item; raise --max-length")

    def check_fit(self, builds: list[Callable[[Row], list[Node]]], rows: list[Row], max_length: int) -> None:
        """PromptError where one of the trees, with one history item, is longer than max_length tokens. The rows are
        looked at one by one only where a row made of the longest items would be."""
        every = range(len(self.catalogue.titles))
        title = max(every, key=lambda item: len(self.text(self.catalogue.titles[item])))
        item = max(every, key=lambda i: len(self.text(self.catalogue.titles[i])) + self.catalogue.image_length(i))
        candidate = item if self.candidate_images else title
        worst = Row("", [item], candidate, [candidate] * len(rows[0].candidates), candidate)
        slack = len(self.text(self.catalogue.titles[title]))
        if any(tree_length(build(worst)) + slack > max_length for build in builds):
            for row in rows:
                for build in builds:
                    self.fitting(build, replace(row, history=row.history[-1:]), max_length)

    def show(self, tree: list[Node]) -> str:
        """The tree as a person reads it, image tokens folded to their count, >>> before what is scored."""
        parts = []
        for node in tree:
            start = node.scored[0] if node.scored and node.parent is not None else len(node.ids)
            before, scored = self.readable(node.ids[:start]), self.readable(node.ids[start:])
            parts.append(before + (f">>> {scored}" if scored else ""))
        return "\n".join(parts)

    def readable(self, ids: list[int]) -> str:
        """The text of tokens, image tokens folded to their count."""
        groups = ((image, list(run)) for image, run in itertools.groupby(ids, lambda token: token == self.image_token))
        return "".join(f"[{len(run)} image tokens]" if image else self.tokenizer.decode(run) for image, run in groups)


def tree_length(tree: list[Node]) -> int:
    """Tokens of the longest path from the root to a leaf: what the model sees at most at once."""
    ends: list[int] = []
    for node in tree:
        ends.append((ends[node.parent] if node.parent is not None else 0) + len(node.ids))
    return max(ends)


def common_length(prompts: Sequence[list[int]], image_token: int) -> int:
    """How many tokens these prompts all begin with, none of them an image's; each has at least one more."""
    first, count = prompts[0], min(map(len, prompts)) - 1
    differing = (i for i in range(count) if first[i] == image_token or any(ids[i] != first[i] for ids in prompts))
    return next(differing, count)
