"""Images of other items: who gets whose, and what a prompt then holds."""

import numpy as np
import pytest
from conftest import Opened

from hanorec.model.load import load_model
from hanorec.model.packing import PackedMLLM
from hanorec.ranking.shuffling import BLOCK, other_images
from hanorec.run.files import UserError


@pytest.mark.parametrize("seed", range(40))
def test_every_image_goes_to_another_item_of_like_popularity(seed):
    """Random popularity with many ties, and some items without an image."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 120))
    popularity = rng.integers(0, rng.integers(1, 60), count)
    images = [None if rng.random() < 0.3 and item > 1 else f"{item}.jpg" for item in range(count)]
    found = other_images(images, popularity, seed)
    assert found == other_images(images, popularity, seed)
    with_image = [item for item in range(count) if images[item]]
    assert sorted(found[item] for item in with_image) == with_image  # each image once
    for item in range(count):
        assert (found[item] != item) == (images[item] is not None)
    ordered = np.sort(popularity[with_image])
    for item in with_image:  # no more items are of a popularity between the two than a block holds
        low, high = sorted((popularity[item], popularity[found[item]]))
        between = np.searchsorted(ordered, high, "left") - np.searchsorted(ordered, low, "right")
        assert between <= 2 * BLOCK - 3
    if count > 20:
        assert found != other_images(images, popularity, seed + 1)


def test_one_image_cannot_be_shuffled():
    for images in ([None, "a.jpg", None], [None], []):
        with pytest.raises(UserError, match="--shuffle-images needs two items with an image, and the data has"):
            other_images(images, np.zeros(len(images)), 0)


@pytest.mark.parametrize("images", ["stored", "live"])
def test_the_prompt_holds_the_other_items_image(prepared, images):
    data, plain = Opened(prepared, images=images), Opened(prepared)
    order = other_images(data.items.images, np.zeros(len(data.items)), 0)
    data.tokens.give_images(order)
    example = data.examples("test", 1)[0]
    trees = [opened.prompts().evaluation_tree(example, "rank") for opened in (data, plain)]
    items = trees[0][0].images
    assert items == trees[1][0].images  # the items are the same, in the same order
    lengths = [plain.tokens.lengths[order[item]] for item in items]
    model = PackedMLLM(load_model(data.source))
    batch = model.collate(trees[:1], data.tokens)
    assert batch.input_ids.tolist().count(model.core.config.image_token_id) == sum(lengths)
    assert [grid.tolist() for grid in batch.grids] == [plain.tokens.grids[order[item]].tolist() for item in items]
    if images == "stored":
        expected = [token.tolist() for item in items for token in plain.tokens.of(order[item])]
        assert batch.image_tokens.tolist() == expected
    else:
        assert batch.sizes == [(data.items.ids[order[item]], size) for item, size in zip(items, lengths, strict=True)]
        live, _ = Opened(prepared, images="live").tokens.pixels([order[item] for item in items])
        assert (batch.pixels["pixel_values"] == live["pixel_values"]).all()
    assert (data.tokens.means() == plain.tokens.means()[order]).all()
