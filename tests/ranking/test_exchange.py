"""Other systems' scores: aligned by candidate, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from layouts import lines
from spoilt import refused

import evaluate
from hanorec.data.folder import DataFolder
from hanorec.ranking import exchange
from hanorec.run.files import UserError

IDS = ["a", "b", "c"]


class Row:
    user, target, candidates = "u1", 1, [2, 1]


def write(path, **changes):
    line = {"user": "u1", "target": "b", "candidates": ["b", "c"], "scores": [0.5, 0.25], **changes}
    path.write_text(json.dumps(line) + "\n")


def test_other_systems_scores_are_aligned_by_candidate(tmp_path):
    path = tmp_path / "scores.jsonl"
    write(path)
    scores, yes = exchange.read_scores(path, IDS, [Row])
    assert scores.tolist() == [[0.25, 0.5]] and yes is None
    write(path, yes_scores=[3, 4])
    assert exchange.read_scores(path, IDS, [Row])[1].tolist() == [[4, 3]]


def test_two_lines_for_one_example_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    write(path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(UserError, match="two lines for user u1 with target b"):
        exchange.read_scores(path, IDS, [Row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "u2"}, "no line for user u1 with target b"),
        ({"candidates": ["b", "a"]}, "not the candidates"),
        ({"scores": [1.0]}, "one finite number"),
        ({"scores": [1.0, float("nan")]}, "one finite number"),
    ],
)
def test_wrong_scores_are_refused(tmp_path, changes, message):
    path = tmp_path / "scores.jsonl"
    write(path, **changes)
    with pytest.raises(UserError, match=message):
        exchange.read_scores(path, IDS, [Row])


def with_(**changes):
    """The first line, with these changes of its fields."""
    return lambda row: json.dumps(row | changes)


PREDICTIONS = {  # what the first line becomes, and the error
    "missing": (lambda row: None, "has no line for user"),
    "junk": (lambda row: "\0\1\2", "line 1: not JSON"),
    "a list": (lambda row: "[]", "no JSON object"),
    "no scores": (with_(scores=None), "line 1: 'scores' cannot be null"),
    "a string for candidates": (with_(candidates="abc"), "'candidates' cannot be"),
    "a missing candidate": (lambda row: json.dumps(row | {"candidates": row["candidates"][1:]}), "not the candidates"),
    "NaN": (with_(scores=[float("nan")] * 10), "scores must hold one finite number"),
    "a number of 400 digits": (with_(scores=[10**400] * 10), "scores must hold one finite number"),
    "too few scores": (with_(scores=[1.0]), "scores must hold one finite number"),
    "scores that are strings": (with_(scores=["1"] * 10), "scores must hold one finite number"),
    "scores that are true": (with_(scores=[True, False] * 5), "scores must hold one finite number"),
    "yes_scores of one example": (with_(yes_scores=[1.0] * 10), "only some examples have yes_scores"),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_spoilt_predictions(name, prepared, tmp_path, capsys):
    change, expected = PREDICTIONS[name]
    rows = [row | {"scores": [1.0] * 10} for row in lines(prepared / "test.jsonl")]
    texts = [change(rows[0]), *map(json.dumps, rows[1:])]
    (tmp_path / "scores.jsonl").write_text("".join(f"{text}\n" for text in texts if text))
    assert expected in refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "scores.jsonl")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("user_id:token\titem_id:token\n1\t2\n", "lacks label, score; give"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\tyes\t1\n", "line 2: expected user_id"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t0.5\t1\n", "0 or 1 in label"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t1\t1\n1\t3\t1\t1\n", "line 3: user 1 has label 1 twice"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t0\t1\n", "user 1 has no line with label 1"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t1\n", "line 2: expected user_id"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t1\tinf\n", "has no line for user"),
        ("\0\1\2", "lacks user_id"),
    ],
)
def test_spoilt_recbole_scores(text, expected, prepared, tmp_path, capsys):
    (tmp_path / "x.inter").write_text(text)
    assert expected in refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "x.inter")


def test_recbole_files_are_named_like_the_folder_also_if_it_is_the_current_one(prepared, tmp_path, monkeypatch):
    data = DataFolder(prepared)
    splits = {split: data.examples(split) for split in ("train", "val", "test")}
    splits["candidates"] = splits["test"]
    scores = np.arange(10.0 * len(splits["test"])).reshape(-1, 10)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    exchange.write_recbole(Path("."), data.items, splits, scores, data.sequences())
    kinds = ["candidates.inter", "interactions.inter", "item", "test.inter", "train.inter", "valid.inter"]
    assert sorted(path.name for path in Path(".").iterdir()) == [f"mine.{kind}" for kind in kinds]
    read, _ = exchange.read_scores(Path("mine.candidates.inter"), data.items.ids, splits["test"])
    assert (read == scores).all()
