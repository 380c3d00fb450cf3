"""What a training stage trains on: samples of examples, and the warm-up's sequences, each with its prompt tree."""

from collections.abc import Callable, Sequence

from hanorec.data.folder import Example
from hanorec.model.prompts import Prompts, fit_to_length
from hanorec.model.trees import Node


class Samples:
    """Every kind of sample of every example: sample n is kind n % len(kinds) of example n // len(kinds).

    Args:
        build: from (example, kind) to a prompt tree.
        kinds: the tasks of SFT, or the kinds of pairs of DPO.
        max_length: most tokens of a path.

    Attributes:
        shortened: (user, target) of the examples whose prompts lost history items so far.

    Raises:
        UserError: an example is too long even with one history item.
    """

    def __init__(
        self, prompts: Prompts, build: Callable, examples: Sequence[Example], kinds: Sequence[str], max_length: int
    ):
        self.examples, self.kinds, self.max_length = examples, kinds, max_length
        self.shortened: set[tuple[str, int]] = set()
        self.builds = [lambda example, kind=kind: build(example, kind) for kind in kinds]
        prompts.check_fit(self.builds, examples, max_length)

    def __len__(self) -> int:
        return len(self.examples) * len(self.kinds)

    def example(self, number: int) -> Example:
        return self.examples[number // len(self.kinds)]

    def tree(self, number: int) -> list[Node]:
        build = self.builds[number % len(self.kinds)]
        return fit_to_length(build, self.example(number), self.max_length, self.shortened)

    def users(self, numbers: Sequence[int]) -> list[str]:
        """The user of each of these samples."""
        return [self.example(number).user for number in numbers]


class WarmUp:
    """Language modelling over the training sequences: stretches of them, overlapping by three quarters.

    Every second stretch that ends at a training example's target has its ranking question and candidates before it.
    """

    def __init__(self, prompts: Prompts, examples: list[Example], sequences: dict[str, list[int]], options):
        self.prompts, self.max_length = prompts, options.max_length
        candidates_of = {}
        if "rank" in options.tasks:
            candidates_of = {(example.user, example.target): example.candidates for example in examples}
        self.stretches: list[tuple[str, list[int], list[int]]] = []  # user, items, candidates
        size = options.warmup_items
        step = max(size // 4, 1)
        for user, items in sequences.items():
            for start in range(step - size, len(items), step):
                stretch = items[max(start, 0) : start + size]
                candidates = []
                if len(self.stretches) % 2:
                    candidates = candidates_of.get((user, stretch[-1]), [])
                if set(candidates) & set(stretch[:-1]):  # other positives, with --protocol official
                    candidates = []
                if len(stretch) > 1:
                    self.stretches.append((user, stretch, candidates))

    def __len__(self) -> int:
        return len(self.stretches)

    def tree(self, number: int) -> list:
        _, stretch, candidates = self.stretches[number]
        return self.prompts.language_tree(stretch, self.max_length, candidates)

    def users(self, numbers: list[int]) -> list[str]:
        return [self.stretches[number][0] for number in numbers]
