"""Order the interactions, split them, choose the targets, and draw the negatives once from the seed.

Users and items are numbers in this module. The data are in arrays, so that millions of interactions take seconds.
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
    """The items of all users in order of time. The items of user u are items[start[u]:start[u + 1]].

    Args:
        user_ids: [U].
        item_ids, titles, images: [N], by item index.
        items: [M] item indices, user by user.
        start: [U + 1], position of each user's first item in `items`.
        seen: [P, 2], every (user, item) of kept users and kept items in the raw data, also those below --min-rating.
        counts: numbers of interactions, users and items that were read, dropped and kept, for the manifest.
        split: [U], train, val or test, or empty if the source has no split of its own.
    """

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    images: list[Path | None]
    items: np.ndarray
    start: np.ndarray
    seen: np.ndarray
    counts: dict[str, int]
    split: np.ndarray


def build_sequences(raw: Raw, min_rating: float | None, min_interactions: int, drop_untitled: bool) -> Sequences:
    """Filter and order the interactions, and number the users and items that remain."""
    users, items, times, counts = rated_interactions(raw, min_rating, drop_untitled)
    users, items, times = drop_repeats(users, items, times, counts)
    long_enough = np.bincount(users, minlength=len(raw.interactions.user_codes)) >= min_interactions
    counts["users_too_short"] = int((~long_enough).sum())
    users, items, times = (column[long_enough[users]] for column in (users, items, times))
    if not len(users):
        raise UserError(f"no user has {min_interactions} interactions; lower --min-interactions or --min-rating")
    tied = (users[1:] == users[:-1]) & (times[1:] == times[:-1]) & raw.interactions.timed
    counts["interactions_tied_in_time"] = int((np.append(tied, False) | np.append(False, tied)).sum())

    user_codes, lengths = np.unique(users, return_counts=True)
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
        start=np.append(0, lengths.cumsum()),
        seen=seen_pairs(raw, user_codes, index_of),
        counts=counts,
        split=np.array([raw.split.get(user, "") for user in user_ids]),
    )


def rated_interactions(raw: Raw, min_rating: float | None, drop_untitled: bool):
    """Drop the interactions with a low rating or an empty title. Returns (users, items, times, counts)."""
    users, items, times, ratings = raw.columns()
    if min_rating is not None and not raw.interactions.rated:
        raise UserError("the source has no ratings; do not give --min-rating")
    rated = ratings >= (-np.inf if min_rating is None else min_rating)
    # The title of an item that is not listed: "" drops the item here; number_items refuses it with any other text
    unlisted = "" if drop_untitled else "unlisted"
    untitled = np.array([not raw.titles.get(item, unlisted) for item in raw.interactions.item_codes])
    keep = rated & ~untitled[items]
    counts = {
        "interactions_read": len(users),
        "below_min_rating": int((~rated).sum()),
        "of_untitled_items": int((rated & ~keep).sum()),
    }
    return users[keep], items[keep], times[keep], counts


def drop_repeats(users: np.ndarray, items: np.ndarray, times: np.ndarray, counts: dict[str, int]):
    """Sort by user and time, and drop each item that the user already has. Equal times keep the input order."""
    order = np.lexsort((times, users))  # stable
    users, items, times = users[order], items[order], times[order]
    keys = users * (items.max(initial=0) + 1) + items
    first = np.sort(np.unique(keys, return_index=True)[1])
    counts["repeated_items_dropped"] = len(users) - len(first)
    return users[first], items[first], times[first]


def number_items(raw: Raw, codes: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Number the items with these codes in the order of the source's titles.

    Returns (item index of every code in the source, -1 for a code that is not kept; item ids by item index).
    """
    item_ids = list(raw.interactions.item_codes)
    untitled = [item_ids[code] for code in codes if item_ids[code] not in raw.titles]
    if untitled:
        fault = f"{len(untitled)} items have interactions but no title, the first is {untitled[0]}"
        raise UserError(f"{fault}; add their titles, or drop their interactions with --drop-untitled")
    position = {item: number for number, item in enumerate(raw.titles)}
    codes = np.array(sorted(codes.tolist(), key=lambda code: position[item_ids[code]]))
    index_of = np.full(len(item_ids), -1)
    index_of[codes] = np.arange(len(codes))
    return index_of, [item_ids[code] for code in codes]


def seen_pairs(raw: Raw, user_codes: np.ndarray, index_of: np.ndarray) -> np.ndarray:
    """Return [P, 2]: every (user, item) of kept users and kept items in the raw data, with any rating."""
    users, items, _, _ = raw.columns()
    number_of = np.full(len(raw.interactions.user_codes), -1)
    number_of[user_codes] = np.arange(len(user_codes))
    kept = (number_of[users] >= 0) & (index_of[items] >= 0)
    return np.stack([number_of[users[kept]], index_of[items[kept]]], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def items_before(options: argparse.Namespace) -> int:
    """Return how many items a user must have before a target."""
    return 1 if options.positives == 1 else options.history + options.positives - 1


def split_targets(data: Sequences, options: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Choose the targets of each split.

    - leave-one-out: a user's last item is the test target, the second last is the validation target, and each earlier
      item except the first is a training target.
    - user: users are divided 8:1:1. A user's last item is the target; for a training user, each earlier item except the
      first too.
    - published: like user, with the split of the source.

    With several positives, a user's first items_before() items are no training targets. --max-windows-per-user keeps
    the last targets.

    Returns (positions of the targets in data.items by split, [U] number of each user's items that belong to training).
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
    windows = np.maximum(training - items_before(options), 0)  # [U], number of each user's training targets
    if options.max_windows_per_user:
        windows = np.minimum(windows, options.max_windows_per_user)  # the last ones
    last = data.start[:-1] + training
    # 0, 1, 2, ... within each user's training targets
    offsets = np.arange(windows.sum()) - np.repeat(windows.cumsum() - windows, windows)
    targets["train"] = np.repeat(last - windows, windows) + offsets
    return targets, training


def split_users(count: int, seed: int) -> np.ndarray:
    """Divide users 8:1:1. Returns [count]: train, val or test."""
    shuffled = np.random.default_rng([seed, 3]).permutation(count)
    tenth = max(1, count // 10)
    split = np.full(count, "train")
    split[shuffled[:tenth]] = "val"
    split[shuffled[tenth : 2 * tenth]] = "test"
    return split


# ---------------------------------------------------------------------------------------------------------------------
# Negatives


class Negatives:
    """Draws negatives. The negatives of a target have different titles, and none that the user has seen.

    Args:
        count: number of negatives for each target.
        sampling: `uniform` over items, or `popularity`, in proportion to the interactions of an item.
    """

    def __init__(self, data: Sequences, count: int, sampling: str):
        codes: dict[str, int] = {}
        self.title = np.array([codes.setdefault(title, len(codes)) for title in data.titles])  # [N] codes of titles
        weight = np.bincount(data.items, minlength=len(self.title)) if sampling == "popularity" else 1
        self.cumulative = np.cumsum(np.broadcast_to(weight, self.title.shape))
        self.count = count
        keys = data.seen[:, 0] * len(self.title) + self.title[data.seen[:, 1]]
        self.seen = np.unique(keys)  # a sorted key for each (user, title)
        available = len(codes) - int(np.bincount(self.seen // len(self.title)).max())
        if available < count:
            raise UserError(f"--negatives {count}: one user has seen all except {available} titles; lower --negatives")

    def draw(self, users: np.ndarray, rng) -> np.ndarray:
        """Draw [R, count] item indices for R targets of these users. Draw again those that are not allowed."""
        drawn = np.full((len(users), self.count), -1)
        redraw = np.ones(drawn.shape, dtype=bool)
        for _ in range(1000):
            rows, columns = np.nonzero(redraw)
            if not len(rows):
                return drawn
            draws = rng.random(len(rows)) * self.cumulative[-1]
            drawn[rows, columns] = np.searchsorted(self.cumulative, draws, side="right")
            changed = np.unique(rows)  # the other rows are complete
            redraw[changed] = self.not_allowed(users[changed], self.title[drawn[changed]])
        raise UserError(f"no {self.count} negatives found for {redraw.any(1).sum()} examples; lower --negatives")

    def not_allowed(self, users: np.ndarray, titles: np.ndarray) -> np.ndarray:
        """Return [R, count]: True for a title that the user has seen, or that is also further left in its row."""
        keys = users[:, None] * len(self.title) + titles
        seen = self.seen[np.minimum(np.searchsorted(self.seen, keys), len(self.seen) - 1)] == keys
        order = np.argsort(titles, axis=1, kind="stable")
        ranked = np.take_along_axis(titles, order, axis=1)
        repeated = np.zeros_like(seen)
        np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
        return seen | repeated


def drop_equal_titles(data: Sequences, targets: dict[str, np.ndarray], negatives: Negatives, positives: int) -> None:
    """Drop each target with two positives of equal titles, because no two candidates may have the same title."""
    for name, positions in targets.items():
        titles = np.sort(negatives.title[data.items[positions[:, None] - np.arange(positives)]], axis=1)
        distinct = (titles[:, 1:] != titles[:, :-1]).all(axis=1)
        targets[name] = positions[distinct]
        data.counts[f"{name}_rows_of_equal_titles"] = int((~distinct).sum())


AT_ONCE = 1 << 18  # number of examples that are drawn together; it limits the memory


def example_lines(data: Sequences, targets: np.ndarray, negatives: Negatives, options, rng) -> Iterator[str]:
    """Draw the candidates of each target and yield the JSON lines of a split.

    With several positives, the items directly before the target are candidates too, and the history ends before them.

    Args:
        targets: positions of the targets in data.items.
    """
    items = np.array([json.dumps(item, ensure_ascii=False) for item in data.item_ids], dtype=object)
    names = [json.dumps(user, ensure_ascii=False) for user in data.user_ids]
    for first in range(0, len(targets), AT_ONCE):
        positions = targets[first : first + AT_ONCE]
        users = np.searchsorted(data.start, positions, side="right") - 1
        drawn = negatives.draw(users, rng)
        positives = data.items[positions[:, None] - np.arange(options.positives)]
        candidates = rng.permuted(np.concatenate([positives, drawn], axis=1), axis=1)
        rejected = drawn[np.arange(len(positions)), rng.integers(negatives.count, size=len(positions))]
        ends = positions - options.positives + 1
        begins = np.maximum(data.start[users], ends - options.history)
        for n, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            yield (
                f'{{"user": {names[users[n]]}, "history": [{", ".join(items[data.items[begin:end]])}], '
                f'"target": {items[data.items[positions[n]]]}, "candidates": [{", ".join(items[candidates[n]])}], '
                f'"rejected": {items[rejected[n]]}}}'
            )
