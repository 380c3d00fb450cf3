# ruff: noqa: F401, F811 (the fixture `backbone` is imported)
"""A batch holds what the forward needs, and lies in pinned memory where there is a GPU."""

import itertools

import pytest
import torch
from tiny_backbones import backbone

from hanorec.data.folder import Example
from hanorec.model import families
from hanorec.model.batch import Batch
from hanorec.model.packing import PackedMLLM
from hanorec.model.pairs import Pairs, pools

EXAMPLE = Example("a", [0, 1, 3, 4], 5, [2, 5, 0, 1, 3, 4], 2)


def some_trees(backbone):
    prompts = backbone.prompts
    trees = [prompts.pair_tree(EXAMPLE, "rank"), prompts.pair_tree(EXAMPLE, "yes"), prompts.pair_tree(EXAMPLE, "no")]
    return [*trees, prompts.language_tree([0, 1, 3], 4096), prompts.evaluation_tree(EXAMPLE, "yesno")]


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("pack", [True, False])
def test_each_scored_token_is_predicted_by_the_token_before_it_on_its_path(backbone, pack):
    batch = PackedMLLM(backbone.packed.core, pack).collate(some_trees(backbone), backbone.tokens)
    predicted_from = batch.predicting[batch.predicted_by].tolist()
    assert batch.predicting.tolist() == sorted(set(predicted_from))
    depth, node, visible = batch.depth.tolist(), batch.node.tolist(), batch.visible.tolist()
    numbers = range(len(predicted_from))
    bounds = list(itertools.accumulate((length for _, length in batch.segments), initial=0))
    counts, images = [], []
    for start, end in itertools.pairwise(bounds):
        inside = [number for number in numbers if start <= predicted_from[number] < end]
        first = min(predicted_from[number] for number in inside)
        counts.append((len(inside), end - first))
        tokens = batch.input_ids[start:end] == backbone.packed.core.config.image_token_id
        images.append(int(tokens.sum()))
    assert batch.scored == counts and [count for _, count in batch.images] == images
    assert sum(count for count, _ in batch.images) == len(batch.grids)
    for number in numbers:  # the scored token: of this id, one step deeper, in the same node or in a child
        source = predicted_from[number]
        found = [
            index
            for index in range(len(depth))
            if depth[index] == depth[source] + 1 and visible[node[index]][node[source]]
        ]
        assert int(batch.target[number]) in [int(batch.input_ids[index]) for index in found]


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
def test_a_batch_is_pinned_where_there_is_a_gpu(backbone, monkeypatch):
    """Copies from other memory make the host wait, whatever non_blocking says."""
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append(tensor) or tensor)
    backbone.packed.collate(some_trees(backbone), backbone.tokens)
    assert not seen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    batch = backbone.packed.collate(some_trees(backbone), backbone.tokens)
    tensors = [tensor for tensor in vars(batch).values() if torch.is_tensor(tensor)]
    assert len(tensors) > 8 and {id(tensor) for tensor in tensors} == {id(tensor) for tensor in seen}
    pixels = torch.zeros(2)
    Batch(**vars(batch) | {"pixels": {"pixel_values": pixels}}).pinned()
    assert any(tensor is pixels for tensor in seen)


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
def test_a_batch_of_pairs_is_pinned_where_there_is_a_gpu(backbone, monkeypatch):
    example = Example("user", [0, 1], 2, [2, 4, 5], 4)
    pairs = Pairs(backbone.prompts, [example], ("rank", "yes"), 4096, pools([example], 2, "data"))
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: seen.append(tensor) or tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    batch = pairs.batch([0, 1], backbone.packed, backbone.tokens, torch.zeros(2, 3), torch.ones(2, 2))
    tensors = [*batch.places, batch.lengths, batch.reference, batch.hardness, batch.trees.target]
    assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in seen}


@pytest.mark.parametrize("backbone", ["qwen3_vl"], indirect=True)
def test_deep_features_without_a_mask_index_are_transformers_own(backbone):
    decoder = backbone.packed.core.get_decoder()
    assert decoder._deepstack_process is families.add_deep_features
    generator = torch.Generator().manual_seed(0)
    hidden, features = (torch.randn(shape, generator=generator) for shape in ((1, 9, 32), (4, 32)))
    is_image = torch.tensor([[False, True, True, False, False, True, False, True, False]])
    expected = type(decoder)._deepstack_process(decoder, hidden, is_image, features)
    assert families.add_deep_features(hidden, is_image, features).equal(expected)
    assert not expected.equal(hidden)
