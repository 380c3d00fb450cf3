"""mllm_srec.teach: the lessons, --score, and the taught backbone in summarize.py and sft.py."""

import json

import describe
import pytest
from conftest import Opened
from forked import launch
from PIL import Image
from stages import lines, refused, training

import sft
from hanorec.model.load import load_model
from hanorec.model.trees import merge_trees, separate_paths
from mllm_srec import summarize, teach
from mllm_srec.lessons import Lessons, profile_of, score_summaries, taught_items, window_paragraph
from mllm_srec.texts import PROMPTS_FILE, item_prompt, read_texts


def test_half_of_the_items_is_taught_and_the_other_half_measured(prepared, taught, tmp_path, capsys):
    """Compare the shares with a count by hand, for invented summaries."""
    data = Opened(prepared).data
    half = set(taught_items(60, 0.5, 1))
    assert len(half) == 30 and half != set(taught_items(60, 0.5, 2))
    colours = ["red", "blue"] * 30
    truth = {item: {"text": "?", "facts": {"colour": colours[item]}} for item in range(60)}
    # Items 0 and 3 have the right colour
    summaries = {0: "Red.", 1: "red and blue", 2: None, 3: "blue thing, a hundred"}
    entries = []
    for item, name in enumerate(data.items.ids):
        entries.append({"item": name, "summary": summaries.get(item, "a green one"), "fault": None})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    shares = score_summaries(tmp_path, truth, half, data)
    assert shares["colour"] == pytest.approx(sum(item not in half for item in (0, 3)) / 30)
    assert "colour: " in capsys.readouterr().out
    error = refused(capsys, teach.main, "--data", prepared, "--score", tmp_path, "--out", tmp_path)
    assert "descriptions.jsonl does not exist; give a file of lines with item and text" in error


def test_movielens_descriptions_have_the_known_facts(tmp_path):
    Image.new("RGB", (20, 30), (200, 160, 90)).save(tmp_path / "1.jpg")
    Image.new("RGB", (20, 30), (10, 20, 90)).save(tmp_path / "2.jpg")
    toys = describe.describe({"item": "1", "title": "Toy Story (1995)"}, "Adventure|Comedy", tmp_path / "1.jpg")
    assert toys["text"] == "Adventure film of the 1990s, its poster bright and warm."
    assert toys["facts"] == {"genre": "Adventure", "decade": "1990s", "light": "bright", "tone": "warm"}
    assert describe.poster_facts(tmp_path / "2.jpg") == {"light": "dark", "tone": "cold"}
    other = describe.describe({"item": "3", "title": "No Year"}, "War", None)
    assert other == {"item": "3", "text": "War film.", "facts": {"genre": "War"}}
    assert describe.describe({"item": "4", "title": "Nothing"}, "(no genres listed)", None) is None


def test_lessons_are_the_prompts_of_summarize(prepared, taught):
    """Each path of a batch's trees is a complete prompt of mllm_srec.summarize and its reply."""
    data, texts = Opened(prepared), read_texts(PROMPTS_FILE)
    prompts = data.prompts()
    truth = {item: {"text": f"Thing {item}.", "facts": {"kind": f"k{item}", "colour": "red"}} for item in range(10)}
    lessons = Lessons(data.encoding, prompts, texts, truth, window=2, seed=42)
    trees = lessons.trees(list(range(30)), step=1)
    paths = [path for tree in trees for (path,) in separate_paths(tree)]
    expected = []
    for _, parts, reply in (lessons.sample(number, 1) for number in range(30)):
        expected.append([*prompts.complete_prompt(parts).ids, *prompts.answer(reply, 0).ids])
    assert sorted(path.ids for path in paths) == sorted(expected)
    assert len(merge_trees(trees)) <= 4  # prompts of one kind share their beginning
    prompt_texts = ["".join(map(str, lessons.sample(number, 1)[1])) for number in range(1, 30, 3)]
    assert {text.count("Paragraph: Lately") for text in prompt_texts} == {0, 1}
    # Some paragraphs are written from an earlier paragraph
    assert {text.count("; before") for text in prompt_texts} == {0, 1}
    items = [item_prompt(texts, "both", data.encoding, item) for item in range(10)]
    assert [lessons.sample(3 * item, 1)[1] for item in range(10)] == items


def test_the_taught_backbone_writes_and_is_trained_further(data, taught, tmp_path):
    log = training(taught / "metrics.jsonl")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    options = ["--data", str(data), "--run", str(taught), "--max-tokens", "48"]
    summarize.main([*options, "--name", "one", "--batch-size", "7"])
    launch(2, "-m", "mllm_srec.summarize", *options, "--name", "two", folder=tmp_path)
    for name in ("items.jsonl", "preferences.jsonl"):  # two processes with other batch sizes write the same texts
        one, two = (lines(data / "summaries" / folder / name) for folder in ("one", "two"))
        assert one == two and one
    argv = "--prompt cot --summaries one --max-steps 1 --warmup-steps 0 --batch-size 4 --eval-limit 4".split()
    argv += ["--lr", "1e-9"]
    sft.main(["--data", str(data), "--start", str(taught), "--out", str(tmp_path / "sft"), *argv])
    lora = ["--data", str(data), "--tune", "lora", "--out", str(tmp_path / "lora"), "--batch-size", "4"]
    sft.main([*lora, "--max-steps", "1", "--eval-limit", "4"])
    full = ["--data", str(data), "--start", str(tmp_path / "lora"), "--out", str(tmp_path / "full")]
    sft.main([*full, *argv[4:]])  # the adapter is merged into the weights that are trained
    assert load_model(tmp_path / "full" / "model")
    one, other = (load_model(run / "model").state_dict() for run in (taught, tmp_path / "sft"))
    assert all((one[name] - other[name]).abs().max() < 1e-6 for name in one)


def test_show_writes_no_files(prepared, taught, capsys):
    before = sorted(path.name for path in prepared.rglob("*"))
    summarize.main(["--data", str(prepared), "--name", "nowhere", "--show", "1"])
    out = capsys.readouterr().out
    assert "chain of thought" in out and "is not finished" not in out and ">>> 1. The user: ..." in out
    assert sorted(path.name for path in prepared.rglob("*")) == before


def test_paragraphs_are_taught_by_a_rule():
    items = [{"text": "A.", "facts": {"genre": g, "colour": c, "shape": "x"}} for g, c in ("ab", "cd", "ef", "gh")]
    first = window_paragraph(items[:2], None)
    assert first == "Lately a b, c d." and window_paragraph(items[2:], first) == "Lately e f, g h; before a b, c d."
    assert window_paragraph(items[:1], window_paragraph(items[2:], first)) == "Lately a b; before e f, g h."
    assert profile_of("Lately Horror red, Comedy red; before Comedy blue.") == "Likes red and Comedy."
