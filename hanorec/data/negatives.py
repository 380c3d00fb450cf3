"""Draw the negatives of each target once, from the seed.

A split's negatives leave out only what the user had touched up to that split's stage, see `seen_stages`. If training
negatives also left out the later test target, a model could rule out every test candidate that it had met as a training
negative of the user.
"""

import argparse

import numpy as np

from hanorec.data.protocol import Sequences
from hanorec.run.files import UserError

VIEWS = {"train": 0, "val": 1, "test": 2}  # the last stage that a split sees, see `seen_stages`


def seen_stages(data: Sequences, training: np.ndarray, leave_one_out: bool) -> np.ndarray:
    """Return the stage in which each user touched each title of data.seen: [P], numbers in VIEWS.

    With leave-one-out, stage 0 ends with the user's last training item, and stage 1 with the validation target. With
    other splits a user belongs to one split, and everything is stage 0.

    Args:
        training: [U], number of each user's items that belong to training.
    """
    users, _, places = data.seen.T
    if not leave_one_out:
        return np.zeros(len(users), dtype=int)
    last = data.start[:-1] + training - 1  # each user's last training item
    after_training, after_val = places > data.places[last][users], places > data.places[last + 1][users]
    return after_training.astype(int) + after_val


class Negatives:
    """Draws negatives. The negatives of a target have distinct titles, none of them touched by the user.

    Args:
        training: [U], number of each user's items that belong to training.
        options: of which `negatives` (their number), `negative_sampling` and `split` are used. The sampling is
            `uniform` over items, or `popularity`, with the weight of one more than an item's training interactions.
            (Without the one, an item that nobody has in training could be a target and never a negative.)
    """

    def __init__(self, data: Sequences, training: np.ndarray, options: argparse.Namespace):
        self.data, self.count, self.title = data, options.negatives, data.title
        weight = np.ones(len(self.title), dtype=int)
        if options.negative_sampling == "popularity":
            place = np.arange(len(data.items)) - np.repeat(data.start[:-1], np.diff(data.start))
            trained = place < np.repeat(training, np.diff(data.start))
            weight += np.bincount(data.items[trained], minlength=len(self.title))
        self.cumulative = np.cumsum(weight)
        self.seen = data.seen[:, 0] * len(self.title) + data.seen[:, 1]  # a sorted key for each (user, title)
        self.stage = seen_stages(data, training, options.split == "leave-one-out")
        available = len(np.unique(self.title)) - int(np.bincount(self.seen // len(self.title)).max())
        if available < self.count:
            raise UserError(
                f"no {self.count} negatives: one user has seen all except {available} titles; ask for fewer"
            )

    def draw(self, split: str, positions: np.ndarray, users: np.ndarray, rng) -> np.ndarray:
        """Draw the negatives of R targets: [R, count] item indices. Touched and repeated titles are drawn again.

        Args:
            split: train, val, test or one of FURTHER_TESTS. test_hard gets those most alike to the target.
            positions: [R], of the targets in data.items. users: [R].
        """
        if split == "test_hard":
            return np.array([self.most_alike(*target, rng) for target in zip(positions, users, strict=True)])
        drawn = np.full((len(users), self.count), -1)
        redraw = np.ones(drawn.shape, dtype=bool)
        for _ in range(1000):
            rows, columns = np.nonzero(redraw)
            if not len(rows):
                return drawn
            draws = rng.random(len(rows)) * self.cumulative[-1]
            drawn[rows, columns] = np.searchsorted(self.cumulative, draws, side="right")
            changed = np.unique(rows)  # the other rows are complete
            titles = self.title[drawn[changed]]
            redraw[changed] = self.touched(split, users[changed, None], titles) | repeated(titles)
        raise UserError(f"no {self.count} negatives found for {redraw.any(1).sum()} examples; ask for fewer")

    def most_alike(self, position: int, user: int, rng) -> np.ndarray:
        """Return the negatives of a target that share most labels with it: [count]. The first label counts most.

        Items that share the same labels are taken in random order.
        """
        labels = self.data.alike
        shared = np.cumprod(labels == labels[self.data.items[position]], axis=1).sum(1)
        order = np.lexsort((rng.random(len(shared)), -shared))
        order = order[~self.touched("test_hard", user, self.title[order])]
        first = np.sort(np.unique(self.title[order], return_index=True)[1])  # the first item of each title
        return order[first[: self.count]]

    def touched(self, split: str, users: np.ndarray, titles: np.ndarray) -> np.ndarray:
        """Return True for each title that its user has touched as the split sees it. Shapes broadcast."""
        keys = users * len(self.title) + titles
        nearest = np.minimum(np.searchsorted(self.seen, keys), len(self.seen) - 1)
        return (self.seen[nearest] == keys) & (self.stage[nearest] <= VIEWS[split.split("_")[0]])


def negatives_of_splits(data: Sequences, training: np.ndarray, options: argparse.Namespace) -> dict[str, Negatives]:
    """Return what draws the negatives of each split that the data folder gets. For the arguments see `Negatives`."""
    of_split = dict.fromkeys(VIEWS, Negatives(data, training, options))
    if data.alike.size:
        of_split["test_hard"] = of_split["test"]
    uniform = {"negatives": 99, "negative_sampling": "uniform"}
    changes = {"popularity": {"negative_sampling": "popularity"}, "99": uniform}
    for name in options.further_tests:
        changed = argparse.Namespace(**vars(options) | changes[name])
        of_split[f"test_{name}"] = Negatives(data, training, changed)
    return of_split


def repeated(titles: np.ndarray) -> np.ndarray:
    """Return [R, count]: True for a title that is also further left in its row."""
    order = np.argsort(titles, axis=1, kind="stable")
    ranked = np.take_along_axis(titles, order, axis=1)
    repeats = np.zeros(titles.shape, dtype=bool)
    np.put_along_axis(repeats, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return repeats
