# ruff: noqa: F401, F811 (the fixture `backbone` is imported)
"""Greedy generation on stored image tokens against the model's own `generate` on pixels, on every family."""

import pytest
import tiny_backbones
import torch
from tiny_backbones import backbone

from hanorec.model import backbones, mllm
from hanorec.model import prompts as prompt_trees
from mllm_srec import generation

ITEMS = [[0], [1, 2], [4], [3], [0, 5, 1]]  # of each prompt: one image, two items of which one without, none, ...


def prompt_of(backbone, items) -> prompt_trees.Node:
    prompts = backbone.prompts
    node = prompt_trees.Node(None, [*prompts.before, *prompts.text("Describe these, and say what is alike in them:\n")])
    for item in items:
        prompts.item(node, item, image=True)
    node.ids += prompts.after
    return node


def own_inputs(backbone, node, ids) -> dict:
    """What the model's own forward takes for a prompt and what was added to it, pixels and all."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = (ids == backbone.packed.core.config.image_token_id).int()
    if node.images:
        images = [backbone.images[row] for row in node.images]
        inputs |= tiny_backbones.processor_inputs(backbone.family, backbone.processor, images)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = kinds
    if backbone.family == "gemma3":
        inputs["token_type_ids"] = kinds
    return inputs


def test_a_batch_equals_the_models_own_generation(backbone):
    """Also where texts end at different times, and leave the batch."""
    core, nodes, expected = backbone.packed.core, [prompt_of(backbone, items) for items in ITEMS], []
    for node in nodes:
        inputs = own_inputs(backbone, node, torch.tensor([node.ids]))
        ids = core.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(ids[0, len(node.ids) :].tolist())
    assert generation.generate(core, nodes, backbone.catalogue, [], 12) == [(text, False) for text in expected]
    stop = [expected[0][5], expected[1][2]]
    found = generation.generate(core, nodes, backbone.catalogue, stop, 12)
    for (text, ended), whole in zip(found, expected, strict=True):
        at = next((place for place, token in enumerate(whole) if token in stop), 12)
        assert (text, ended) == (whole[:at], at < 12)


def test_a_live_picture_of_another_size_is_refused(backbone, monkeypatch):
    """It would move into the next one's place."""
    node, catalogue = prompt_of(backbone, [0, 4]), backbone.catalogue
    first, last = (catalogue.image_length(item) for item in node.images)
    monkeypatch.setattr(type(catalogue), "live", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr(catalogue, "pixels", lambda items: {})
    width = backbone.packed.core.config.get_text_config().hidden_size
    images = [torch.zeros(first + 1, width), torch.zeros(last - 1, width)]
    monkeypatch.setattr(backbones, "image_tokens", lambda core, pixels: images)
    with pytest.raises(mllm.BackboneError, match=f"image of item {catalogue.ids[node.images[0]]} is another than when"):
        generation.Steps(backbone.packed.core, [node], catalogue).images()


def test_every_step_equals_the_models_own_forward(backbone):
    """The logits behind given tokens, rows leaving on the way; an untrained model's own texts tell little."""
    core, nodes = backbone.packed.core, [prompt_of(backbone, items) for items in ITEMS]
    if backbone.family in tiny_backbones.WINDOWS:
        assert min(len(node.ids) for node in nodes) > tiny_backbones.WINDOWS[backbone.family]
    given = torch.randint(20, 250, (len(nodes), 6), generator=torch.Generator().manual_seed(0))
    steps, rows = generation.Steps(core, nodes, backbone.catalogue), list(range(len(nodes)))
    with torch.no_grad():
        found = steps.prefill()
        for length in range(given.shape[1] + 1):
            for row, logits in zip(rows, found, strict=True):
                ids = torch.tensor([[*nodes[row].ids, *given[row, :length].tolist()]])
                own = core(**own_inputs(backbone, nodes[row], ids)).logits[0, -1]
                torch.testing.assert_close(logits, own, atol=2e-4, rtol=1e-4)
            if length == 2:
                rows = [0, 2, 3]
                steps.select(torch.tensor(rows))
            if length < given.shape[1]:
                found = steps.step(given[rows, length])
    assert given.unique().numel() > 20
