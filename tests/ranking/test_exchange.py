"""Other systems' scores: aligned by candidate, or refused."""

import json

import pytest
from layouts import lines
from spoilt import refused

import evaluate
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


def row_of(prepared):
    row = lines(prepared / "test.jsonl")[0]
    return {"user": row["user"], "target": row["target"], "candidates": row["candidates"], "scores": [1.0] * 10}


PREDICTIONS = {
    "empty": (lambda row: "", "has no line for user"),
    "junk": (lambda row: "\0\1\2", "not JSON"),
    "a list": (lambda row: "[]", "no JSON object"),
    "no scores": (lambda row: json.dumps(row | {"scores": None}), "has no line for user"),
    "a string for candidates": (lambda row: json.dumps(row | {"candidates": "abc"}), "'candidates' cannot be"),
    "another candidate": (lambda row: json.dumps(row | {"candidates": row["candidates"][1:]}), "not the candidates"),
    "NaN": (lambda row: json.dumps(row | {"scores": [float("nan")] * 10}), "finite number"),
    "a number of 400 digits": (lambda row: json.dumps(row | {"scores": [10**400] * 10}), "finite number"),
    "too few scores": (lambda row: json.dumps(row | {"scores": [1.0]}), "finite number"),
    "scores that are strings": (lambda row: json.dumps(row | {"scores": ["1"] * 10}), "finite number"),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_spoilt_predictions(name, prepared, tmp_path, capsys):
    made, expected = PREDICTIONS[name]
    (tmp_path / "scores.jsonl").write_text(made(row_of(prepared)) + "\n" * bool(made(row_of(prepared))))
    error = refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "scores.jsonl")
    assert expected in error or "has no line for user" in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("user_id:token\titem_id:token\n1\t2\n", "lacks user_id, item_id, label, score"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\tyes\t1\n", "line 2: expected user_id"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t1\n", "line 2: expected user_id"),
        ("user_id\titem_id\tlabel\tscore\n1\t2\t1\tinf\n", "has no line for user"),
        ("\0\1\2", "lacks user_id"),
    ],
)
def test_spoilt_recbole_scores(text, expected, prepared, tmp_path, capsys):
    (tmp_path / "x.inter").write_text(text)
    assert expected in refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "x.inter")
