"""Cut the examples into slices by a property, such as the length of the history, and measure each slice."""

from collections.abc import Sequence

import numpy as np

from hanorec.data.folder import Example
from hanorec.ranking.markdown import short
from hanorec.ranking.metrics import Result, measure

Slicings = dict[str, dict[str, np.ndarray]]  # slicing -> slice -> mask [R] of its examples


def tertiles(values: np.ndarray) -> dict[str, np.ndarray]:
    """Cut examples into three slices of about equal size by a value. Equal values stay in one slice.

    The middle of a value's ranks decides its slice: below a third of the examples, above two thirds, or between.

    Args:
        values: [R].

    Returns a mask [R] for each slice, by its name and range. Many equal values make fewer slices: two are `low` and
    `high`, one is `all`.

    >>> {name: mask.tolist() for name, mask in tertiles(np.array([9, 1, 9, 9])).items()}
    {'low: 1': [False, True, False, False], 'high: 9': [True, False, True, True]}
    """
    ordered = np.sort(values)
    doubled_ranks = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    low, high = 3 * doubled_ranks < 2 * len(values), 3 * doubled_ranks > 4 * len(values)
    masks = [mask for mask in (low, ~low & ~high, high) if mask.any()]
    names = {1: ("all",), 2: ("low", "high"), 3: ("low", "middle", "high")}[len(masks)]
    text = str if np.issubdtype(values.dtype, np.integer) else short
    slices = {}
    for name, mask in zip(names, masks, strict=True):
        ends = dict.fromkeys([text(values[mask].min()), text(values[mask].max())])
        slices[f"{name}: {' to '.join(ends)}"] = mask
    return slices


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each row of `one`, [R, d], and `other`, [R, d] or [d]: [R]. It is 0 for a row of zeros."""
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(-1) / np.maximum(norms, 1e-12)


def make_slicings(
    examples: Sequence[Example], popularity: np.ndarray, text: np.ndarray, image: np.ndarray, fused: np.ndarray
) -> Slicings:
    """Return the slices of the examples.

    Args:
        popularity: [N], the number of training interactions of each item.
        text, image: [N, d], mean title embedding and mean image token; an item without an image has zeros.
        fused: [N, d], what `hanorec_loss.fuse_item_vectors` makes of both.
    """
    targets = np.array([example.target for example in examples])
    hardest = []
    for example in examples:
        negatives = [item for item in example.candidates if item != example.target]
        hardest.append(cosines(fused[negatives], fused[example.target]).max())
    has_image = np.abs(image[targets]).sum(1) > 0
    by_image = {"no image": ~has_image} if not has_image.all() else {}
    if has_image.any():
        for name, mask in tertiles(cosines(text[targets], image[targets])[has_image]).items():
            by_image[name] = np.zeros(len(examples), dtype=bool)
            by_image[name][has_image] = mask
    return {
        "length of the history": tertiles(np.array([len(example.history) for example in examples])),
        "popularity of the target": tertiles(popularity[targets]),
        "cosine of target and hardest negative": tertiles(np.array(hardest)),
        "cosine of the target's title and image": by_image,
    }


def measure_slices(
    scores: np.ndarray, yes_scores: np.ndarray | None, target: np.ndarray, slicings: Slicings, seed: int
) -> Result:
    """Compute the metrics of all examples and of each slice. For the arguments see `measure`."""
    result = measure(scores, yes_scores, target, seed)
    for slicing, slices in slicings.items():
        result.slices[slicing] = {}
        for name, mask in slices.items():
            own_yes_scores = None if yes_scores is None else yes_scores[mask]
            result.slices[slicing][name] = measure(scores[mask], own_yes_scores, target[mask], seed)
    return result
