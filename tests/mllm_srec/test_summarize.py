"""mllm_srec.summarize: crashes, changed options and files, unusable texts. Training and ranking with its texts."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import Opened
from echo import Echo, write
from layouts import lines

import dpo_hano
import evaluate
import sft
from hanorec.model import check
from hanorec.run import records
from hanorec.run.files import UserError, value_hash, write_json
from mllm_srec import summarize, writers
from mllm_srec.texts import PROMPTS_FILE, read_texts
from mllm_srec.writers import titles_with_control_tokens

NAMES = ("items.jsonl", "preferences.jsonl")


@pytest.mark.parametrize("break_after", [0, 9, 70, 130])
def test_a_run_that_was_cut_off_goes_on(data, monkeypatch, break_after):
    whole = write(data, "whole", None, monkeypatch)
    first, second, third = Echo(), Echo(), Echo()
    first.break_after = break_after
    with pytest.raises(KeyboardInterrupt):
        write(data, "cut", first, monkeypatch)
    folder = data / "summaries" / "cut"
    (part,) = folder.glob(".*.part")
    with open(part, "a") as file:
        file.write('{"item": "torn')
    with pytest.raises(UserError, match=r"is not finished|does not exist"):
        Opened(data, summaries="cut").prompts()
    write(data, "cut", second, monkeypatch)
    for name in NAMES:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not list(folder.glob(".*.part"))
    assert first.replies + second.replies <= 2 * sum(len(lines(whole / name)) for name in NAMES)
    write(data, "cut", third, monkeypatch)
    assert third.replies == 0


def test_other_options_start_anew(data, monkeypatch, capsys):
    folder, second = write(data, "a", None, monkeypatch), Echo()
    items = (folder / "items.jsonl").read_bytes()
    write(data, "a", second, monkeypatch, "--step", 1)
    assert (folder / "items.jsonl").read_bytes() == items and second.replies > 0
    out = capsys.readouterr().out
    assert "items.jsonl is kept" in out and "preferences.jsonl is not of this model, these prompts and options" in out
    text = PROMPTS_FILE.read_text().replace("Answer in a few words each", "Answer in one word each")
    (data / "mine.txt").write_text(text)
    write(data, "a", None, monkeypatch, "--prompts", data / "mine.txt")
    assert (folder / "items.jsonl").read_bytes() != items
    assert "one word each" in (folder / "prompts.txt").read_text()


def test_folders_of_earlier_versions_are_kept(data, monkeypatch):
    """The keys in manifest.json must not change. Otherwise all texts would be written again."""
    folder = write(data, "a", None, monkeypatch)
    manifest, texts, identity = json.loads((folder / "manifest.json").read_text()), read_texts(), {"by": "Echo"}
    item_texts = {name: texts[name] for name in ("item", "item without a picture", "item by its picture alone")}
    key = value_hash([identity, "both", Opened(data).encoding.manifest, item_texts])
    assert manifest["items"]["key"] == key and manifest["made_by"] == identity
    names = ("line", "line without a summary", "first preference", "preference", "profile", "nothing")
    summaries = {line["item"]: line["summary"] for line in lines(folder / "items.jsonl")}
    windows = {}
    for line in lines(folder / "preferences.jsonl"):
        _, ends, read = windows.setdefault(line["user"], (line["user"], [], []))
        ends.append(line["end"])
        if line["profile"]:
            read.append(line["end"])
    key = value_hash([identity, [texts[name] for name in names], 3, summaries, manifest["data"], *windows.values()])
    assert manifest["preferences"]["key"] == key


def test_files_that_were_changed_or_deleted_are_refused_and_written_anew(data, monkeypatch, capsys):
    folder = write(data, "a", None, monkeypatch)
    loaded = Opened(data, summaries="a")
    items, command = folder / "items.jsonl", f"; run python -m mllm_srec.summarize --data {data} --name "
    written = items.read_text()
    capsys.readouterr()
    for text, reason in ((written.replace("Film", "Movie"), "was changed after it was written"), (None, "is missing")):
        items.unlink()
        if text:
            items.write_text(text)
        with pytest.raises(UserError, match=f"items.jsonl is missing, or not what manifest.json lists{command}a"):
            loaded.prompts()
        write(data, "a", None, monkeypatch)
        assert f"items.jsonl {reason}: it is written now" in capsys.readouterr().out and items.read_text() == written
    (folder / "prompts.txt").write_text((folder / "prompts.txt").read_text().replace("No.", "Never."))
    with pytest.raises(UserError, match=f"prompts.txt is not what manifest.json lists{command}a"):
        loaded.prompts()
    with pytest.raises(UserError, match=f"nothing/manifest.json does not exist{command}nothing"):
        Opened(data, summaries="nothing").prompts()


def test_a_backbone_that_cannot_be_packed_writes(data, monkeypatch):
    own = check.score_both_ways

    def score(packed, encoding):
        if packed.pack:
            raise UserError("packing does not work")
        return own(packed, encoding)

    monkeypatch.setattr(check, "score_both_ways", score)
    with pytest.raises(SystemExit):  # the untrained backbone writes no usable text
        summarize.main(["--data", str(data), "--max-tokens", "2"])
    assert len(lines(data / "summaries" / "tiny" / "items.jsonl")) == 60


def test_parts_of_several_processes_and_of_other_keys(tmp_path):
    """The file gets the lines of every process, but no lines that were written for another key."""
    path = tmp_path / "items.jsonl"
    for rank, key in ((0, "k"), (1, "k"), (2, "other")):
        process = SimpleNamespace(process_index=rank, wait_for_everyone=lambda: None)
        records.Record(path, key, process).add([{"n": rank}])
    process = SimpleNamespace(process_index=0, wait_for_everyone=lambda: None, is_main_process=True)
    record = records.Record(path, "k", process)
    assert sorted(line["n"] for line in record.done) == [0, 1]
    record.add([{"n": 7}])
    assert [line["n"] for line in record.finish(lambda line: -line["n"])] == [7, 1, 0]
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
def test_which_texts_are_summaries(text, fault, summary):
    reply = writers.Reply.checked(text).summary()
    assert (reply.fault, reply.line()) == (fault, summary)
    assert writers.Reply.checked(text, ended=False).summary().line() is None


class Mute(Echo):
    """A text generator whose texts are unusable after the first `good` calls."""

    good = 0

    def __call__(self, many):
        replies = super().__call__(many)
        self.good -= 1
        return replies if self.good >= 0 else [writers.Reply("on and on", "limit") for _ in many]


def test_a_writer_without_usable_texts_is_refused_and_leaves_an_unfinished_folder(data, monkeypatch, capsys):
    write(data, "mute", None, monkeypatch)
    for _ in range(2):  # the second run counts the texts of the first
        with pytest.raises(SystemExit):
            write(data, "mute", Mute(), monkeypatch)
        assert "summaries is usable (60 limit); the first reply is 'on and on'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is not finished; run python -m mllm_srec.summarize"):
        Opened(data, summaries="mute").prompts()


def test_unusable_texts_after_usable_ones_do_not_stop_the_run(data, monkeypatch):
    first, second = Echo(), Mute()
    first.break_after = 56
    with pytest.raises(KeyboardInterrupt):
        write(data, "cut", first, monkeypatch)
    second.name = "Echo"
    with pytest.raises(SystemExit):  # no paragraph is usable, but 56 summaries are
        write(data, "cut", second, monkeypatch)
    items = lines(data / "summaries" / "cut" / "items.jsonl")
    assert sum(line["fault"] is None for line in items) == 56 and len(items) == 60


def test_items_are_kept_when_a_run_dies_before_the_preferences(data, monkeypatch):
    class FailingRecord(records.Record):
        def __init__(self, path, *further):
            if path.stem == "preferences":
                raise KeyboardInterrupt
            super().__init__(path, *further)

    first, second = Echo(), Echo()
    with monkeypatch.context() as patch:
        patch.setattr(summarize, "Record", FailingRecord)
        with pytest.raises(KeyboardInterrupt):
            write(data, "cut", first, monkeypatch)
    write(data, "cut", second, monkeypatch)
    whole = write(data, "whole", None, monkeypatch)
    assert first.replies == 60 and second.replies <= 2 * len(lines(whole / "preferences.jsonl"))


def test_summaries_of_other_pictures_are_refused(data, monkeypatch):
    write(data, "a", None, monkeypatch)
    write(data, "text", None, monkeypatch, "--sees", "text")
    (encoded,) = data.glob("encoded/*/manifest.json")
    write_json(encoded, json.loads(encoded.read_text()) | {"tokens": "of other pictures"})
    with pytest.raises(UserError, match="was written for other items, timelines or pictures"):
        Opened(data, summaries="a").prompts()
    Opened(data, summaries="text").prompts()


def test_after_an_unusable_paragraph_the_last_usable_one_is_used(data, monkeypatch, capsys):
    """Paragraphs are unusable from the second window on. Examples read the first one, and profiles made from it."""

    class FirstOnly(Echo):
        def __call__(self, many):
            later = [any("Paragraph: " in part for part in parts if isinstance(part, str)) for parts in many]
            replies = zip(later, super().__call__(many), strict=True)
            return [writers.Reply("cut", "limit") if unusable else reply for unusable, reply in replies]

    folder = write(data, "first", FirstOnly(), monkeypatch)
    assert " limit" in capsys.readouterr().out
    windows = lines(folder / "preferences.jsonl")
    later = [window for window in windows if window["end"] > 3]
    assert later and all(window["fault"] == "limit" and window["profile_fault"] is None for window in later)
    assert any(window["profile"] for window in later)
    first = {window["user"]: window for window in windows if window["end"] == 3}
    loaded = Opened(data, summaries="first")
    user_texts = loaded.prompts().user_texts
    for example in loaded.examples("test"):
        values = user_texts.prompt_values(example)
        assert values["preference"] == first[example.user]["paragraph"] and values["profile"] != "not known"


class EveryThirdUnusable(Echo):
    """A text generator with every third text unusable."""

    def __call__(self, many):
        replies = super().__call__(many)
        for number in range(0, len(many), 3):
            replies[number] = writers.Reply("Summary: cut off in the mid", "limit")
        return replies


def test_unusable_texts_are_counted_and_left_out_of_prompts(data, monkeypatch, capsys):
    folder = write(data, "some", EveryThirdUnusable(), monkeypatch)
    assert re.search(r"items.jsonl: \d+ lines, \d+ limit, \d+ usable", capsys.readouterr().out)
    unusable = [line for line in lines(folder / "items.jsonl") if line["fault"]]
    assert unusable and all(line["summary"] is None for line in unusable)
    loaded = Opened(data, summaries="some")
    prompts = loaded.prompts()
    text = "".join(prompts.show(prompts.sft_tree(example, "yesno")) for example in loaded.examples("train"))
    assert "in the mid" not in text and "not known" in text


def test_titles_that_spell_control_tokens_are_counted(data, monkeypatch, capsys):
    tokenizer, encoding = Opened(data).prompts().tokenizer, Opened(data).encoding
    encoding.items.titles = ["Heat", "<|image_pad|>", "a <|im_end|> b"]
    assert {"<|im_end|>", "<|image_pad|>", "<|endoftext|>"} <= set(writers.control_tokens(tokenizer))
    assert titles_with_control_tokens(encoding) == 2
    write(data, "echo", None, monkeypatch)
    assert "spell control tokens" not in capsys.readouterr().out


def test_options_without_an_effect_are_refused(data, capsys):
    for main, argv, message in (
        (summarize.main, ["--before", "5", "--window", "0"], "--before is for windows"),
        (summarize.main, ["--server-model", "m"], "--server-model is for --server"),
        (sft.main, ["--steps-share", "0.5"], "--steps-share is for --prompt cot"),
        (sft.main, ["--data", str(data), "--prompt", "cot", "--blank-images"], "give one of the two, not both"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert message in capsys.readouterr().err


def test_shown_prompts_come_from_the_given_file_and_are_escaped(data, monkeypatch, capsys):
    write(data, "tiny", None, monkeypatch)
    (data / "mine.txt").write_text(PROMPTS_FILE.read_text().replace("step by step", "step \x1b[2J by step"))
    summarize.main(["--data", str(data), "--show", "1", "--prompts", str(data / "mine.txt")])
    out = capsys.readouterr().out
    assert "step \\x1b[2J by step" in out and "\x1b" not in out


def test_chain_of_thought_from_training_to_ranking(data, tmp_path, monkeypatch):
    """sft.py, dpo_hano.py and evaluate.py use the same texts. A run cannot be evaluated with other texts."""
    write(data, "echo", None, monkeypatch)
    small = "--max-steps 3 --batch-size 6 --eval-limit 6".split()
    cot = ["--prompt", "cot", "--summaries", "echo", "--warmup-steps", "1"]
    sft.main(["--data", str(data), "--out", str(tmp_path / "sft"), *cot, *small])
    dpo_hano.main(["--sft", str(tmp_path / "sft"), "--out", str(tmp_path / "dpo"), *small])
    other = Echo()
    other.name = "Reverb"  # another model that writes the same texts: the runs stay valid
    write(data, "echo", other, monkeypatch, "--batch-size", 2)
    words = ["--run", str(tmp_path / "dpo"), str(tmp_path / "sft"), "--limit", "8"]
    results = evaluate.main([*words, "--report", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    example = Opened(data).examples("test", 1)[0]
    summaries = {line["item"]: line["summary"] for line in lines(data / "summaries" / "echo" / "items.jsonl")}
    windows = [
        line for line in lines(data / "summaries" / "echo" / "preferences.jsonl") if line["user"] == example.user
    ]
    target = Opened(data).items.ids[example.target]
    for text in (summaries[target], windows[-1]["paragraph"], windows[-1]["profile"]):
        assert page.count(f"<dd>{text}</dd>") >= 2  # beside the example, for both runs
    assert {"AUC", "HR@3", "MRR"} <= set(results[str(tmp_path / "dpo")].values)
    (first, *_) = lines(tmp_path / "sft" / "first8_predictions.jsonl")
    assert first["scores"] == first["yes_scores"] and len(set(first["scores"])) > 5
    evaluate.main(["--run", str(tmp_path / "sft"), "--limit", "8", "--no-pack"])
    (plain, *_) = lines(tmp_path / "sft" / "first8_predictions.jsonl")
    assert plain["scores"] == pytest.approx(first["scores"], abs=1e-4)
    write(data, "echo", None, monkeypatch, "--step", 1)
    with pytest.raises(SystemExit):
        evaluate.main(["--run", str(tmp_path / "sft")])
