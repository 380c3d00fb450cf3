"""MLLM-SRec's texts: what a row may know, and what its steps come from."""

import json
from dataclasses import replace
from functools import partial

import pytest
from conftest import Opened
from echo import lines, texts_of, thought_prompts

from hanorec.model.trees import separate_paths
from hanorec.run.files import UserError, file_hash, write_json
from mllm_srec.preferences import timelines
from mllm_srec.texts import PROMPTS_FILE, fill, read_texts


@pytest.mark.parametrize("position", range(-1, -7, -1))
def test_nothing_at_or_behind_the_target_enters_an_examples_prompt(data, position):
    """All that a user chose from the target on is exchanged: the row's prompt stays, word for word."""
    loaded = Opened(data)
    user = max(loaded.sequences(), key=lambda user: len(loaded.sequences()[user]))
    row = [row for row in [*loaded.examples("train"), *loaded.examples("val")] if row.user == user][position]
    told = thought_prompts(loaded)
    before = told.show(told.yesno_questions(row, row.candidates))
    line, ids = timelines(loaded.data)[user], loaded.items.ids
    later, other = line[line.index(row.target) :], [item for item in range(len(ids)) if item not in line]
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
    told = thought_prompts(loaded)
    assert told.show(told.yesno_questions(row, row.candidates)) == before


def test_an_example_has_the_last_paragraph_before_its_cut(data):
    loaded = Opened(data)
    texts, ids = texts_of(loaded), loaded.items.ids
    seen = set()
    for row in [*loaded.examples("train"), *loaded.examples("val"), *loaded.examples("test")]:
        line, cut, values = texts.timelines[row.user], texts.cut(row), texts.at(row)
        assert line[:cut][-len(row.history) :] == row.history and row.target not in line[:cut]
        ends = [end for end, *_ in texts.users.get(row.user, []) if end <= cut]
        assert ends == list(range(3, cut + 1, 3))  # each once, at any cut
        since = [texts.line(item) for item in row.history if item in line[len(ends) * 3 : cut]]
        assert values["last"] == texts.summaries[row.history[-1]]
        assert values["since"] == ("\n".join(since) or texts.texts["nothing"])
        assert (values["profile"] == texts.texts["nothing"]) == (not ends)  # every point that a row reads has one
        seen.add(cut % 3)
    assert seen == {0, 1, 2} and len(ids) > 10


def test_the_steps_do_not_know_the_label(data):
    """Target and rejected item change places: the same candidate, the same steps, and only the answer differs."""
    loaded = Opened(data)
    told = thought_prompts(loaded)
    for row in loaded.examples("train", 20):
        root, yes, no, *answers = told.sft_tree(row, "yesno")
        swapped = told.sft_tree(replace(row, target=row.rejected, rejected=row.target), "yesno")
        assert [swapped[2], swapped[1]] == [yes, no] and swapped[0] == root and swapped[3:] == answers
        steps = told.tokenizer.decode([yes.ids[offset] for offset in yes.scored])
        assert steps.startswith("1. The user: ") and steps.endswith("Answer:\n")
        assert loaded.items.titles[row.rejected] not in steps
        assert [told.tokenizer.decode(answer.ids) for answer in answers] == ["Yes.<|im_end|>", "No.<|im_end|>"]
        asked = told.evaluation_tree(row, "yesno")
        assert [node.ids for node in asked[1:11] if node.ids == yes.ids] == [
            yes.ids
        ]  # what is scored is what was taught
        assert not any(node.scored for node in asked[:11]) and len(asked) == 31
        told.steps_share = 0.0
        assert [node.ids for node in told.sft_tree(row, "yesno")] == [node.ids for node in (root, yes, no, *answers)]
        assert not any(node.scored for node in told.sft_tree(row, "yesno")[:3])
        told.steps_share = 1.0
        pair = told.pair_tree(row, "no")
        assert pair[1].ids == no.ids and told.tokenizer.decode(pair[2].ids) == "No.<|im_end|>"


def test_a_prompts_file_that_cannot_be_used(tmp_path):
    good, path = PROMPTS_FILE.read_text(), tmp_path / "mine.txt"
    for text, message in (
        (good.replace("[profile]", "[profil]"), r"line \d+: \[profil\] stands there twice, or is not among"),
        (good.replace("{title}: {summary}", "{title}: {label}"), r"\[line\]: {label} cannot stand there, only"),
        (good.replace("[no]\nNo.", ""), r"has no \[no\]"),
        ("hello\n" + good, "text before the first"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_texts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_texts(tmp_path / "none.txt")
    assert fill("{a} and {b}", a="{b}", b=3) == ["{b} and ", 3]  # what is filled in is not read again


def test_an_example_that_cannot_fit_is_found(data):
    loaded = Opened(data)
    told = thought_prompts(loaded)
    build = partial(told.sft_tree, task="yesno")
    told.check_fit([build], loaded.examples("train"), 4096)
    with pytest.raises(UserError, match="train with a larger --max-length"):
        told.check_fit([build], loaded.examples("train"), 100)
    rows, most = loaded.examples("train"), 0
    for row in rows:
        most = max(most, *(len(path.ids) for (path,) in separate_paths(build(row))))
    unused = next(item for item in range(60) if all(item not in (row.target, row.rejected) for row in rows))
    told.check_fit([build], rows, 2 * most + 100)
    told.user_texts.summaries[unused] = "long " * 2 * most
    with pytest.raises(UserError, match="train with a larger --max-length"):
        told.check_fit([build], rows, 2 * most + 100)


def test_what_is_not_known_is_nothing_in_common(data):
    texts = texts_of(Opened(data))
    texts.summaries[3] = "What is not known of a Zebra"
    assert texts.common(3, "not known", "not known") == "not known"
    assert texts.common(3, "a zebra", "not known") == "zebra"
