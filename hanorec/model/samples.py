"""The samples of a training stage, by number: questions about the examples, and sequences for the warm-up."""

from collections.abc import Callable, Sequence

from hanorec.data.folder import Example
from hanorec.model.prompts import Prompts, fit_to_length
from hanorec.model.trees import Node


class Samples:
    """Builds the prompt tree of each sample. Sample n is kind n % len(kinds) of example n // len(kinds).

    Args:
        build: a function from (example, kind) to a prompt tree.
        kinds: the tasks of SFT, or the kinds of pairs of DPO.
        max_length: the largest number of tokens of a prompt with one answer.

    Attributes:
        users: the user of each sample.
        shortened: (user, target) of the examples that had to lose history items so far, to stay within max_length.

    Raises:
        UserError: an example is too long even with one history item.
    """

    def __init__(
        self, prompts: Prompts, build: Callable, examples: Sequence[Example], kinds: Sequence[str], max_length: int
    ):
        self.prompts, self.examples, self.kinds, self.max_length = prompts, examples, kinds, max_length
        self.users = [example.user for example in examples for _ in kinds]
        self.shortened: set[tuple[str, int]] = set()
        self.builds = [lambda example, kind=kind: build(example, kind) for kind in kinds]
        prompts.check_fit(self.builds, examples, max_length)

    def __len__(self) -> int:
        return len(self.users)

    def tree(self, number: int) -> list[Node]:
        """Return the prompt tree of a sample, with as many history items as fit."""
        example, build = self.examples[number // len(self.kinds)], self.builds[number % len(self.kinds)]
        return fit_to_length(build, example, self.max_length, self.shortened)


class WarmUp:
    """Builds the prompt trees of the warm-up: language modelling over windows of the training sequences.

    A window has at most options.warmup_items items, and ends a quarter of that later than the one before. The first
    windows begin at the first item and the last ones end at the last item, so they are shorter. With the rank task,
    every second window is turned into the ranking question of a training example if it ends at that example's target.

    Attributes:
        users: the user of each window.
    """

    def __init__(self, prompts: Prompts, examples: list[Example], sequences: dict[str, list[int]], options):
        self.prompts, self.max_length = prompts, options.max_length
        candidates_of = {}
        if "rank" in options.tasks:
            candidates_of = {(example.user, example.target): example.candidates for example in examples}
        self.users: list[str] = []
        self.windows: list[tuple[list[int], list[int]]] = []  # items, candidates
        size = options.warmup_items
        step = max(size // 4, 1)
        for user, items in sequences.items():
            for start in range(step - size, len(items), step):
                window = items[max(start, 0) : start + size]
                if len(window) < 2:
                    continue
                candidates = candidates_of.get((user, window[-1]), []) if len(self.windows) % 2 else []
                if set(candidates) & set(window[:-1]):  # with --protocol official: other positives of the user
                    candidates = []
                self.users.append(user)
                self.windows.append((window, candidates))

    def __len__(self) -> int:
        return len(self.windows)

    def tree(self, number: int) -> list[Node]:
        """Return the prompt tree of a window."""
        items, candidates = self.windows[number]
        return self.prompts.language_tree(items, self.max_length, candidates)
