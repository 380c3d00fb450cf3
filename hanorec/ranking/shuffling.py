"""Give each item another item's image, to measure how much a model uses images."""

from collections.abc import Sequence

import numpy as np

from hanorec.run.files import UserError

BLOCK = 10  # a block has BLOCK to 2 * BLOCK - 1 items of like popularity, or all items if they are fewer


def other_images(images: Sequence[str | None], popularity: np.ndarray, seed: int) -> list[int]:
    """Return for each item the item whose image it gets: another one of like popularity; itself if it has no image.

    The items with an image are sorted by popularity, with ties in random order, and cut into blocks. In each block the
    images move on by one in a random circle. So every image is used once, and no item keeps its own.

    Args:
        images: the image of each item; an item without one (None) stays without.
        popularity: [N], the number of training interactions.
        seed: of the order.

    Raises:
        UserError: fewer than two items have an image.
    """
    with_image = np.array([item for item, image in enumerate(images) if image is not None], dtype=int)
    if len(with_image) < 2:
        raise UserError(f"--shuffle-images needs two items with an image, and the data has {len(with_image)}")
    rng = np.random.default_rng(seed)
    with_image = rng.permutation(with_image)
    by_popularity = with_image[np.argsort(popularity[with_image], kind="stable")]
    image_of = np.arange(len(images))
    for block in np.array_split(by_popularity, max(1, len(by_popularity) // BLOCK)):
        circle = rng.permutation(block)
        image_of[circle] = np.roll(circle, 1)
    return image_of.tolist()
