"""Draw the negatives of each target once, from the seed.

A split's negatives leave out only what the user had touched up to that split's stage, see `touched_stages`. If training
negatives also left out the later test target, a model could rule out every test candidate that it had met as a training
negative of the user.
"""

import argparse

import numpy as np

from hanorec.data.protocol import Sequences
from hanorec.run.files import UserError

VIEWS = {"train": 0, "val": 1, "test": 2}  # the last stage that a split sees, see `touched_stages`


def touched_stages(data: Sequences, training: np.ndarray, leave_one_out: bool) -> np.ndarray:
    """Return the stage in which each user touched each title of data.touched: [P].

    With leave-one-out, stage 0 ends with the user's last training item, stage 1 with the validation target, and the
    rest is stage 2. With other splits a user belongs to one split, and everything is stage 0.

    Args:
        training: [U], number of each user's items that belong to training.
    """
    users, _, places = data.touched.T
    if not leave_one_out:
        return np.zeros(len(users), dtype=int)
    last = data.start[:-1] + training - 1  # each user's last training item
    after_training, after_val = places > data.places[last][users], places > data.places[last + 1][users]
    return after_training.astype(int) + after_val


class Negatives:
    """Draws negatives. The negatives of a target have distinct titles, none of them touched by the user.

    Args:
        training: [U], number of each user's items that belong to training.
        count: number of negatives for each target.
        sampling: `uniform` over items, or `popularity`: the weight of an item is one more than its training
            interactions. (Without the one, an item without training interactions could be a target and never a
            negative.) An item that no kept user touched (--keep-untouched) is never a target, and so never a negative.
        leave_one_out: whether the split is leave-one-out.
        option: the option that sets `count`, for errors.

    Raises:
        UserError: a user has touched so many titles that fewer than `count` remain.
    """

    def __init__(
        self, data: Sequences, training: np.ndarray, count: int, sampling: str, leave_one_out: bool, option: str
    ):
        self.data, self.count, self.title_codes = data, count, data.title_codes
        self.kept = np.bincount(data.items, minlength=len(self.title_codes)) > 0  # [N]
        weight = self.kept.astype(int)
        if sampling == "popularity":
            place = np.arange(len(data.items)) - np.repeat(data.start[:-1], np.diff(data.start))
            trained = place < np.repeat(training, np.diff(data.start))
            weight += np.bincount(data.items[trained], minlength=len(weight))
        self.cumulative = np.cumsum(weight)
        users, titles, _ = data.touched.T
        self.touched_keys = users * len(weight) + titles  # sorted
        self.stages = touched_stages(data, training, leave_one_out)
        kept_titles = np.unique(self.title_codes[self.kept])
        available = len(kept_titles) - int(np.bincount(users[np.isin(titles, kept_titles)]).max())
        fewer = min(available, count - 1)
        self.remedy = f"leave out {option}" if option != "--negatives" else f"give --negatives {fewer} or fewer"
        if available < count:
            remedy = self.remedy if fewer else "add items"
            raise UserError(f"no {count} negatives: one user has touched all except {available} titles; {remedy}")

    def draw(self, split: str, positions: np.ndarray, users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the negatives of R targets: [R, count] item indices. Touched and repeated titles are drawn again.

        Args:
            split: train, val, test or one of FURTHER_TESTS. test_hard gets those most alike to the target.
            positions: [R], of the targets in data.items.
            users: [R], the user of each target.
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
            titles = self.title_codes[drawn[changed]]
            redraw[changed] = self.touched(split, users[changed, None], titles) | repeated(titles)
        raise UserError(f"no {self.count} negatives found for {redraw.any(1).sum()} examples; {self.remedy}")

    def most_alike(self, position: int, user: int, rng: np.random.Generator) -> np.ndarray:
        """Return the negatives of a target that share most labels with it: [count].

        Labels are counted up to the first one that differs. Items that share equally many are taken in random order.
        """
        labels = self.data.labels
        shared = np.cumprod(labels == labels[self.data.items[position]], axis=1).sum(1)
        order = np.lexsort((rng.random(len(shared)), -shared))
        order = order[self.kept[order] & ~self.touched("test_hard", user, self.title_codes[order])]
        first = np.sort(np.unique(self.title_codes[order], return_index=True)[1])  # the first item of each title
        return order[first[: self.count]]

    def touched(self, split: str, users: np.ndarray, titles: np.ndarray) -> np.ndarray:
        """Return True for each title that its user has touched as the split sees it.

        Args:
            users, titles: user numbers and codes of titles, in shapes that broadcast.
        """
        keys = users * len(self.title_codes) + titles
        nearest = np.minimum(np.searchsorted(self.touched_keys, keys), len(self.touched_keys) - 1)
        return (self.touched_keys[nearest] == keys) & (self.stages[nearest] <= VIEWS[split.split("_")[0]])


def sampling_of(split: str, options: argparse.Namespace) -> str:
    """Return how the negatives of a split are drawn: `uniform`, `popularity`, or `alike` (see `most_alike`)."""
    further_tests = {"test_popularity": "popularity", "test_99": "uniform", "test_hard": "alike"}
    return further_tests.get(split, options.negative_sampling)


def negatives_of_splits(data: Sequences, training: np.ndarray, options: argparse.Namespace) -> dict[str, Negatives]:
    """Return the `Negatives` of each split that the data folder gets. For the arguments see there."""
    leave_one_out = options.split == "leave-one-out"
    option = "--protocol official" if options.positives > 1 else "--negatives"
    usual = Negatives(data, training, options.negatives, options.negative_sampling, leave_one_out, option)
    of_split = dict.fromkeys(VIEWS, usual)
    if data.labels.size:
        of_split["test_hard"] = usual
    for name in options.further_tests:
        split, count = f"test_{name}", 99 if name == "99" else options.negatives
        further = f"--further-tests {name}"
        of_split[split] = Negatives(data, training, count, sampling_of(split, options), leave_one_out, further)
    return of_split


def repeated(titles: np.ndarray) -> np.ndarray:
    """Return [R, count]: True for a title that is also further left in its row."""
    order = np.argsort(titles, axis=1, kind="stable")
    ranked = np.take_along_axis(titles, order, axis=1)
    repeats = np.zeros(titles.shape, dtype=bool)
    np.put_along_axis(repeats, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return repeats
