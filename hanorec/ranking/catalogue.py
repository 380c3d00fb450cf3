"""Rank any number of candidates for one history, in as many prompts as --max-length requires.

The scores of one prompt's candidates can be compared. Those of several prompts can be compared only if a score does not
depend on the other candidates:
- Yes/No: each candidate has a question of its own after the same history, and its score is log p(Yes) - log p(No).
- Ranking: the log-likelihood of a title depends on the list of candidates in the prompt. So candidates that do not fit
  in one prompt are ranked in rounds. In each round the better half of each list stays. The last round has one list, and
  only its scores are returned.
"""

from collections.abc import Sequence

import numpy as np
import torch

from hanorec.data.folder import Example
from hanorec.model.prompts import Prompts
from hanorec.model.trees import Node, tree_length
from hanorec.run.files import UserError, print_main

WISHED = 10  # candidates that a list has room for, before the history is shortened
QUESTIONS = 50  # Yes/No questions in a forward

Ranking = list[tuple[int, float | None]]  # (item index, score), best first


class CatalogueRanker:
    """Ranks candidates with the model of a run. To stay within max_length it cuts the history and divides the list.

    Args:
        model: a PackedMLLM. prompts: the Prompts of its run. tokens: the ImageTokens of the data folder.
        tasks: of the run. Ranking is used if the run was trained on it, else Yes/No.
        max_length: of the run, in tokens.
        accelerator: moves the batches to its device, and chooses the precision.

    Attributes:
        shortened: number of histories that were cut, so that max_length has room for WISHED candidates.
        too_long: number of prompts that are longer than max_length even with one item of history and the fewest
            candidates. They are scored all the same.
    """

    def __init__(self, model, prompts: Prompts, tokens, tasks: Sequence[str], max_length: int, accelerator):
        self.model, self.prompts, self.tokens = model.eval(), prompts, tokens
        self.max_length, self.accelerator, self.by_title = max_length, accelerator, "rank" in tasks
        self.unit = "log-likelihood of the title" if self.by_title else "log p(Yes) - log p(No)"
        self.shortened = self.too_long = 0

    def rank(self, history: list[int], candidates: list[int]) -> Ranking:
        """Return all candidates, best first, with their scores. The score of one that left in an early round is None.

        Args:
            history: item indices, oldest first, at least one.
            candidates: item indices. Candidates near each other in this order come into different lists.
        """
        if not candidates:
            return []
        return self.in_rounds(history, candidates) if self.by_title else self.by_questions(history, candidates)

    def logps(self, tree: list[Node]) -> np.ndarray:
        """Return the log-probability of each answer of a tree."""
        self.too_long += tree_length(tree) > self.max_length
        batch = self.model.collate([tree], self.tokens)
        with torch.no_grad(), self.accelerator.autocast():
            logps = self.model(batch.to(self.accelerator.device)).float().cpu().numpy()
        if not np.isfinite(logps).all():
            raise UserError("some of the model's scores are NaN or infinite: its weights diverged; train it again")
        return logps

    def fitting(self, history: list[int], length_of) -> list[int]:
        """Return the history without its oldest items, as far as max_length requires it.

        Args:
            length_of: from a history to the number of tokens that its prompt needs.
        """
        first = 0
        while first < len(history) - 1 and length_of(history[first:]) > self.max_length:
            first += 1
        self.shortened += first > 0
        return history[first:]

    def report(self, run) -> None:
        """Say how many histories and prompts did not fit into the --max-length of the run."""
        if self.shortened:
            print_main(f"{self.shortened} histories were cut to the --max-length {self.max_length} of {run}")
        if self.too_long:
            print_main(
                f"{self.too_long} prompts are longer than the --max-length {self.max_length} of {run}; they are scored"
            )

    # Yes/No

    def by_questions(self, history: list[int], candidates: list[int]) -> Ranking:
        """Rank by Yes/No questions after one history, which has the same length in each forward."""

        def tree_of(history: list[int], some: list[int]) -> list[Node]:
            return self.prompts.evaluation_tree(Example("", history, some[0], some, some[0]), "yesno")

        history = self.fitting(history, lambda history: tree_length(tree_of(history, candidates)))
        scores = []
        for first in range(0, len(candidates), QUESTIONS):
            yes, no = self.logps(tree_of(history, candidates[first : first + QUESTIONS])).reshape(-1, 2).T
            scores += (yes - no).tolist()
        return sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])

    # Ranking

    def in_rounds(self, history: list[int], candidates: list[int]) -> Ranking:
        """Rank by the log-likelihoods of titles, in rounds if the candidates do not fit in one prompt."""
        empty = self.prompt_length(history[-1:], [])
        cost = {item: self.prompt_length(history[-1:], [item]) - empty for item in candidates}  # tokens of a line
        answer = max(len(self.prompts.answer(self.prompts.items.titles[item], 0).ids) for item in candidates)
        longest = sum(sorted(cost.values())[-WISHED:]) + answer
        history = self.fitting(history, lambda history: self.prompt_length(history, []) + longest)
        room = self.max_length - self.prompt_length(history, []) - answer
        left: Ranking = []
        while True:
            lists = divided(candidates, cost, room)
            ranked = [self.rank_list(history, some) for some in lists]
            if len(lists) == 1:
                return ranked[0] + left
            # By place, because the scores of two lists cannot be compared
            by_place = sorted((place, number) for number, some in enumerate(lists) for place in range(len(some)))
            stay = {number: -(-len(some) // 2) for number, some in enumerate(lists)}
            items = [(ranked[number][place][0], place < stay[number]) for place, number in by_place]
            candidates = [item for item, stays in items if stays]
            left = [(item, None) for item, stays in items if not stays] + left

    def prompt_length(self, history: list[int], candidates: list[int]) -> int:
        """Return the number of tokens of a ranking prompt, without an answer."""
        return tree_length(self.prompts.ranking_prompt(history, candidates)[0])

    def rank_list(self, history: list[int], candidates: list[int]) -> Ranking:
        """Rank candidates in one prompt, which has them in a random order, as in training."""
        shuffled = np.random.default_rng(0).permutation(candidates).tolist()
        scores = self.logps(self.prompts.ranking_tree(Example("", history, 0, shuffled, 0), shuffled)).tolist()
        return sorted(zip(shuffled, scores, strict=True), key=lambda pair: -pair[1])


def divided(candidates: list[int], cost: dict[int, int], room: int) -> list[list[int]]:
    """Divide candidates into as few lists as fit: the costs of a list add up to at most `room`.

    A list has at least two candidates, whatever they cost, because one that is alone would never leave. Neighbours come
    into different lists.

    >>> divided([1, 2, 3, 4, 5], {n: 10 for n in range(6)}, room=30)
    [[1, 3, 5], [2, 4]]
    """
    most = max(1, len(candidates) // 2)
    fewest = -(-sum(cost[item] for item in candidates) // max(room, 1))
    for count in range(min(max(fewest, 1), most), most + 1):
        lists = [candidates[first::count] for first in range(count)]
        if all(sum(cost[item] for item in some) <= room for some in lists):
            break
    return lists
