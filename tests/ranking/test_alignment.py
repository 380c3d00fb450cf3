"""Alignment of titles and images: hidden states against the model's own forward, and the statistics by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Opened

from hanorec.data.demo import GENRES, KINDS, MISLEADING, item_id, make_world
from hanorec.data.folder import DataFolder, Example
from hanorec.model import families
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM
from hanorec.ranking import alignment


def last_hidden_states(model, tokens, item, ids):
    """The last hidden states [T, d] of a prompt with one image, by the model's own forward."""
    states = []
    hook = model.get_decoder().register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state[0]))
    outputs = families.encoder_outputs(model, tokens.of(item), tokens.grids[[item]])
    with torch.no_grad():
        families.own_logits(model, torch.tensor([ids]), outputs, keep=1)
    hook.remove()
    return states[0]


@pytest.mark.parametrize("pack", [True, False])
def test_alignments_are_those_of_the_models_own_hidden_states(prepared, sft_run, pack):
    """One item at a time, by the model's own forward with all hidden states."""
    opened = Opened(prepared)
    model, prompts = load_finished(sft_run, opened.encoding), opened.prompts()
    found = alignment.alignments(
        PackedMLLM(load_finished(sft_run, opened.encoding), pack), prompts, opened.tokens, "cpu"
    )
    with_image = [item for item, length in enumerate(opened.tokens.lengths) if length]
    assert np.isnan(found).sum() == len(found) - len(with_image) > 0
    for item in with_image[:: max(1, len(with_image) // 8)]:
        root, title, image = alignment.item_prompt(prompts, item)
        assert prompts.readable([root.ids[offset] for offset in title]).strip() == opened.items.titles[item]
        assert len(image) == opened.tokens.lengths[item]
        hidden = last_hidden_states(model, opened.tokens, item, root.ids)
        expected = torch.cosine_similarity(hidden[title].mean(0), hidden[image].mean(0), dim=0)
        assert found[item] == pytest.approx(float(expected), abs=1e-4)


def test_slope_and_thirds_by_hand():
    start = np.linspace(0.1, 0.9, 90)
    end = start + 0.5 * start - 0.3  # the weak lose, the strong gain
    found = alignment.changes(np.append(start, np.nan), np.append(end, np.nan))
    assert found.slope == pytest.approx(0.5) and found.interval == pytest.approx([0.5, 0.5])
    assert found.thirds["lowest"] == pytest.approx((0.5 * start - 0.3)[:30].mean())
    assert found.thirds["highest"] == pytest.approx((0.5 * start - 0.3)[60:].mean())
    assert found.mean == pytest.approx(end.mean()) and found.change == pytest.approx((end - start).mean())


def test_the_slopes_interval_covers_the_slope_and_zero_where_there_is_none():
    rng = np.random.default_rng(0)
    start = rng.random(300)
    for slope in (0.0, -0.4):
        low, high = alignment.changes(start, start + slope * start + rng.normal(0, 0.1, 300)).interval
        assert low < slope < high and high - low < 0.1


def test_targets_by_third():
    examples = [Example("u", [0], target, [target, 9], 9) for target in range(9)]
    start = np.append(np.arange(9) / 10, np.nan)
    scores = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 6)
    found = alignment.by_alignment(scores, None, examples, start)
    assert {name: result.values["HR@1"] for name, result in found.items()} == {"lowest": 1, "middle": 0, "highest": 0}
    assert sum(result.examples for result in found.values()) == 9


def test_ranks_share_ties():
    assert alignment.ranks(np.array([[3.0, 1.0, 3.0, 0.0]])).tolist() == [[0.5, 2, 0.5, 3]]


def test_who_follows_the_poster():
    """Item 1 is misleading: the ceiling ranks it first, the ceiling of titles last."""
    examples = [Example("u", [0], 1, [1, 2, 3], 2)] * 4
    ceiling, titles = np.array([[3.0, 2, 1]] * 4), np.array([[1.0, 3, 2]] * 4)
    scores = np.array([[9.0, 1, 0], [0, 1, 2.0], [2, 1, 3.0], [0, 0, 0]])  # by the poster, by the title, undecided: 2
    assert alignment.follows_the_poster(scores, ceiling, titles, examples, {1}) == (0.5, 2)


def test_misleading_items_are_the_demos_alone(prepared):
    assert alignment.misleading_items(DataFolder(prepared)) == set()
    world = make_world(3)
    films = np.random.default_rng(0).permutation(len(world.titles))  # items of a data folder are in another order
    items = SimpleNamespace(ids=[item_id(film) for film in films])
    found = alignment.misleading_items(
        SimpleNamespace(manifest={"options": {"dataset": "demo"}, "seed": 3}, items=items)
    )
    titles = [world.titles[films[item]] for item in found]
    assert len(found) == MISLEADING * KINDS and not any(title.startswith("Untitled") for title in titles)
    for item, title in zip(found, titles, strict=True):
        assert not title.startswith(GENRES[world.genre[films[item]]])
