"""Order the interactions, split them, and choose the targets and candidates of the examples.

Users and items are numbers in this module. The data are in arrays, so that millions of interactions take seconds.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hanorec.data.histories import history_lines
from hanorec.data.readers import Raw
from hanorec.run.files import UserError


@dataclass
class Sequences:
    """The items of all users in order of time. The items of user u are items[start[u]:start[u + 1]].

    Args:
        user_ids: [U].
        item_ids, titles, images: [N], by item index.
        items: [M] item indices, user by user.
        places: [M], the place of each interaction among all interactions of the source by user and time.
        start: [U + 1], position of each user's first item in `items`.
        title_codes: [N], a number for each item's title; equal titles have the same number.
        touched: [P, 3], a row (user, code of the title, place) for each title that a kept user touched with any rating,
            also one below --min-rating. Only titles of kept items count. Sorted by user and title.
        counts: numbers of interactions, users and items that were read, dropped and kept, for the manifest.
        split: [U], train, val or test, or empty if the source has no split of its own.
        labels: [N, L], the labels of each item (see Raw.labels); L is 0 if the source has none.
        histories: the lines of histories.jsonl (see `history_lines`).
    """

    user_ids: list[str]
    item_ids: list[str]
    titles: list[str]
    images: list[Path | None]
    items: np.ndarray
    places: np.ndarray
    start: np.ndarray
    title_codes: np.ndarray
    touched: np.ndarray
    counts: dict[str, int]
    split: np.ndarray
    labels: np.ndarray
    histories: Iterator[dict]


def build_sequences(raw: Raw, options: argparse.Namespace) -> Sequences:
    """Filter and order the interactions, and number the users and items that remain."""
    order = time_order(raw, options)
    users, items, places, times, counts, counted = kept_interactions(raw, order, options)
    tied = (users[1:] == users[:-1]) & (times[1:] == times[:-1]) & raw.interactions.timed
    counts["interactions_tied_in_time"] = int((np.append(tied, False) | np.append(False, tied)).sum())

    user_codes, lengths = np.unique(users, return_counts=True)
    index_of, item_ids = number_items(raw, np.unique(items), options.keep_untouched)
    all_users = list(raw.interactions.user_codes)
    user_ids = [all_users[code] for code in user_codes]
    images = [raw.images.get(item) for item in item_ids]
    if options.images and not any(images):
        raise UserError(f"--images {options.images} has no picture of an item; name them like {item_ids[0]}.jpg")
    titles = [raw.titles[item] for item in item_ids]
    title_codes = np.unique(np.array(titles), return_inverse=True)[1]
    counts |= {
        "users": len(user_ids),
        "items": len(item_ids),
        "interactions": len(users),
        "items_untouched": len(item_ids) - len(np.unique(items)),
        "items_left_out": len(raw.titles) - len(item_ids),
        "items_without_image": images.count(None),
        "images_that_are_links": sum(path is not None and path.is_symlink() for path in images),
    }
    return Sequences(
        user_ids=user_ids,
        item_ids=item_ids,
        titles=titles,
        images=images,
        items=index_of[items],
        places=places,
        start=np.append(0, lengths.cumsum()),
        title_codes=title_codes,
        touched=touched_titles(raw, order, user_codes, np.where(index_of < 0, -1, title_codes[index_of]), places),
        counts=counts,
        split=np.array([raw.split.get(user, "") for user in user_ids]),
        labels=item_labels(raw, item_ids),
        histories=history_lines(raw, order, counted, index_of, item_ids),
    )


def time_order(raw: Raw, options: argparse.Namespace) -> np.ndarray:
    """Return the order of the interactions by user and time: [M] positions in the input.

    Equal times of a user are shuffled by --seed, or keep the input order with --ties input. A source without times
    keeps the input order.
    """
    users, _, times, _ = raw.columns
    if options.ties == "input" or not raw.interactions.timed:
        return np.lexsort((times, users))  # stable
    shuffled = np.random.default_rng([options.seed, 4]).permutation(len(users))
    return np.lexsort((shuffled, times, users))


def kept_interactions(raw: Raw, order: np.ndarray, options: argparse.Namespace):
    """Drop interactions with a low rating or an empty title, repeated items of a user, and users with few items.

    An item repeats another if their titles are equal, because a prompt shows only the title. So a target's title is
    never in its own history, except with --repeats all. It is recognisable there, since no negative has a title of the
    history.

    Args:
        order: the order of all interactions by user and time: [M].

    Returns (users, items, places in `order`, times, counts, places of all interactions that count, also those of users
    with few items).
    """
    users, items, times, ratings = (column[order] for column in raw.columns)
    if options.min_rating is not None and not raw.interactions.rated:
        raise UserError("the source has no ratings; do not give --min-rating")
    rated = ratings >= (-np.inf if options.min_rating is None else options.min_rating)
    # Stands for the title of an unlisted item: "" drops it here; otherwise number_items raises an error for it
    unlisted = "" if options.drop_untitled else "unlisted"
    untitled = np.array([not raw.titles.get(item, unlisted) for item in raw.interactions.item_codes])
    places = np.flatnonzero(rated & ~untitled[items])
    codes: dict[str | tuple[str, str], int] = {}  # by title; by ("id", item) for an item without one
    names = (raw.titles.get(item) or ("id", item) for item in raw.interactions.item_codes)
    title_of = np.array([codes.setdefault(name, len(codes)) for name in names])
    keys = users[places] * len(codes) + title_of[items[places]]
    counted = places[unrepeated(keys, options.repeats)]
    long_enough = np.bincount(users[counted], minlength=len(raw.interactions.user_codes)) >= options.min_interactions
    counts = {
        "interactions_read": len(users),
        "below_min_rating": int((~rated).sum()),
        "of_untitled_items": int((rated & untitled[items]).sum()),
        "repeated_items_dropped": len(places) - len(counted),
        "users_too_short": int((~long_enough).sum()),
    }
    kept = counted[long_enough[users[counted]]]
    if not len(kept):
        dropped = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items() if value)
        remedy = "lower --min-interactions" + (" or --min-rating" if options.min_rating is not None else "")
        raise UserError(f"no user has {options.min_interactions} interactions ({dropped}); {remedy}")
    return users[kept], items[kept], kept, times[kept], counts, counted


def unrepeated(keys: np.ndarray, repeats: str) -> np.ndarray:
    """Return the positions of the keys that count, ascending. repeats: the value of --repeats.

    >>> unrepeated(np.array([5, 7, 5]), "first"), unrepeated(np.array([5, 7, 5]), "last")
    (array([0, 1]), array([1, 2]))
    """
    if repeats == "all":
        return np.arange(len(keys))
    if repeats == "first":
        return np.sort(np.unique(keys, return_index=True)[1])
    return np.sort(len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1])


def number_items(raw: Raw, codes: np.ndarray, untouched: bool) -> tuple[np.ndarray, list[str]]:
    """Number the items in the order of the source's titles.

    Args:
        codes: of the items that the kept users touched.
        untouched: number all other items with a title too.

    Returns (item index of every code in the source, -1 for a code without a number; item ids by item index).
    """
    item_ids = list(raw.interactions.item_codes)
    untitled = [item_ids[code] for code in codes if item_ids[code] not in raw.titles]
    if untitled:
        fault = f"{len(untitled)} items have interactions but no title, the first is {untitled[0]}"
        raise UserError(f"{fault}; add their titles, or drop their interactions with --drop-untitled")
    kept = {item_ids[code] for code in codes}
    numbered = [item for item, title in raw.titles.items() if item in kept or (untouched and title)]
    number_of = {item: number for number, item in enumerate(numbered)}
    return np.array([number_of.get(item, -1) for item in item_ids]), numbered


def item_labels(raw: Raw, item_ids: list[str]) -> np.ndarray:
    """Return Sequences.labels: [N, L]. Raise ValueError if the reader gave some items fewer labels than others."""
    labels = [raw.labels.get(item, ()) for item in item_ids]
    if len(set(map(len, labels))) > 1:
        raise ValueError("every item needs the same number of labels")
    return np.array(labels)


def touched_titles(raw: Raw, order: np.ndarray, user_codes: np.ndarray, title_of: np.ndarray, kept: np.ndarray):
    """Return Sequences.touched: [P, 3].

    The place of a title is that of the user's kept interaction with it, even if the user gave it a low rating before.
    Otherwise training negatives would leave it out before it is a target, and so reveal it.

    Args:
        order: [M], positions of all interactions in the input, by user and time.
        user_codes: [U], codes of the kept users.
        title_of: code of the title for each item code; -1: the item is not kept.
        kept: places of the kept interactions.
    """
    users, items, _, _ = (column[order] for column in raw.columns)
    number_of = np.full(len(raw.interactions.user_codes), -1)
    number_of[user_codes] = np.arange(len(user_codes))
    places = np.flatnonzero((number_of[users] >= 0) & (title_of[items] >= 0))
    users, titles = number_of[users[places]], title_of[items[places]]
    by_title = np.lexsort((places, ~np.isin(places, kept), titles, users))  # within a title the kept interaction first
    keys = users[by_title] * (titles.max() + 1) + titles[by_title]
    first = by_title[np.unique(keys, return_index=True)[1]]
    return np.stack([users, titles, places], axis=1)[first]


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def items_before(options: argparse.Namespace) -> int:
    """Return how many items of a user must come before a target. With several positives they fill the history."""
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

    Returns (positions in data.items of the targets of each split; [U], number of each user's items that belong to
    training, counted from the first).
    """
    length, end = np.diff(data.start), data.start[1:]
    training = length.copy()
    if options.split == "leave-one-out":
        training -= 2
        targets = {"val": end - 2, "test": end - 1}
    else:
        split = data.split
        if options.split == "user":
            shuffled = np.random.default_rng([options.seed, 3]).permutation(len(length))
            tenth = max(1, len(length) // 10)
            split = np.full(len(length), "train")
            split[shuffled[:tenth]] = "val"
            split[shuffled[tenth : 2 * tenth]] = "test"
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


# ---------------------------------------------------------------------------------------------------------------------
# Examples


AT_ONCE = 1 << 18  # number of examples that are drawn together; it limits the memory


def example_lines(data: Sequences, split: str, targets: np.ndarray, negatives, options, rng) -> Iterator[str]:
    """Draw the candidates of each target and yield the JSON lines of a split.

    With several positives, the items directly before the target are candidates too, and the history ends before them.

    Args:
        targets: positions of the targets in data.items.
        negatives: a Negatives.
    """
    items = np.array([json.dumps(item, ensure_ascii=False) for item in data.item_ids], dtype=object)
    names = [json.dumps(user, ensure_ascii=False) for user in data.user_ids]
    for first in range(0, len(targets), AT_ONCE):
        positions = targets[first : first + AT_ONCE]
        users = np.searchsorted(data.start, positions, side="right") - 1
        drawn = negatives.draw(split, positions, users, rng)
        positives = data.items[positions[:, None] - np.arange(options.positives)]
        candidates = rng.permuted(np.concatenate([positives, drawn], axis=1), axis=1)
        rejected = drawn[np.arange(len(positions)), rng.integers(drawn.shape[1], size=len(positions))]
        ends = positions - options.positives + 1
        begins = np.maximum(data.start[users], ends - options.history)
        for n, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            yield (
                f'{{"user": {names[users[n]]}, "history": [{", ".join(items[data.items[begin:end]])}], '
                f'"target": {items[data.items[positions[n]]]}, "candidates": [{", ".join(items[candidates[n]])}], '
                f'"rejected": {items[rejected[n]]}}}'
            )
