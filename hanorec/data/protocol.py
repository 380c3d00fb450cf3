"""The protocol: interactions in order, splits, targets and negatives, all drawn once from the seed.

Users and items are numbers here. Everything is an array, so that millions of interactions take seconds.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hanorec.data.readers import Raw
from hanorec.run.files import UserError


@dataclass
class Sequences:
    """Users' items in order of time, end to end: user u's are items[start[u]:start[u + 1]].

    Args:
        user_ids: [U]. item_ids, titles, images: [N], by item index.
        items: [M] item indices.
        start: [U + 1].
        touched: [P, 2], every (user, item) of the raw data, those below --min-rating too.
        counts: what was read, dropped and kept, for the manifest.
        split: [U], train, val or test, if the source has its own split.
    """

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    images: list[Path | None]
    items: np.ndarray
    start: np.ndarray
    touched: np.ndarray
    counts: dict[str, int]
    split: np.ndarray


def build_sequences(raw: Raw, min_rating: float | None, min_interactions: int, drop_untitled: bool) -> Sequences:
    """Filter the interactions, order them, and number the users and items that remain."""
    users, items, times, counts = rated_interactions(raw, min_rating, drop_untitled)
    users, items, times = drop_repeats(users, items, times, counts)
    long_enough = np.bincount(users, minlength=len(raw.interactions.user_codes)) >= min_interactions
    counts["users_too_short"] = int((~long_enough).sum())
    users, items, times = (column[long_enough[users]] for column in (users, items, times))
    if not len(users):
        raise UserError(f"no user has {min_interactions} interactions; lower --min-interactions or --min-rating")
    tied = (users[1:] == users[:-1]) & (times[1:] == times[:-1]) & raw.interactions.timed
    counts["interactions_tied_in_time"] = int((np.append(tied, False) | np.append(False, tied)).sum())

    user_codes, user_number = np.unique(users, return_inverse=True)
    index_of, item_ids = number_items(raw, np.unique(items))
    all_users = list(raw.interactions.user_codes)
    user_ids = [all_users[code] for code in user_codes]
    images = [raw.images.get(item) for item in item_ids]
    counts |= {
        "users": len(user_ids),
        "items": len(item_ids),
        "interactions": len(users),
        "items_left_out": len(raw.titles) - len(item_ids),
        "items_without_image": images.count(None),
        "images_that_are_links": sum(path is not None and path.is_symlink() for path in images),
    }
    return Sequences(
        user_ids=user_ids,
        item_ids=item_ids,
        titles=[raw.titles[item] for item in item_ids],
        images=images,
        items=index_of[items],
        start=np.append(0, np.bincount(user_number).cumsum()),
        touched=touched_pairs(raw, user_codes, index_of),
        counts=counts,
        split=np.array([raw.split.get(user, "") for user in user_ids]),
    )


def rated_interactions(raw: Raw, min_rating: float | None, drop_untitled: bool):
    """The interactions that are rated high enough, of items with a title: (users, items, times, counts)."""
    users, items, times, ratings = raw.columns()
    if min_rating is not None and not raw.interactions.rated:
        raise UserError("the source has no ratings: --min-rating does not go with it")
    rated = ratings >= (-np.inf if min_rating is None else min_rating)
    unlisted = "" if drop_untitled else "unlisted"  # an item that the titles do not list is refused later
    untitled = np.array([not raw.titles.get(item, unlisted) for item in raw.interactions.item_codes])
    keep = rated & ~untitled[items]
    counts = {
        "interactions_read": len(users),
        "below_min_rating": int((~rated).sum()),
        "of_untitled_items": int((rated & ~keep).sum()),
    }
    return users[keep], items[keep], times[keep], counts


def drop_repeats(users: np.ndarray, items: np.ndarray, times: np.ndarray, counts: dict[str, int]):
    """Sort by user and time (ties keep the input order), and keep each item of a user at its first time."""
    order = np.lexsort((times, users))  # stable
    users, items, times = users[order], items[order], times[order]
    first = np.zeros(len(users), dtype=bool)
    first[np.unique(users * (items.max(initial=0) + 1) + items, return_index=True)[1]] = True
    counts["repeated_items_dropped"] = int((~first).sum())
    return users[first], items[first], times[first]


def number_items(raw: Raw, codes: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Number the items with these codes in the order of the source's titles.

    Returns (item index of each code of the source, -1 for others; the item ids by index).
    """
    item_ids = list(raw.interactions.item_codes)
    untitled = [item_ids[code] for code in codes if item_ids[code] not in raw.titles]
    if untitled:
        raise UserError(
            f"{len(untitled)} items have interactions but no title, the first is {untitled[0]}; add them, or leave "
            "out their interactions with --drop-untitled"
        )
    position = {item: number for number, item in enumerate(raw.titles)}
    codes = np.array(sorted(codes.tolist(), key=lambda code: position[item_ids[code]]))
    index_of = np.full(len(item_ids), -1)
    index_of[codes] = np.arange(len(codes))
    return index_of, [item_ids[code] for code in codes]


def touched_pairs(raw: Raw, user_codes: np.ndarray, index_of: np.ndarray) -> np.ndarray:
    """[P, 2]: every (user, item) of the raw data that are both kept, whatever the rating."""
    users, items, _, _ = raw.columns()
    number_of = np.full(len(raw.interactions.user_codes), -1)
    number_of[user_codes] = np.arange(len(user_codes))
    inside = (number_of[users] >= 0) & (index_of[items] >= 0)
    return np.stack([number_of[users[inside]], index_of[items[inside]]], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def items_before(options: argparse.Namespace) -> int:
    """How many of a user's items must stand before a target."""
    return 1 if options.positives == 1 else options.history + options.positives - 1


def split_targets(data: Sequences, options: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Choose the targets of each split.

    leave-one-out: a user's last item is tested, the second last validates, each one before it trains (the first has no
    history). user: users 8:1:1; the last item is the target, and a training user's earlier ones are too. published: the
    same with the source's own users.

    Returns (positions in data.items by split, [U] how many of a user's items belong to training).
    """
    length, end = np.diff(data.start), data.start[1:]
    training = length.copy()
    if options.split == "leave-one-out":
        training -= 2
        targets = {"val": end - 2, "test": end - 1}
    else:
        split = data.split if options.split == "published" else split_users(len(length), options.seed)
        targets = {name: end[split == name] - 1 for name in ("val", "test")}
        training[split != "train"] = 0
    windows = np.maximum(training - items_before(options), 0)
    if options.max_windows_per_user:
        windows = np.minimum(windows, options.max_windows_per_user)  # the latest ones
    last = data.start[:-1] + training
    offsets = np.arange(windows.sum()) - np.repeat(windows.cumsum() - windows, windows)
    targets["train"] = np.repeat(last - windows, windows) + offsets
    return targets, training


def split_users(count: int, seed: int) -> np.ndarray:
    """[count]: train, val or test for each user, 8:1:1."""
    shuffled, tenth = np.random.default_rng([seed, 3]).permutation(count), max(1, count // 10)
    split = np.full(count, "train")
    split[shuffled[:tenth]] = "val"
    split[shuffled[tenth : 2 * tenth]] = "test"
    return split


# ---------------------------------------------------------------------------------------------------------------------
# Negatives


class Negatives:
    """Draws negatives: no item with the title of one of the user's items, no two with the same title for one target.

    Args:
        count: negatives for each target.
        sampling: uniform over items, or popularity: in proportion to their interactions.
    """

    def __init__(self, data: Sequences, count: int, sampling: str):
        codes: dict[str, int] = {}
        self.title = np.array([codes.setdefault(title, len(codes)) for title in data.titles])  # [N], equal for equal
        weight = np.bincount(data.items, minlength=len(self.title)) if sampling == "popularity" else 1
        self.cumulative = np.cumsum(np.broadcast_to(weight, self.title.shape))
        self.count = count
        keys = data.touched[:, 0] * len(self.title) + self.title[data.touched[:, 1]]
        self.touched = np.unique(keys)  # (user, title), sorted
        available = len(codes) - int(np.bincount(self.touched // len(self.title)).max())
        if available < count:
            raise UserError(f"--negatives {count}: a user has touched all but {available} titles; lower --negatives")

    def draw(self, users: np.ndarray, rng) -> np.ndarray:
        """[R, count] item indices for R targets of these users. What does not fit is drawn again."""
        drawn = np.full((len(users), self.count), -1)
        unfit = np.ones(drawn.shape, dtype=bool)
        for _ in range(1000):
            rows, columns = np.nonzero(unfit)
            if not len(rows):
                return drawn
            draws = rng.random(len(rows)) * self.cumulative[-1]
            drawn[rows, columns] = np.searchsorted(self.cumulative, draws, side="right")
            changed = np.unique(rows)  # only rows that changed can have become unfit
            unfit[changed] = self.unfit(users[changed], self.title[drawn[changed]])
        raise UserError(f"no {self.count} negatives found for {unfit.any(1).sum()} examples; lower --negatives")

    def unfit(self, users: np.ndarray, titles: np.ndarray) -> np.ndarray:
        """[R, count]: True for a title that the user has touched, or that stands further left in its row already."""
        keys = users[:, None] * len(self.title) + titles
        touched = self.touched[np.minimum(np.searchsorted(self.touched, keys), len(self.touched) - 1)] == keys
        order = np.argsort(titles, axis=1, kind="stable")
        ranked = np.take_along_axis(titles, order, axis=1)
        repeated = np.zeros_like(touched)
        np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        return touched | repeated


def drop_equal_titles(data: Sequences, targets: dict[str, np.ndarray], negatives: Negatives, positives: int) -> None:
    """Drop the targets whose several positives share a title: no two candidates may."""
    for name, at in targets.items():
        titles = np.sort(negatives.title[data.items[at[:, None] - np.arange(positives)]], axis=1)
        distinct = (titles[:, 1:] != titles[:, :-1]).all(axis=1)
        targets[name] = at[distinct]
        data.counts[f"{name}_rows_of_equal_titles"] = int((~distinct).sum())


AT_ONCE = 1 << 18  # examples that are drawn and rendered together, which bounds the memory


def example_lines(data: Sequences, targets: np.ndarray, negatives: Negatives, options, rng) -> Iterator[str]:
    """Yield the JSON lines of a split.

    With several positives, the items just before the target are candidates too, and the history ends before them.

    Args:
        targets: positions in data.items.
    """
    items = np.array([json.dumps(item, ensure_ascii=False) for item in data.item_ids], dtype=object)
    names = [json.dumps(user, ensure_ascii=False) for user in data.user_ids]
    for chunk in range(0, len(targets), AT_ONCE):
        at = targets[chunk : chunk + AT_ONCE]
        users = np.searchsorted(data.start, at, side="right") - 1
        drawn = negatives.draw(users, rng)
        positives = data.items[at[:, None] - np.arange(options.positives)]
        candidates = rng.permuted(np.concatenate([positives, drawn], axis=1), axis=1)
        rejected = drawn[np.arange(len(at)), rng.integers(negatives.count, size=len(at))]
        ends = at - options.positives + 1
        begins = np.maximum(data.start[users], ends - options.history)
        for n, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            yield (
                f'{{"user": {names[users[n]]}, "history": [{", ".join(items[data.items[begin:end]])}], '
                f'"target": {items[data.items[at[n]]]}, "candidates": [{", ".join(items[candidates[n]])}], '
                f'"rejected": {items[rejected[n]]}}}'
            )
