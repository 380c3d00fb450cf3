"""--history-first: the ranking prompt begins with the history, which packing then shares with the Yes/No questions."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import Opened, words
from spoilt import refused
from stages import dpo, small_sft
from test_export import blank_example, exported, run_snippet

import evaluate
import sft
from hanorec import recommend
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM
from hanorec.model.prompts import Prompts
from hanorec.model.trees import tree_length
from hanorec.run.runs import read_run


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A few steps of SFT with the history first."""
    options = "--max-steps 6 --batch-size 8 --eval-limit 8 --warmup-steps 2 --history-first"
    return small_sft(prepared, tmp_path_factory.mktemp("history_first") / "sft", options)


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


def test_pairs_share_it_too_also_with_images_of_candidates(prepared, run):
    """A ranking pair with several rejected items and two Yes/No pairs, against separate forwards."""
    data = Opened(prepared)
    prompts = data.prompts(candidate_images=True, history_first=True)
    (example,) = data.examples("train", 1)
    rejected = [item for item in example.candidates if item != example.target][:3]
    trees = [prompts.pair_tree(example, kind, rejected if kind == "rank" else ()) for kind in ("rank", "yes", "no")]
    assert trees[0][0].images and trees[0][1].images  # of the history, of the candidates
    packed, plain = (PackedMLLM(load_finished(run, data.encoding), pack) for pack in (True, False))
    batch = packed.collate(trees, data.tokens)
    with torch.no_grad():
        shared, separate = packed(batch), plain(plain.collate(trees, data.tokens))
    assert len(batch.segments) == 1 and len(shared) == 4 + 2 + 2
    torch.testing.assert_close(shared, separate, atol=1e-4, rtol=0)


def test_the_warm_up_scores_the_same_titles(prepared):
    data = Opened(prepared)
    example = max(data.examples("train"), key=lambda example: len(example.history))
    found = []
    for prompts in (data.prompts(history_first=True), data.prompts()):
        tree = prompts.language_tree([*example.history, example.target], 10_000, example.candidates)
        scored = [[node.ids[offset] for offset in node.scored] for node in tree if node.scored]
        found.append([prompts.tokenizer.decode(ids) for ids in scored])
        assert tree[-1].parent == len(tree) - 2  # the answer follows the prompt's last node
        short = prompts.language_tree([*example.history, example.target], tree_length(tree) - 1, example.candidates)
        assert short[0].images == [item for item in example.history[1:] if data.tokens.lengths[item]]
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
    prompts, example = blank_example(data, history_first=True)
    packed = PackedMLLM(load_finished(run, data.encoding))
    with torch.no_grad():
        batch = packed.collate([prompts.ranking_tree(example, example.candidates)], data.tokens)
        expected = packed(batch).flatten().tolist()
    printed = run_snippet((folder / "README.md").read_text(), folder)
    np.testing.assert_allclose([number for _, number in printed], expected, atol=1e-4)


def test_a_run_of_an_earlier_version_has_the_candidates_first(prepared, sft_run, tmp_path):
    shutil.copytree(sft_run, tmp_path / "sft")
    config = json.loads((sft_run / "config.json").read_text())
    del config["options"]["history_first"]
    (tmp_path / "sft" / "config.json").write_text(json.dumps(config))
    assert read_run(tmp_path / "sft")["options"]["history_first"] is False
    later = dpo(tmp_path / "sft", tmp_path / "dpo_hano")
    assert json.loads((later / "config.json").read_text())["options"]["history_first"] is False


@pytest.mark.parametrize("more", [["--prompt", "cot"], ["--tasks", "yesno"]])
def test_it_is_for_the_ranking_question(prepared, tmp_path, capsys, more):
    argv = words("--data", prepared, "--out", tmp_path / "run", "--history-first", *more)
    assert "--history-first" in refused(capsys, sft.main, *argv)
