"""The preference pairs of DPO: their kinds, the items that are rejected, and their prompt trees."""

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import send_to_device

from hanorec.data.folder import Example
from hanorec.model.batch import Batch, pinned
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts, fit_to_length
from hanorec.model.samples import Samples
from hanorec.model.trees import Node
from hanorec.run.files import UserError

KINDS = {"rank": ["rank"], "yesno": ["yes", "no"]}  # the kinds of pairs of each task, see Prompts.pair_tree


@dataclass
class PairBatch:
    """B preference pairs with A answers, for one forward.

    Args:
        trees: the prompts and answers.
        places: (rows [A], columns [A]), the place of each answer in a table [B, 1 + K].
        lengths: [B], the number of tokens of the chosen answers.
        rejected: K.
        reference: [B, 1 + K], the reference's log-probabilities. hardness: [B, K].
    """

    trees: Batch
    places: tuple[torch.Tensor, torch.Tensor]
    lengths: torch.Tensor
    rejected: int
    reference: torch.Tensor | None = None
    hardness: torch.Tensor | None = None

    def to(self, device) -> "PairBatch":
        """Return the batch with its tensors on `device`."""
        moved = {name: value for name, value in vars(self).items() if name != "trees"}
        return PairBatch(self.trees.to(device), **send_to_device(moved, device, non_blocking=True))

    def lay_out(self, logps: torch.Tensor) -> torch.Tensor:
        """Lay the log-probabilities of the answers, [A], out as [B, 1 + K]: the chosen answer first.

        A Yes/No pair has NaN from its third column on.
        """
        return logps.new_full((len(self.lengths), 1 + self.rejected), torch.nan).index_put(self.places, logps)


class Pairs(Samples):
    """Builds the prompt trees of the preference pairs. Pair n is kind n % len(kinds) of example n // len(kinds).

    A ranking pair has the titles of several rejected items. A Yes/No pair has one rejected answer, about the target or
    about the example's own `rejected` item.

    Args:
        pool: from `pools`: for each example the P items that can be rejected, the example's own `rejected` item first.

    Attributes:
        columns: [E, K], the numbers in its pool of the items that each ranking pair rejects now; at first all.
    """

    def __init__(self, prompts: Prompts, examples: Sequence[Example], kinds: Sequence[str], max_length: int, pool):
        super().__init__(prompts, prompts.pair_tree, examples, kinds, max_length)
        self.pool = pool
        self.columns = all_columns(pool)

    def whole(self) -> "Pairs":
        """Return the same pairs with the whole pool rejected, for scoring it."""
        pairs = copy.copy(self)
        pairs.columns = all_columns(self.pool)
        return pairs

    @property
    def rejected(self) -> int:
        """The number K of rejected items of a ranking pair."""
        return self.columns.shape[1]

    def tree(self, number: int) -> list[Node]:
        """Return the prompt tree of a pair: the chosen answer and the rejected ones, with as many items as fit.

        The history is cut so that the whole pool fits: the reference scores the whole pool behind the same prompt.
        """
        example, kind = number // len(self.kinds), self.kinds[number % len(self.kinds)]
        pool = self.pool[example]
        build = partial(self.prompts.pair_tree, kind=kind, rejected=pool)
        tree = fit_to_length(build, self.examples[example], self.max_length, self.shortened)
        if kind != "rank":
            return tree
        answers = tree[-len(pool) :]  # of the pool
        return tree[: -len(pool)] + [answers[column] for column in self.columns[example]]

    def batch(self, numbers: Sequence[int], packed: PackedMLLM, tokens, reference=None, hardness=None) -> "PairBatch":
        """Return these pairs as a PairBatch.

        Args:
            tokens: the ImageTokens of the data.
            reference: [all pairs, 1 + P], log-probabilities of the chosen answers and of the whole pool. hardness: [all
                pairs, P]. None: the batch has none.
        """
        trees = packed.collate([self.tree(number) for number in numbers], tokens)
        ranking = torch.tensor([self.kinds[number % len(self.kinds)] == "rank" for number in numbers])
        counts = torch.where(ranking, 1 + self.rejected, 2)  # of answers
        firsts = counts.cumsum(0) - counts
        rows = torch.arange(len(numbers)).repeat_interleave(counts)
        columns = torch.arange(len(rows)) - firsts[rows]
        if reference is not None:
            reference = torch.cat([reference[numbers, :1], self.of_pool(reference[:, 1:], numbers)], dim=1)
            hardness = self.of_pool(hardness, numbers)
        parts = (rows, columns), trees.answers[firsts], self.rejected, reference, hardness
        return PairBatch(trees, *(pinned(parts) if torch.cuda.is_available() else parts))

    def of_pool(self, values: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """Return the values of what these pairs reject now: [pairs, K].

        Args:
            values: [all pairs, P], of every item of the pool. A Yes/No pair has one value, in the first column.
        """
        numbers = torch.as_tensor(list(numbers))
        is_rank = torch.tensor([kind == "rank" for kind in self.kinds])[numbers % len(self.kinds)]
        columns = torch.where(is_rank[:, None], self.columns[numbers // len(self.kinds)], torch.arange(self.rejected))
        return values[numbers].gather(1, columns)

    def state_dict(self) -> dict:
        return {"columns": self.columns.tolist()}

    def load_state_dict(self, state: dict) -> None:
        self.columns = torch.tensor(state["columns"])


def all_columns(pool: list[list[int]]) -> torch.Tensor:
    """Return the numbers of all items in each example's pool: [E, P]."""
    return torch.arange(len(pool[0])).repeat(len(pool), 1)


def pools(examples: Sequence[Example], rejected: int, source: str) -> list[list[int]]:
    """Return for each example the items that can be rejected: its own `rejected` item, then other negatives.

    These are its candidates without the items of its history and without any target of the same history. With
    --rejected-from data a pool is cut to --rejected items; the other sources draw from the whole pool.

    Raises:
        UserError: an example has too few negatives.
    """
    found, targets = [], defaultdict(set)
    for example in examples:
        targets[example.user, *example.history].add(example.target)
    for example in examples:
        excluded = {example.rejected, *example.history} | targets[example.user, *example.history]
        found.append([example.rejected, *(item for item in example.candidates if item not in excluded)])
    fewest = min(map(len, found))
    most = fewest - 1 if source in ("model", "self") else fewest
    if rejected > most:
        spared = "; the hardest is never rejected" if most < fewest else ""
        raise UserError(f"--rejected {rejected}: --rejected-from {source} has only {most} negatives{spared}")
    return [pool[: rejected if source == "data" else fewest] for pool in found]


def draw_by_popularity(pairs: Pairs, sequences: dict[str, list[int]], count: int, seed: int) -> torch.Tensor:
    """Draw rejected items in proportion to their training interactions plus one. Returns columns [E, count]."""
    interactions = Counter(item for items in sequences.values() for item in items)
    generator = np.random.default_rng([seed, 0])
    columns = []
    for pool in pairs.pool:
        weights = np.array([interactions[item] + 1.0 for item in pool])
        columns.append(generator.choice(len(pool), count, replace=False, p=weights / weights.sum()))
    return torch.tensor(np.array(columns))


def draw_from_the_harder(logps: torch.Tensor, count: int, seed: int, epoch: int = 0) -> torch.Tensor:
    """Draw rejected items from the upper half of a model's ranking, without the hardest one.

    If the half has fewer than `count` items, it is enlarged downwards.

    Args:
        logps: [E, P], of the items in the pool. A row of NaN (of an example that the run does not reach) gets any.

    Returns columns [E, count].
    """
    order = logps.nan_to_num(0.0).argsort(dim=1, descending=True, stable=True)
    half = max((logps.shape[1] + 1) // 2, count + 1)
    generator = np.random.default_rng([seed, 1, epoch])
    places = generator.permuted(np.tile(np.arange(1, half), (len(logps), 1)), axis=1)[:, :count]
    return order.gather(1, torch.tensor(places))
