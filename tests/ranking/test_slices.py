"""Slices of the examples: a partition, and the numbers of each against hand-made ones."""

import numpy as np
import pytest
import torch

from hanorec.data.folder import Example
from hanorec.ranking import markdown, metrics, slices
from hanorec_loss import fuse_item_vectors

ITEMS, EXAMPLES = 30, 50


def made(seed=0):
    """Random examples and vectors; a third of the items has no image."""
    rng = np.random.default_rng(seed)
    text, image = rng.normal(size=(2, ITEMS, 4))
    image[::3] = 0
    fused = fuse_item_vectors(torch.tensor(text), torch.tensor(image)).numpy()
    popularity = rng.integers(0, 9, ITEMS)
    examples = []
    for user in range(EXAMPLES):
        items = rng.permutation(ITEMS).tolist()
        length = int(rng.integers(1, 8))
        examples.append(Example(str(user), items[:length], items[9], items[8:13], items[8]))
    return examples, popularity, text, image, fused


def test_slices_partition_the_examples():
    examples, popularity, text, image, fused = made()
    found = slices.make_slicings(examples, popularity, text, image, fused)
    assert len(found) == 4
    for name, parts in found.items():
        assert (sum(mask.astype(int) for mask in parts.values()) == 1).all(), name
    *three, agreement = found.values()
    for parts in three:
        assert [part.split(":")[0] for part in parts] == ["low", "middle", "high"]
    assert [part.split(":")[0] for part in agreement] == ["no image", "low", "middle", "high"]
    assert agreement["no image"].tolist() == [example.target % 3 == 0 for example in examples]

    def cosine(one, other):
        return one @ other / max((one @ one * (other @ other)) ** 0.5, 1e-9)

    def values(example):
        target = example.target
        negatives = [cosine(fused[item], fused[target]) for item in example.candidates if item != target]
        return len(example.history), popularity[target], max(negatives), cosine(text[target], image[target])

    for column, parts in enumerate(found.values()):
        edges = -np.inf
        for name, mask in parts.items():
            if name != "no image":  # a slice is above the one before it, and has the ends that its name says
                own = [values(example)[column] for example, inside in zip(examples, mask, strict=True) if inside]
                ends = name.split(": ")[1].split(" to ")
                assert [float(ends[0]), float(ends[-1])] == pytest.approx([min(own), max(own)], abs=5e-4)
                assert min(own) > edges
                edges = max(own)


@pytest.mark.parametrize("values", [[3], [2, 2, 2, 2], [1, 2], [1, 1, 1, 1, 9], [9, 1, 9, 9, 9], [0.5, 0.5001, 0.5002]])
def test_tertiles_of_few_or_equal_values(values):
    """A partition that treats low and high values alike: the negative values are cut at the same places."""
    parts = slices.tertiles(np.array(values))
    assert (sum(mask.astype(int) for mask in parts.values()) == 1).all()
    assert len(set(values)) >= len(parts)
    names = {1: ["all"], 2: ["low", "high"], 3: ["low", "middle", "high"]}
    assert [part.split(":")[0] for part in parts] == names[len(parts)]
    mirrored = slices.tertiles(-np.array(values))
    assert [mask.tolist() for mask in mirrored.values()] == [mask.tolist() for mask in parts.values()][::-1]


def test_tertiles_of_many_equal_values_are_two():
    for values in ([1, 1, 1, 1, 9], [9, 1, 9, 9, 9]):
        assert len(slices.tertiles(np.array(values))) == 2
    sizes = [mask.sum() for mask in slices.tertiles(np.arange(30)).values()]
    assert sizes == [10, 10, 10]


def test_the_mean_of_the_slices_is_the_whole():
    examples, *vectors = made()
    slicings = slices.make_slicings(examples, *vectors)
    rng = np.random.default_rng(1)
    scores, target = rng.random((EXAMPLES, 5)), np.ones(EXAMPLES, dtype=int)
    result = slices.measure_slices(scores, scores, target, slicings, 0)
    for parts in result.slices.values():
        assert sum(part.examples for part in parts.values()) == EXAMPLES
        for name in ("HR@3", "NDCG@3", "MRR", "GAUC"):
            mean = sum(part.examples * part.values[name] for part in parts.values()) / EXAMPLES
            assert mean == pytest.approx(result.values[name])
    name, mask = next(iter(slicings["popularity of the target"].items()))
    part = result.slices["popularity of the target"][name]
    alone = metrics.measure(scores[mask], scores[mask], target[mask])
    assert part.values == alone.values and part.interval("AUC") == alone.interval("AUC")

    # Differences and pooled results have the same slices
    other = slices.measure_slices(rng.random((EXAMPLES, 5)), scores, target, slicings, 0)
    pooled = metrics.pool([result.minus(other), other.minus(other)])
    difference = pooled.slices["popularity of the target"][name]
    expected = part.values["MRR"] - other.slices["popularity of the target"][name].values["MRR"]
    assert difference.values["MRR"] == pytest.approx(expected / 2) and difference.sd["MRR"] > 0
    tables = markdown.tables({"a run": result}).split("\n\n")
    assert len(tables) == 2 + 4 and tables[3].splitlines()[2].split("|")[1:4] == [
        " a run ",
        f" {name} ".center(26),
        f"{part.examples:^10}",
    ]
    assert set(result.summary()["slices"]) == set(slicings)
