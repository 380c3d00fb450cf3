"""Which items are rejected, and the tables of log-probabilities of preference pairs."""

import math

import numpy as np
import pytest
import torch
from conftest import Opened

from hanorec.data.folder import Example
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM
from hanorec.model.pairs import Pairs, draw_by_popularity, draw_from_the_harder, pools
from hanorec.model.trees import tree_length
from hanorec.run.files import UserError

KINDS = ("rank", "yes", "no")


def example(user="u", history=(1, 2), target=3, candidates=(4, 3, 5, 6, 7), rejected=6):
    return Example(user, list(history), target, list(candidates), rejected)


def test_pools_begin_with_the_examples_own_rejected_item():
    assert pools([example()], 1, "data") == [[6]]
    assert pools([example()], 3, "data") == [[6, 4, 5]]
    assert pools([example()], 1, "model") == pools([example()], 4, "data") == [[6, 4, 5, 7]]


def test_pools_hold_no_item_that_the_user_touched():
    """With several positives, the other targets of the same history are candidates too, and are no negatives."""
    both = [example(), example(target=5), example(user="v"), example(history=(1, 4))]
    assert pools(both, 1, "self") == [[6, 4, 7], [6, 4, 7], [6, 4, 5], [6, 5, 7]]


@pytest.mark.parametrize(("source", "most"), [("data", 4), ("popular", 4), ("model", 3), ("self", 3)])
def test_too_many_rejected_items_are_refused(source, most):
    pools([example()], most, source)
    with pytest.raises(UserError, match=f"has only {most} negatives"):
        pools([example()], most + 1, source)


@pytest.mark.parametrize(("count", "drawn"), [(1, 4), (3, 4), (4, 4), (5, 5), (8, 8)])
def test_the_harder_half_is_drawn_from_without_the_hardest(count, drawn):
    """Of nine negatives the half has five, less the hardest. More are taken from below the half."""
    logps = torch.randn(500, 9, generator=torch.Generator().manual_seed(0))
    columns = draw_from_the_harder(logps, count, seed=1)
    ranks = logps.argsort(descending=True).argsort().gather(1, columns)
    assert all(len(set(row)) == count for row in columns.tolist())
    assert set(ranks.flatten().tolist()) == set(range(1, drawn + 1))
    first = np.bincount(ranks[:, 0].numpy(), minlength=drawn + 1)[1:]
    assert first.min() > 0.5 * 500 / drawn  # each is drawn
    assert torch.equal(columns, draw_from_the_harder(logps, count, seed=1))
    assert not torch.equal(columns, draw_from_the_harder(logps, count, seed=1, epoch=1)) or count == drawn == 8


@pytest.fixture(scope="module")
def opened(prepared):
    return Opened(prepared)


def make(opened, rejected, source, kinds=KINDS):
    examples = opened.examples("train")
    return Pairs(opened.prompts(), examples, kinds, 4096, pools(examples, rejected, source))


def test_popular_items_are_rejected_in_proportion_to_their_interactions(opened):
    """Against the expected number of draws: interactions plus one, over the sum of the pool's."""
    pairs, sequences = make(opened, 1, "popular"), opened.sequences()
    interactions = np.bincount([item for items in sequences.values() for item in items], minlength=len(opened.items))
    drawn, expected = np.zeros(len(opened.items)), np.zeros(len(opened.items))
    seeds = 40
    for seed in range(seeds):
        columns = draw_by_popularity(pairs, sequences, 1, seed)
        for pool, (column,) in zip(pairs.pool, columns.tolist(), strict=True):
            drawn[pool[column]] += 1
            expected[pool] += (interactions[pool] + 1) / (interactions[pool] + 1).sum()
    assert drawn.sum() == pytest.approx(expected.sum())
    assert (abs(drawn - expected) <= 5 * np.sqrt(expected) + 1).all()


def test_the_table_of_a_batch_equals_one_pair_after_another(opened, sft_run):
    """Log-probabilities, reference, hardness and lengths of pairs with 3 and with 1 rejected answers, by a loop."""
    packed = PackedMLLM(load_finished(sft_run, opened.encoding))
    pairs = make(opened, 3, "model")
    pool = len(pairs.pool[0])
    generator = torch.Generator().manual_seed(0)
    pairs.columns = draw_from_the_harder(torch.randn(len(pairs.pool), pool, generator=generator), 3, 0)
    reference, hardness = torch.randn(len(pairs), 1 + pool), torch.rand(len(pairs), pool)
    numbers = [0, 1, 2, 9, 5, 13]
    batch = pairs.batch(numbers, packed, opened.tokens, reference, hardness)
    prompts = opened.prompts()
    with torch.no_grad():
        table = batch.lay_out(packed(batch.trees))
    assert table.shape == (6, 4)
    for row, number in enumerate(numbers):
        own, kind = number // 3, KINDS[number % 3]
        rejected = [pairs.pool[own][column] for column in pairs.columns[own].tolist()]
        tree = prompts.pair_tree(pairs.examples[own], kind, rejected)
        with torch.no_grad():
            logps = packed(packed.collate([tree], opened.tokens))
        answers = [node for node in tree if node.scored]
        assert int(batch.lengths[row]) == len(answers[0].scored)
        used = 4 if kind == "rank" else 2
        torch.testing.assert_close(table[row, :used], logps, atol=1e-4, rtol=0)
        assert table[row, used:].isnan().all()
        columns = pairs.columns[own].tolist() if kind == "rank" else [0]
        assert batch.reference[row, :used].tolist() == reference[number, [0, *(1 + c for c in columns)]].tolist()
        assert batch.hardness[row, : used - 1].tolist() == hardness[number, columns].tolist()


def test_the_policy_reads_the_prompt_that_the_reference_scored(opened, monkeypatch):
    """A pair that rejects a short title loses as many history items as the pool with its long title."""
    pairs = make(opened, 1, "model")
    number = next(n for n in range(0, len(pairs), 3) if len(pairs.examples[n // 3].history) > 1)
    own, pool = pairs.examples[number // 3], pairs.pool[number // 3]
    titles = [title * (1 + 4 * (item == pool[-1])) for item, title in enumerate(opened.items.titles)]
    monkeypatch.setattr(pairs.prompts.items, "titles", titles)
    pairs.columns = pairs.columns[:, :1]
    pairs.max_length = tree_length(pairs.whole().tree(number)) - 1
    short, whole = pairs.tree(number), pairs.whole().tree(number)
    assert len(short) == 3 and len(whole) == 2 + len(pool)
    assert short[0].ids == whole[0].ids
    assert [node.ids for node in short[1:]] == [node.ids for node in whole[1:3]]
    alone = pairs.prompts.pair_tree(own, "rank", pool[:1])
    assert tree_length(alone) <= pairs.max_length  # alone, the pair would have kept its whole history


def test_a_gradient_flows_through_the_table(opened, sft_run):
    packed = PackedMLLM(load_finished(sft_run, opened.encoding))
    pairs = make(opened, 2, "data")
    batch = pairs.batch([0, 1], packed, opened.tokens)
    logps = torch.randn(len(batch.trees.answers), requires_grad=True)
    table = batch.lay_out(logps)
    (table[~table.isnan()] ** 2).sum().backward()
    torch.testing.assert_close(logps.grad, 2 * logps.detach())
    assert math.isnan(float(table.detach()[1, 2]))
