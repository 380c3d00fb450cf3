"""summarize.py: a crash or a bad reply leaves no trace, and training and ranking on what it wrote."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import Opened
from echo import Echo, lines, write

import dpo_hano
import evaluate
import sft
from hanorec.run.files import UserError, write_json
from mllm_srec import records, summarize, writers
from mllm_srec.texts import PROMPTS_FILE
from mllm_srec.writers import titles_with_control_tokens


@pytest.mark.parametrize("broken", [0, 9, 70, 130])
def test_a_run_that_was_cut_off_goes_on(data, monkeypatch, broken):
    whole = write(data, "whole", None, monkeypatch)
    first, second = Echo(), Echo()
    first.break_after = broken
    with pytest.raises(KeyboardInterrupt):
        write(data, "cut", first, monkeypatch)
    folder = data / "summaries" / "cut"
    (part,) = folder.glob(".*.part")
    with open(part, "a") as file:
        file.write('{"item": "torn')
    with pytest.raises(UserError, match=r"is not finished|does not exist"):
        Opened(data, summaries="cut").prompts()
    write(data, "cut", second, monkeypatch)
    for name in ("items.jsonl", "preferences.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not list(folder.glob(".*.part"))
    assert first.asked + second.asked <= sum(len(lines(whole / n)) for n in ("items.jsonl", "preferences.jsonl")) * 2
    again = Echo()
    write(data, "cut", again, monkeypatch)
    assert again.asked == 0


def test_other_options_start_anew(data, monkeypatch, capsys):
    folder = write(data, "a", None, monkeypatch)
    first, counts = (folder / "items.jsonl").read_bytes(), Echo()
    write(data, "a", counts, monkeypatch, "--step", 1)  # the items stand
    assert (folder / "items.jsonl").read_bytes() == first and counts.asked > 0
    out = capsys.readouterr().out
    assert "items.jsonl stands" in out and "preferences.jsonl is not of this model, these prompts and options" in out
    text = PROMPTS_FILE.read_text().replace("Answer in a few words each", "Answer in one word each")
    (data / "mine.txt").write_text(text)
    write(data, "a", None, monkeypatch, "--prompts", data / "mine.txt")
    assert (folder / "items.jsonl").read_bytes() != first
    assert "one word each" in (folder / "prompts.txt").read_text()


def test_files_that_were_changed_are_refused(data, monkeypatch):
    folder = write(data, "a", None, monkeypatch)
    loaded = Opened(data, summaries="a")
    loaded.prompts()
    (folder / "items.jsonl").write_text((folder / "items.jsonl").read_text().replace("Film", "Movie"))
    with pytest.raises(
        UserError, match=r"items.jsonl is not what manifest.json lists; delete it and run mllm_srec.summarize"
    ):
        loaded.prompts()
    (folder / "prompts.txt").write_text((folder / "prompts.txt").read_text().replace("No.", "Never."))
    with pytest.raises(
        UserError, match=r"prompts.txt is not what manifest.json lists; run mllm_srec.summarize --name a"
    ):
        loaded.prompts()
    write(data, "a", None, monkeypatch)
    assert "Movie" not in (folder / "items.jsonl").read_text()
    with pytest.raises(
        UserError, match=r"nothing/manifest.json does not exist; run mllm_srec.summarize --name nothing"
    ):
        Opened(data, summaries="nothing").prompts()


def test_parts_of_several_processes_and_of_other_keys(tmp_path):
    """Lines of every process count, those of another key do not."""
    path, made = tmp_path / "items.jsonl", []
    for rank, key in ((0, "k"), (1, "k"), (2, "other")):
        record = records.Record(path, key, SimpleNamespace(process_index=rank, wait_for_everyone=lambda: None))
        record.add([{"n": rank}])
        made.append(record)
    one = SimpleNamespace(process_index=0, wait_for_everyone=lambda: None, is_main_process=True)
    again = records.Record(path, "k", one)
    assert sorted(line["n"] for line in again.done) == [0, 1]
    again.add([{"n": 7}])
    assert [line["n"] for line in again.finish(lambda line: -line["n"])] == [7, 1, 0]
    assert [line["n"] for line in lines(path)] == [7, 1, 0] and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    ("text", "fault", "summary"),
    [
        ("1. A film.\nSummary: A red  poster.\nIt is old.", None, "A red poster. It is old."),
        ("**Summary:** A red poster.", None, "A red poster."),
        ("", "empty", None),
        ("Summary: ...", "empty", None),
        ("I'm sorry, but I cannot describe people.", "refused", None),
        ("Summary: I cannot see a picture.", "refused", None),
        ("Summary: Sorry, but I can\u2019t help with that.", "refused", None),
        ("Summary: Sorry, Wrong Number, a film of 1948.", None, "Sorry, Wrong Number, a film of 1948."),
        ("Summary: I Can't Sleep, a drama.", None, "I Can't Sleep, a drama."),
        ("I apologize, but I cannot tell.", "refused", None),
        ("Summary: Unfortunately, I'm not able to see it.", "refused", None),
        ("Summary: I don\u2019t have the ability to view pictures.", "refused", None),
        ("As an AI language model, I see nothing.", "refused", None),
        ("Summary: As an AI falls in love, he flees.", None, "As an AI falls in love, he flees."),
        ("Summary: Sorry I'm Late, a comedy.", None, "Sorry I'm Late, a comedy."),
        ("A red poster.", "no_summary", None),
    ],
)
def test_what_is_no_summary(text, fault, summary):
    reply = writers.Reply(text).checked().summary()
    assert (reply.fault, reply.line()) == (fault, summary)
    assert writers.Reply(text, "limit").checked().summary().line() is None


class Mute(Echo):
    """No text is usable, but of the first `good` calls."""

    good = 0

    def __call__(self, many):
        replies = super().__call__(many)
        self.good -= 1
        return replies if self.good >= 0 else [writers.Reply("on and on", "limit") for _ in many]


def test_a_writer_of_nothing_is_refused_each_time_and_leaves_no_finished_folder(data, monkeypatch, capsys):
    folder = write(data, "mute", None, monkeypatch)
    for _ in range(2):  # what the first run left counts in the second
        with pytest.raises(SystemExit):
            write(data, "mute", Mute(), monkeypatch)
        assert "summaries is usable (60 limit); the first reply is 'on and on'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is not finished; run mllm_srec.summarize"):
        Opened(data, summaries="mute").prompts()
    assert folder.exists()


def test_one_bad_text_behind_many_good_ones_of_an_earlier_run_stops_nothing(data, monkeypatch):
    first, second = Echo(), Mute()
    first.break_after = 56
    with pytest.raises(KeyboardInterrupt):
        write(data, "cut", first, monkeypatch)
    second.name = "Echo"
    with pytest.raises(SystemExit):  # of the paragraphs none is usable; of the items 56 are
        write(data, "cut", second, monkeypatch)
    found = lines(data / "summaries" / "cut" / "items.jsonl")
    assert sum(line["fault"] is None for line in found) == 56 and len(found) == 60


def test_items_stand_when_a_run_dies_before_the_preferences(data, monkeypatch):
    first, second = Echo(), Echo()
    with monkeypatch.context() as patch:
        patch.setattr(summarize, "users_windows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(data, "cut", first, monkeypatch)
    write(data, "cut", second, monkeypatch)
    whole = write(data, "whole", None, monkeypatch)
    assert first.asked == 60 and second.asked <= 2 * len(lines(whole / "preferences.jsonl"))


def test_summaries_of_other_pictures_are_refused(data, monkeypatch):
    write(data, "a", None, monkeypatch)
    write(data, "text", None, monkeypatch, "--sees", "text")
    (encoded,) = data.glob("encoded/*/manifest.json")
    write_json(encoded, json.loads(encoded.read_text()) | {"tokens": "of other pictures"})
    with pytest.raises(UserError, match="was written for another state of its data"):
        Opened(data, summaries="a").prompts()
    Opened(data, summaries="text").prompts()


def test_a_bad_paragraph_leaves_the_one_before_with_its_profile(data, monkeypatch, capsys):
    """Paragraphs from a user's second window on are at fault: rows read the first, and a profile of it."""

    class Once(Echo):
        def __call__(self, many):
            later = [any("Paragraph: " in part for part in parts if isinstance(part, str)) for parts in many]
            replies = zip(later, super().__call__(many), strict=True)
            return [writers.Reply("cut", "limit") if bad else reply for bad, reply in replies]

    folder = write(data, "once", Once(), monkeypatch)
    assert " limit" in capsys.readouterr().out
    points = lines(folder / "preferences.jsonl")
    later = [point for point in points if point["end"] > 3]
    assert later and all(point["fault"] == "limit" and point["profile_fault"] is None for point in later)
    loaded = Opened(data, summaries="once")
    told, first = loaded.prompts(), {point["user"]: point for point in points if point["end"] == 3}
    for row in loaded.examples("test"):
        values = told.user_texts.at(row)
        assert values["preference"] == first[row.user]["paragraph"] and values["profile"] != "not known"


class Moody(Echo):
    """Every third text is at fault."""

    def __call__(self, many):
        replies = super().__call__(many)
        for number in range(0, len(many), 3):
            replies[number] = writers.Reply("Summary: cut off in the mid", "limit")
        return replies


def test_what_is_at_fault_is_counted_and_never_told(data, monkeypatch, capsys):
    folder = write(data, "moody", Moody(), monkeypatch)
    assert re.search(r"items.jsonl: \d+ lines, \d+ limit, \d+ usable", capsys.readouterr().out)
    bad = {line["item"] for line in lines(folder / "items.jsonl") if line["fault"]}
    assert bad and all(line["summary"] is None for line in lines(folder / "items.jsonl") if line["item"] in bad)
    loaded = Opened(data, summaries="moody")
    told = loaded.prompts()
    text = "".join(told.show(told.sft_tree(row, "yesno")) for row in loaded.examples("train"))
    assert "in the mid" not in text and "not known" in text
    monkeypatch.setattr(Moody, "__call__", lambda self, many: [writers.Reply("", "limit") for _ in many])
    with pytest.raises(SystemExit):
        write(data, "bad", Moody(), monkeypatch)
    assert "summaries is usable" in capsys.readouterr().err


def test_titles_that_spell_control_tokens_are_counted(data, monkeypatch, capsys):
    tokenizer, encoding = Opened(data).prompts().tokenizer, Opened(data).encoding
    encoding.items.titles = ["Heat", "<|image_pad|>", "a <|im_end|> b"]
    assert {"<|im_end|>", "<|image_pad|>", "<|endoftext|>"} <= set(writers.control_tokens(tokenizer))
    assert titles_with_control_tokens(encoding) == 2
    write(data, "echo", None, monkeypatch)
    assert "spell control tokens" not in capsys.readouterr().out


def test_options_that_would_do_nothing_are_refused(data, capsys):
    for main, argv, told in (
        (summarize.main, ["--before", "5", "--window", "0"], "--before is for windows"),
        (summarize.main, ["--server-model", "m"], "--server-model is for --server"),
        (sft.main, ["--steps-share", "0.5"], "--steps-share is for --prompt cot"),
        (sft.main, ["--data", str(data), "--prompt", "cot", "--blank-images"], "--blank-images hides little"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert told in capsys.readouterr().err


def test_prompts_are_shown_as_given_and_escaped(data, monkeypatch, capsys):
    text = (data / "items.jsonl").read_text()
    write(data, "tiny", None, monkeypatch)
    (data / "mine.txt").write_text(PROMPTS_FILE.read_text().replace("step by step", "step \x1b[2J by step"))
    summarize.main(["--data", str(data), "--show", "1", "--prompts", str(data / "mine.txt")])
    out = capsys.readouterr().out
    assert "step \\x1b[2J by step" in out and "\x1b" not in out and text


def test_chain_of_thought_from_training_to_ranking(data, tmp_path, monkeypatch):
    """sft.py, dpo_hano.py and evaluate.py on these prompts; other summaries stop what was trained on the first."""
    write(data, "echo", None, monkeypatch)
    small = "--max-steps 3 --batch-size 6 --eval-limit 6".split()
    cot = ["--prompt", "cot", "--summaries", "echo", "--warmup-steps", "1"]
    sft.main(["--data", str(data), "--out", str(tmp_path / "sft"), *cot, *small])
    dpo_hano.main(["--sft", str(tmp_path / "sft"), "--out", str(tmp_path / "dpo"), *small])
    other = Echo()
    other.name = "Reverb"  # the same texts of another model: what was trained on them stays good
    write(data, "echo", other, monkeypatch, "--batch-size", 2)
    results = evaluate.main(["--run", str(tmp_path / "dpo"), str(tmp_path / "sft"), "--limit", "8"])
    assert {"AUC", "HR@3", "MRR"} <= set(results[str(tmp_path / "dpo")].values)
    (first, *_) = lines(tmp_path / "sft" / "first8_predictions.jsonl")
    assert first["scores"] == first["yes_scores"] and len(set(first["scores"])) > 5
    evaluate.main(["--run", str(tmp_path / "sft"), "--limit", "8", "--no-pack"])
    (plain, *_) = lines(tmp_path / "sft" / "first8_predictions.jsonl")
    assert plain["scores"] == pytest.approx(first["scores"], abs=1e-4)
    write(data, "echo", None, monkeypatch, "--step", 1)
    with pytest.raises(SystemExit):
        evaluate.main(["--run", str(tmp_path / "sft")])
