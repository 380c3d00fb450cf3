"""Prompt trees: questions, scored tokens, and limits on length."""

from dataclasses import replace

import pytest
from conftest import Opened

from hanorec.model.prompts import fit_to_length
from hanorec.model.trees import tree_length
from hanorec.run.files import UserError


@pytest.fixture(scope="module")
def data(prepared):
    return Opened(prepared)


def scored_text(prompts, node):
    """The text of a node's scored tokens."""
    return prompts.tokenizer.decode([node.ids[offset] for offset in node.scored])


def test_a_yesno_sample_asks_about_the_target_and_the_rejected_item(data):
    """Yes is the answer for the target, No for the rejected item, behind one history and in the same words."""
    prompts, titles = data.prompts(), data.items.titles
    for example in data.examples("train", 20):
        root, *questions, yes, no = prompts.sft_tree(example, "yesno")
        assert (yes.parent, no.parent) == (1, 2) and [q.parent for q in questions] == [0, 0]
        assert [scored_text(prompts, answer) for answer in (yes, no)] == ["Yes<|im_end|>", "No<|im_end|>"]
        texts = [prompts.tokenizer.decode(question.ids) for question in questions]
        assert texts[0].replace(titles[example.target], titles[example.rejected]) == texts[1]
        assert not root.scored and root.images == [i for i in example.history if data.tokens.lengths[i]]


def test_the_warm_up_predicts_every_title_but_the_first(data):
    prompts, titles = data.prompts(), data.items.titles
    example = max(data.examples("train"), key=lambda example: len(example.history))
    items = [*example.history, example.target]
    (root,) = prompts.language_tree(items, 10_000)
    assert scored_text(prompts, root) == "".join(titles[item] + "\n" for item in items[1:])
    root, answer = prompts.language_tree(items, 10_000, example.candidates)
    assert scored_text(prompts, root) == "".join(titles[item] + "\n" for item in items[1:-1])
    assert scored_text(prompts, answer) == titles[example.target] + "<|im_end|>"
    assert root.ids == prompts.sft_tree(example, "rank")[0].ids  # the prompt of training and evaluation
    short = prompts.language_tree(items, tree_length([root, answer]) - 1, example.candidates)
    assert short[0].images == [item for item in items[1:-1] if data.tokens.lengths[item]]


def test_a_warm_up_of_two_items_that_cannot_fit_is_refused(data):
    prompts, titles = data.prompts(), data.items.titles
    for candidates in ((), (2, 3)):
        length = tree_length(prompts.language_tree([0, 1], 10_000, candidates))
        with pytest.raises(
            UserError, match=f"{length} tokens in the warm-up; train with a larger --max-length"
        ) as error:
            prompts.language_tree([3, 0, 1], length - 1, candidates)
        assert titles[0] in str(error.value) and titles[1] in str(error.value)
    with pytest.raises(ValueError, match="at least two items"):
        prompts.language_tree([0], 10_000)


def test_an_example_that_cannot_fit_is_refused_before_training(data):
    prompts, examples = data.prompts(), data.examples("train")
    one = [replace(example, history=example.history[-1:]) for example in examples]
    longest = max(tree_length(prompts.sft_tree(example, "rank")) for example in one)
    prompts.check_fit([lambda example: prompts.sft_tree(example, "rank")], examples, longest)
    with pytest.raises(UserError, match=f"{longest} tokens with one history item; train with a larger --max-length"):
        prompts.check_fit([lambda example: prompts.sft_tree(example, "rank")], examples, longest - 1)


def test_chosen_and_rejected_differ_in_nothing_but_the_item(data):
    prompts, examples = data.prompts(), data.examples("train", 20)
    text = prompts.tokenizer.decode
    for example in examples:
        titles = data.items.titles
        for kind, chosen, rejected in (
            ("rank", titles[example.target], titles[example.rejected]),
            ("yes", "Yes", "No"),
            ("no", "No", "Yes"),
        ):
            *_, first, second = prompts.pair_tree(example, kind)
            assert text(first.ids) == f"{chosen}<|im_end|>" and text(second.ids) == f"{rejected}<|im_end|>"


def test_a_long_history_loses_its_oldest_items(data):
    prompts = data.prompts()
    example = max(data.examples("train"), key=lambda example: len(example.history))

    def build(example):
        return prompts.sft_tree(example, "rank")

    whole = fit_to_length(build, example, 10_000)
    limit = sum(len(node.ids) for node in whole) - 1
    shorter = fit_to_length(build, example, limit)
    assert sum(len(node.ids) for node in shorter) <= limit
    text = prompts.show(shorter)
    history = text.split("History, oldest first:\n")[1]
    assert data.items.titles[example.history[0]] not in history
    assert all(data.items.titles[item] in history for item in example.history[1:])
    expected = sum(data.tokens.lengths[item] for node in shorter for item in node.images)
    ids = [token for node in shorter for token in node.ids]
    assert ids.count(prompts.template.image_token) == expected  # no image is cut
