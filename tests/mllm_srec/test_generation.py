# ruff: noqa: F401, F811 (the fixture `backbone` is imported)
"""Greedy generation from stored image tokens equals the model's own generation from pixels, for every family."""

import copy

import pytest
import tiny_backbones
import torch
import torch.nn.functional as F
from tiny_backbones import backbone
from transformers import GenerationConfig

from hanorec.model import families
from hanorec.model import prompts as prompt_trees
from hanorec.model.prompts import fit_to_length
from hanorec.model.trees import Node
from hanorec.run.files import UserError
from mllm_srec import writers

ITEMS = [[0], [1, 2], [4], [3], [0, 5, 1]]  # the items of each prompt; item 3 has no image


def prompt_of(backbone, items) -> Node:
    """A prompt with these items and their images."""
    prompts = backbone.prompts
    node = Node(None, [*prompts.template.head, *prompts.text("Describe these, and say what is alike in them:\n")])
    for item in items:
        prompts.add_item(node, item, image=True)
    node.ids += prompts.template.tail
    return node


def own_inputs(backbone, node, ids) -> dict:
    """The arguments of the model's own forward, with pixels.

    Args:
        ids: [1, T], the tokens of the prompt and those after it.
    """
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kinds = (ids == backbone.packed.core.config.image_token_id).int()
    if node.images:
        images = [backbone.images[item] for item in node.images]
        inputs |= tiny_backbones.processor_inputs(backbone.family, backbone.processor, images)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = kinds
    if backbone.family == "gemma3":
        inputs["token_type_ids"] = kinds
    return inputs


@pytest.fixture
def write(backbone, monkeypatch):
    """A function that makes a writers.Local with given stop tokens.

    The model has generation settings that would change every text if Local used them.
    """
    core = backbone.packed.core
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 3, "eos_token_id": 7}
    monkeypatch.setattr(core, "generation_config", GenerationConfig(**settings, suppress_tokens=list(range(200))))

    def make(max_tokens, stop=()):
        local = writers.Local(core, backbone.prompts, backbone.tokens, max_tokens, len(ITEMS))
        core.generation_config.eos_token_id = list(stop)
        return local

    return make


@pytest.mark.parametrize("backbone", ["qwen2_5_vl"], indirect=True)
def test_stop_tokens_come_from_the_template_and_the_model(backbone, write):
    core, end_of_turn = backbone.packed.core, backbone.prompts.template.end_of_turn
    for eos, expected in ((7, [7]), ([9, 7], [7, 9]), (None, [])):
        core.generation_config.eos_token_id = eos
        writers.Local(core, backbone.prompts, backbone.tokens, 12, 5)
        assert core.generation_config.eos_token_id == sorted([*expected, end_of_turn])


def test_a_batch_equals_the_models_own_generation(backbone, write):
    """The texts are equal even if they end after different numbers of tokens."""
    core, nodes, expected = backbone.packed.core, [prompt_of(backbone, items) for items in ITEMS], []
    for node in nodes:
        inputs = own_inputs(backbone, node, torch.tensor([node.ids]))
        core.generation_config = GenerationConfig(max_new_tokens=12, pad_token_id=0)
        ids = core.generate(**inputs)
        expected.append(ids[0, len(node.ids) :].tolist())
    assert write(12).generate(nodes) == [(text, False) for text in expected]
    stop = [expected[0][5], expected[1][2]]
    for (text, ended), whole in zip(write(12, stop).generate(nodes), expected, strict=True):
        length = next((number for number, token in enumerate(whole) if token in stop), 12)
        assert (text, ended) == (whole[:length], length < 12)


def test_a_live_picture_of_another_size_is_refused(backbone, write, monkeypatch):
    """Without this error, some of its tokens would be used for the next picture."""
    node, tokens = prompt_of(backbone, [0, 4]), backbone.tokens
    first, last = (tokens.lengths[item] for item in node.images)
    monkeypatch.setattr(type(tokens), "live", property(lambda self: True, lambda self, value: None), raising=False)
    sizes = [(tokens.ids[item], tokens.lengths[item]) for item in node.images]
    monkeypatch.setattr(tokens, "pixels", lambda items: ({}, sizes))
    width = backbone.packed.core.config.get_text_config().hidden_size
    images = [torch.zeros(first + 1, width), torch.zeros(last - 1, width)]
    monkeypatch.setattr(families, "image_tokens", lambda core, pixels: images)
    with pytest.raises(UserError, match=f"image of item {tokens.ids[node.images[0]]} has changed since"):
        write(12).inputs([node])


def test_every_step_equals_the_models_own_forward(backbone, write):
    """Compare the logits after each of some given tokens. Two texts end early.

    The tokens are given because an untrained model would repeat a few tokens.
    """
    core, nodes = backbone.packed.core, [prompt_of(backbone, items) for items in ITEMS]
    if backbone.family in tiny_backbones.WINDOWS:
        assert min(len(node.ids) for node in nodes) > tiny_backbones.WINDOWS[backbone.family]
    given = torch.randint(20, 250, (len(nodes), 6), generator=torch.Generator().manual_seed(0))
    forced, stop, longest = F.pad(given, (0, 1)), 10, max(len(node.ids) for node in nodes)
    forced[[1, 4], 2] = stop

    def force(ids, scores):
        return F.one_hot(forced[:, ids.shape[1] - longest], scores.shape[1]).float()

    inputs = write(7, [stop]).inputs(nodes)
    core.generation_config.update(output_logits=True, return_dict_in_generate=True)
    steps = core.generate(**inputs, generation_config=core.generation_config, logits_processor=[force]).logits
    rows = list(range(len(nodes)))
    with torch.no_grad():
        for length, logits in enumerate(steps):
            for row in rows:
                ids = torch.tensor([[*nodes[row].ids, *given[row, :length].tolist()]])
                expected = core(**own_inputs(backbone, nodes[row], ids)).logits[0, -1]
                torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)
            if length == 2:
                rows = [0, 2, 3]
    assert len(steps) == 7 and given.unique().numel() > 20


def test_live_pictures_give_the_texts_of_the_stored_ones(backbone, write):
    nodes = [prompt_of(backbone, items) for items in ITEMS]
    stored, live = write(12), write(12)
    live.tokens = copy.copy(backbone.tokens)
    live.tokens.live = (backbone.folder, backbone.processor)
    live.tokens.paths = [f"{item}.png" for item in range(len(backbone.images))]
    assert live.generate(nodes) == stored.generate(nodes)
