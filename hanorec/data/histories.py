"""The whole history of every user of the raw data, for recommendations after the last interaction."""

from collections.abc import Iterator

import numpy as np

from hanorec.data.readers import Raw


def history_lines(
    raw: Raw, order: np.ndarray, counted: np.ndarray, index_of: np.ndarray, item_ids: list[str]
) -> Iterator[dict]:
    """Yield the lines of histories.jsonl: one for each user who has an item of items.jsonl.

    Unlike the examples, a history has the test target, and users with few interactions have one too. `others` are the
    items that the user touched otherwise: with a low rating, or with the title of an item of the history.

    Args:
        order: the order of all interactions by user and time: [M].
        counted: the places in `order` of the interactions that count, with those of users who have few of them.
        index_of: the item index of each item code, -1 for an item that is not in items.jsonl.
        item_ids: by item index.
    """
    users, items = raw.columns[0][order], index_of[raw.columns[1][order]]
    counted, touched = counted[items[counted] >= 0], np.flatnonzero(items >= 0)
    names = list(raw.interactions.user_codes)
    each_user = np.arange(len(names) + 1)
    ends, touched_ends = np.searchsorted(users[counted], each_user), np.searchsorted(users[touched], each_user)
    for code, user in enumerate(names):
        history = items[counted[ends[code] : ends[code + 1]]].tolist()
        all_touched = items[touched[touched_ends[code] : touched_ends[code + 1]]]
        if history:
            others = [] if len(history) == len(all_touched) else sorted({*all_touched.tolist()} - {*history})
            yield {
                "user": user,
                "items": [item_ids[item] for item in history],
                "others": [item_ids[item] for item in others],
            }
