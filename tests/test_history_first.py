"""--history-first: the ranking prompt begins with the history, which packing then shares with the Yes/No questions."""

import json

import numpy as np
import pytest
import torch
from conftest import Opened, words
from spoilt import refused
from stages import dpo
from test_export import blank_example, exported, run_snippet

import evaluate
import sft
from hanorec import recommend
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A few steps of SFT with the history first."""
    out = tmp_path_factory.mktemp("history_first") / "sft"
    argv = "--max-steps 6 --batch-size 8 --eval-limit 8 --warmup-steps 2 --history-first".split()
    sft.main(words("--data", prepared, "--out", out, *argv))
    return out


def test_all_questions_of_an_example_share_its_history(prepared, run):
    """One segment for both tasks, and the log-probabilities of separate forwards."""
    data = Opened(prepared)
    prompts, other = data.prompts(history_first=True), data.prompts()
    (example,) = data.examples("train", 1)
    trees, apart = ([order.sft_tree(example, task) for task in ("rank", "yesno")] for order in (prompts, other))
    root, question, answer = trees[0]
    assert root.ids == trees[1][0].ids and (question.parent, answer.parent) == (0, 1) and not question.images
    text = prompts.tokenizer.decode([*root.ids, *question.ids])
    assert text.index("History, oldest first") < text.index("Which candidate comes next")
    packed = PackedMLLM(load_finished(run, data.encoding))
    batch = packed.collate(trees, data.tokens)
    assert len(batch.segments) == 1 < len(packed.collate(apart, data.tokens).segments)
    plain = PackedMLLM(load_finished(run, data.encoding), pack=False)
    with torch.no_grad():
        shared, separate = packed(batch), plain(plain.collate(trees, data.tokens))
    torch.testing.assert_close(shared, separate, atol=1e-4, rtol=0)


def test_the_warm_up_scores_the_same_titles(prepared):
    data = Opened(prepared)
    example = max(data.examples("train"), key=lambda example: len(example.history))
    found = []
    for prompts in (data.prompts(history_first=True), data.prompts()):
        tree = prompts.language_tree([*example.history, example.target], 10_000, example.candidates)
        scored = [[node.ids[offset] for offset in node.scored] for node in tree if node.scored]
        found.append([prompts.tokenizer.decode(ids) for ids in scored])
    assert found[0] == found[1]


def test_later_stages_keep_the_order(prepared, run, tmp_path, monkeypatch):
    """DPO inherits it, evaluation and recommending follow the run, and the model card's snippet gives the scores."""
    trained = dpo(run, tmp_path / "dpo_hano")
    assert json.loads((trained / "config.json").read_text())["options"]["history_first"]
    asked, ranking_prompt = [], Prompts.ranking_prompt

    def recorded(prompts, *given):
        asked.append(prompts.history_first)
        return ranking_prompt(prompts, *given)

    monkeypatch.setattr(Prompts, "ranking_prompt", recorded)
    evaluate.main(words("--run", trained, "--limit", 4))
    evaluated = len(asked)
    recommend.main(words("--run", trained, "--user", Opened(prepared).examples("test", 1)[0].user))
    assert 4 <= evaluated < len(asked) and all(asked)
    monkeypatch.undo()
    folder = exported(run, tmp_path / "export")
    data = Opened(prepared)
    data.prompts = lambda: Opened.prompts(data, history_first=True)
    prompts, example = blank_example(data)
    packed = PackedMLLM(load_finished(run, data.encoding))
    with torch.no_grad():
        batch = packed.collate([prompts.ranking_tree(example, example.candidates)], data.tokens)
        expected = packed(batch).flatten().tolist()
    printed = run_snippet((folder / "README.md").read_text(), folder)
    np.testing.assert_allclose([number for _, number in printed], expected, atol=1e-4)


def test_a_chain_of_thought_has_no_ranking_prompt(prepared, tmp_path, capsys):
    argv = words("--data", prepared, "--out", tmp_path / "run", "--prompt", "cot", "--history-first")
    assert "--history-first" in refused(capsys, sft.main, *argv)
