"""Rank many candidates: in rounds, by questions, and within --max-length, with a model whose scores are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Opened

from hanorec.ranking.catalogue import CatalogueRanker, divided


class Known:
    """Stands for a PackedMLLM. An answer's score is given by `score`, from the tokens of its path."""

    def __init__(self, score):
        self.score, self.trees = score, []

    def eval(self):
        return self

    def collate(self, trees, tokens):
        self.trees += trees
        paths = []
        for node in trees[0]:
            before = () if node.parent is None else paths[node.parent]
            paths.append((*before, tuple(node.ids)))
        scored = [path for path, node in zip(paths, trees[0], strict=True) if node.scored]
        return SimpleNamespace(to=lambda device: scored)

    def __call__(self, paths):
        return torch.tensor([self.score(path) for path in paths])


def ranker(prepared, tasks, max_length, score, history_first=False):
    loaded = Opened(prepared)
    accelerator = SimpleNamespace(device="cpu", autocast=torch.no_grad)
    prompts = loaded.prompts(history_first=history_first)
    return CatalogueRanker(Known(score), prompts, loaded.tokens, tasks, max_length, accelerator)


def longest(tree):
    """The number of tokens of a ranking tree's longest path, counted anew."""
    prompt = [node for node in tree if not node.scored]
    return sum(len(node.ids) for node in prompt) + max(len(node.ids) for node in tree if node.scored)


@pytest.mark.parametrize("history_first", [False, True])
@pytest.mark.parametrize("max_length", [10_000, 260, 150])
def test_rounds_find_the_best_whatever_fits(prepared, max_length, history_first):
    """Scores that are the same in every list, so the best stays. Each prompt has at most max_length tokens."""
    rng = np.random.default_rng(0)
    value: dict = {}

    def score(path):
        return value.setdefault(path[-1], float(rng.normal()))

    ranks = ranker(prepared, ["rank"], max_length, score, history_first)
    candidates = list(range(10, 58))
    best = ranks.rank([0, 1, 2, 3, 4], candidates)
    assert sorted(item for item, _ in best) == candidates
    answers = {item: tuple(ranks.prompts.answer(ranks.prompts.items.titles[item], 0).ids) for item in candidates}
    assert value[answers[best[0][0]]] == pytest.approx(max(value.values()))
    scored = [score for _, score in best if score is not None]
    assert scored == sorted(scored, reverse=True)
    assert all(score is None for _, score in best[len(scored) :])
    trees = ranks.model.trees
    assert len(trees) == 1 if max_length == 10_000 else len(trees) > 2
    assert max(map(longest, trees)) <= max_length and not ranks.too_long
    lists = [sum(bool(node.scored) for node in tree) for tree in trees]
    assert len(scored) == lists[-1]
    assert min(lists) >= 2 and ranks.shortened == (max_length == 150)


def test_questions_have_one_history_and_comparable_scores(prepared, monkeypatch):
    """A candidate's score is the same alone and among others, and in every forward the history is the same."""

    def score(path):
        return float(hash(path[1:]) % 1000)

    monkeypatch.setattr("hanorec.ranking.catalogue.QUESTIONS", 7)
    ranks = ranker(prepared, ["yesno"], 90, score)
    together = dict(ranks.rank([0, 1, 2, 3, 4], list(range(10, 40))))
    assert len({tuple(tree[0].ids) for tree in ranks.model.trees}) == 1 and len(ranks.model.trees) == 5
    assert ranks.shortened == 1
    history = [4]
    for item in (10, 25, 39):
        assert ranks.rank(history, [item])[0][1] == together[item]


@pytest.mark.parametrize("room", [1, 25, 60, 1000])
def test_divided_lists_fit_and_keep_all(room):
    rng = np.random.default_rng(room)
    for size in (1, 2, 3, 10, 41):
        cost = {item: int(rng.integers(5, 15)) for item in range(size)}
        lists = divided(list(range(size)), cost, room)
        assert sorted(item for some in lists for item in some) == list(range(size))
        assert min(map(len, lists)) >= min(2, size)
        fits = [sum(cost[item] for item in some) <= room for some in lists]
        assert all(fits) or len(lists) == max(1, size // 2)


def test_no_candidates(prepared):
    assert ranker(prepared, ["rank"], 100, lambda path: 0.0).rank([0], []) == []
