"""The prompts of MLLM-SRec: the items and texts in an example's prompt, and its steps."""

import json
from dataclasses import replace
from functools import partial

import pytest
from conftest import Opened
from echo import texts_of, thought_prompts
from layouts import lines
from tokenizers import normalizers, pre_tokenizers

from hanorec.data.folder import DataFolder
from hanorec.model.prompts import fit_to_length
from hanorec.model.trees import tree_length
from hanorec.run.files import UserError, file_hash, write_json
from mllm_srec import chain_of_thought
from mllm_srec.preferences import timelines
from mllm_srec.texts import PROMPTS_FILE, fill, read_texts


@pytest.mark.parametrize("position", range(-1, -7, -1))
def test_a_prompt_has_nothing_from_the_target_on(data, position):
    """The example's prompt stays the same if the target and all later items of the user are replaced by others."""
    loaded = Opened(data)
    user = max(loaded.sequences(), key=lambda user: len(loaded.sequences()[user]))
    examples = [each for each in [*loaded.examples("train"), *loaded.examples("val")] if each.user == user]
    example, prompts = examples[position], thought_prompts(loaded)
    expected = prompts.show(prompts.yesno_questions(example, example.candidates))
    timeline, ids = timelines(loaded.data)[user], loaded.items.ids
    later = timeline[timeline.index(example.target) :]
    other = [item for item in range(len(ids)) if item not in timeline]
    exchange = {ids[one]: ids[two] for one, two in zip(later, other, strict=False)}
    assert len(exchange) == len(later) >= 1
    for name in ("sequences", "train", "val", "test"):
        changed = []
        for entry in lines(data / f"{name}.jsonl"):
            for key in ("items", "history") if entry["user"] == user else ():
                entry[key] = [exchange.get(item, item) for item in entry.get(key, [])]
            changed.append(json.dumps(entry))
        (data / f"{name}.jsonl").write_text("\n".join(changed) + "\n")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"] = {name: file_hash(data / name) for name in manifest["files"]}
    write_json(data / "manifest.json", manifest)
    loaded = Opened(data)
    assert not set(later) & set(timelines(loaded.data)[user])
    prompts = thought_prompts(loaded)
    assert prompts.show(prompts.yesno_questions(example, example.candidates)) == expected


def test_an_example_has_the_last_paragraph_before_its_cut(data):
    loaded, remainders = Opened(data), set()
    user_texts = texts_of(loaded)
    for example in [*loaded.examples("train"), *loaded.examples("val"), *loaded.examples("test")]:
        values, cut = user_texts.prompt_values(example), user_texts.cut(example)
        before_cut = user_texts.timelines[example.user][:cut]
        assert before_cut[-len(example.history) :] == example.history and example.target not in before_cut
        ends = [end for end, *_ in user_texts.users.get(example.user, []) if end <= cut]
        assert ends == list(range(3, cut + 1, 3))
        since = [user_texts.item_lines([item]) for item in example.history if item in before_cut[len(ends) * 3 :]]
        assert values["last"] == user_texts.summaries[example.history[-1]]
        assert values["since"] == ("\n".join(since) or "not known")
        assert (values["profile"] == "not known") == (not ends)  # each window that an example reads has a profile
        remainders.add(cut % 3)
    assert remainders == {0, 1, 2}


def test_the_steps_do_not_depend_on_the_label(data):
    """The questions and their steps stay the same if target and rejected item are swapped."""
    loaded = Opened(data)
    prompts = thought_prompts(loaded)
    for example in loaded.examples("train", 20):
        root, yes, no, *answers = prompts.sft_tree(example, "yesno")
        swapped = prompts.sft_tree(replace(example, target=example.rejected, rejected=example.target), "yesno")
        assert swapped == [root, no, yes, *answers]
        steps = prompts.tokenizer.decode([yes.ids[offset] for offset in yes.scored])
        assert steps.startswith("1. The user: ") and steps.endswith("Answer:\n")
        assert loaded.items.titles[example.rejected] not in steps
        assert [prompts.tokenizer.decode(answer.ids) for answer in answers] == ["Yes.<|im_end|>", "No.<|im_end|>"]
        evaluated = prompts.evaluation_tree(example, "yesno")
        assert [node.ids for node in evaluated[1:11]].count(yes.ids) == 1  # the question in training
        assert not any(node.scored for node in evaluated[:11]) and len(evaluated) == 31
        prompts.steps_share = 0.0
        without_steps = prompts.sft_tree(example, "yesno")
        assert [node.ids for node in without_steps] == [node.ids for node in (root, yes, no, *answers)]
        assert not any(node.scored for node in without_steps[:3])
        prompts.steps_share = 1.0
        pair = prompts.pair_tree(example, "no")
        assert pair[1].ids == no.ids and prompts.tokenizer.decode(pair[2].ids) == "No.<|im_end|>"


def test_a_wrong_prompts_file_is_refused(tmp_path):
    good, path = PROMPTS_FILE.read_text(), tmp_path / "mine.txt"
    for text, message in (
        (good.replace("[profile]", "[profil]"), r"line \d+: \[profil\] is there twice, or is not one of"),
        (
            good.replace("{title}: {summary}", "{title}: {label}"),
            r"\[line\]: {label} is not allowed there; allowed are: summary, title",
        ),
        (good.replace("[no]\nNo.", ""), r"has no text for \[no\]"),
        ("hello\n" + good, "text before the first"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_texts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(tmp_path / "none.txt")
    assert fill("{a} and {b}", a="{b}", b=3) == ["{b} and ", 3]  # a value's own placeholders stay


def test_an_example_that_cannot_fit_is_refused(data):
    loaded = Opened(data)
    prompts, examples = thought_prompts(loaded), loaded.examples("train", 20)
    build = partial(prompts.sft_tree, task="yesno")
    prompts.check_fit([build], examples, 4096)
    with pytest.raises(UserError, match="train with a larger --max-length"):
        prompts.check_fit([build], examples, 100)
    longest = max(tree_length(build(example)) for example in examples)
    prompts.check_fit([build], examples, 2 * longest + 100)
    used = {item for example in examples for item in (example.target, example.rejected)}
    unused = next(item for item in range(60) if item not in used)
    prompts.user_texts.summaries[unused] = "long " * 2 * longest
    with pytest.raises(UserError, match="train with a larger --max-length"):
        prompts.check_fit([build], examples, 2 * longest + 100)


def fault(check, *args):
    """The message of the UserError of check(*args), or None."""
    try:
        check(*args)
    except UserError as error:
        return str(error)


def check_slowly(tried, max_length):
    """Make the tokens of every tree. tried: (function from an example to a tree, example)."""
    for build, example in tried:
        fit_to_length(build, example, max_length)


def test_the_texts_that_a_check_encodes_do_not_grow_with_the_examples(data, monkeypatch):
    """So 50,000 examples start within seconds: the lengths of their trees are bounded by bytes."""
    loaded = Opened(data)
    prompts, examples = thought_prompts(loaded), loaded.examples("train", 12)
    prompts.text, encoded, encode = prompts._text, [], prompts.tokenizer.encode  # without the cache of texts
    monkeypatch.setattr(prompts.tokenizer, "encode", lambda text, **more: encoded.append(text) or encode(text, **more))
    build = partial(prompts.sft_tree, task="yesno")
    for count in (1, 10):
        encoded.clear()
        prompts.check_fit([build], examples * count, 100_000)
        assert len(encoded) == len(prompts.items)
    prompts.byte_level = False
    prompts.check_fit([build], examples, 100_000)
    assert len(encoded) > 3 * len(prompts.items)


@pytest.mark.parametrize("byte_level", [True, False])
def test_what_fits_is_what_the_slow_way_finds(data, byte_level, monkeypatch):
    """A bound in bytes decides most trees."""
    loaded = Opened(data)
    prompts, examples = thought_prompts(loaded), loaded.examples("train", 12)
    assert prompts.byte_level
    prompts.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    prompts.byte_level, texts = byte_level, prompts.user_texts
    for item, odd in enumerate(
        ("\u0958" * 30, "\U0001d160" * 20, "e\u0301\u0323" * 30, "\U0001f469\u200d\U0001f4bb" * 9)
    ):
        texts.summaries[item] = odd
    kinds = [lambda example, kind=kind: prompts.pair_tree(example, kind) for kind in ("yes", "no")]
    for builds in ([partial(prompts.sft_tree, task="yesno")], kinds):
        lengths = [len(prompts.text(texts.item_lines([item]))) for item in range(len(prompts.items))]
        tried = []
        for example in (replace(example, history=example.history[-1:]) for example in examples):
            for build in builds:
                tried += [(build, example), (build, replace(example, rejected=lengths.index(max(lengths))))]
        exact = [tree_length(build(example)) for build, example in tried]
        assert all(prompts.most_tokens(*each) >= length for each, length in zip(tried, exact, strict=True))
        for limit in (max(exact), *sorted(set(exact))[-6:-1], min(exact) - 1):
            slow = fault(check_slowly, tried, limit)
            assert fault(prompts.check_fit, builds, examples, limit) == slow
            assert (slow is None) == (limit == max(exact))
    built = []
    monkeypatch.setattr(chain_of_thought, "fit_to_length", lambda *args: built.append(args))
    prompts.check_fit(kinds, examples, 100_000)
    assert len(built) == (0 if byte_level else 4 * len(examples))


def test_which_tokenizers_have_a_bound_in_bytes(data):
    tokenizer = thought_prompts(Opened(data)).tokenizer
    backend = tokenizer.backend_tokenizer
    split, bytes_alone = pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    for parts, normalizer, expected in (
        ([split, bytes_alone], normalizers.NFC(), True),
        ([split, bytes_alone], None, True),
        ([split, bytes_alone], normalizers.NFKC(), False),  # a ligature becomes many letters
        ([split, pre_tokenizers.ByteLevel(add_prefix_space=True)], None, False),
        ([pre_tokenizers.Metaspace(), bytes_alone], None, False),
        ([split], None, False),
    ):
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        backend.normalizer = normalizer
        assert chain_of_thought.is_byte_level(tokenizer) == expected, (parts, normalizer)
    backend.pre_tokenizer = bytes_alone
    assert chain_of_thought.is_byte_level(tokenizer) and not chain_of_thought.is_byte_level(object())


def test_a_text_that_is_not_known_shares_no_words(data):
    user_texts = texts_of(Opened(data))
    user_texts.summaries[3] = "What is not known of a Zebra"
    assert user_texts.shared_words(3, "not known", "not known") == "not known"
    assert user_texts.shared_words(3, "a zebra", "not known") == "zebra"


def test_repeated_items_are_refused(data):
    """The cut of an example would be that of the item's last time, and its texts would tell of the future."""
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["options"]["repeats"] = "all"
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="with --repeats first or last"):
        timelines(DataFolder(data))
