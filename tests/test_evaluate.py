"""evaluate.py from end to end, small: its files, its table, other systems' scores, recommending, what it refuses."""

import json
import shutil

import pytest
from conftest import Opened
from stages import dpo, lines, refused

import evaluate
from hanorec.model import finished
from hanorec.model.load import load_tokenizer
from hanorec.ranking import exchange
from hanorec.run.files import UserError


def test_evaluate_files_table_and_comparison(sft_run, dpo_run, capsys):
    results = evaluate.main(["--run", str(dpo_run), "--compare", str(sft_run)])
    table = capsys.readouterr().out
    for name in ("popularity", "co-occurrence", "chance", f"{dpo_run} minus {sft_run}", "leave-one-out", "seed 42"):
        assert name in table
    rows = lines(dpo_run / "predictions.jsonl")
    assert len(rows) == len(lines(sft_run / "predictions.jsonl")) > 5
    for row in rows:
        assert len(row["scores"]) == len(row["yes_scores"]) == len(row["candidates"]) == 10
        assert row["target"] in row["candidates"] and max(row["scores"]) < 0
    metrics = json.loads((dpo_run / "metrics.json").read_text())
    assert metrics["values"] == pytest.approx(results[str(dpo_run)].values)
    low, high = metrics["intervals"]["NDCG@3"]
    assert low <= metrics["values"]["NDCG@3"] <= high
    data = str(json.loads((sft_run / "config.json").read_text())["options"]["data"])
    again = evaluate.main(["--data", data, "--scores", str(dpo_run / "predictions.jsonl")])
    assert again[str(dpo_run / "predictions.jsonl")].values == pytest.approx(metrics["values"])


def test_the_runs_of_the_demo_are_used_only_by_default(sft_run, prepared, tmp_path, monkeypatch, capsys):
    error = refused(capsys, evaluate.main, "--compare", sft_run)
    assert "--compare needs --run" in error
    assert "--export-recbole needs --run" in refused(capsys, evaluate.main, "--export-recbole", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(prepared)
    words = ["--run", str(sft_run), "--data", "link"]  # another spelling of the same folder
    assert evaluate.checked_options(words)[2].resolve() == prepared.resolve()
    (tmp_path / "None").symlink_to(sft_run)  # a run with the name of no --compare
    assert not any(" minus " in name for name in evaluate.main(["--run", "None", "--limit", "2"]))


def test_recbole_export_and_back(sft_run, prepared, tmp_path, capsys):
    """The exported scores read back give the run's own metrics; and RecBole's files hold the same rows."""
    folder = tmp_path / "small"
    mine = evaluate.main(["--run", str(sft_run), "--export-recbole", str(folder)])[str(sft_run)]
    path = folder / "small.candidates.inter"
    theirs = evaluate.main(["--data", str(prepared), "--scores", str(path)])[str(path)]
    assert {n: theirs.values[n] for n in ("HR@1", "NDCG@3", "MRR")} == {
        n: mine.values[n] for n in ("HR@1", "NDCG@3", "MRR")
    }
    test = [line.split("\t") for line in (folder / "small.test.inter").read_text().splitlines()]
    rows = lines(prepared / "test.jsonl")
    assert test[0] == ["user_id:token", "item_id_list:token_seq", "item_id:token"]
    assert test[1:] == [[row["user"], " ".join(row["history"]), row["target"]] for row in rows]
    assert {p.name for p in folder.iterdir()} == {
        f"small.{n}.inter" for n in ("train", "valid", "test", "candidates", "interactions")
    } | {"small.item"}
    pairs = [line.split("\t") for line in (folder / "small.interactions.inter").read_text().splitlines()]
    assert pairs[0] == ["user_id:token", "item_id:token"]
    assert pairs[1:] == [[row["user"], item] for row in lines(prepared / "sequences.jsonl") for item in row["items"]]
    for bad in ("a b", ""):
        catalogue = type("Catalogue", (), {"ids": [bad], "titles": ["A"]})
        with pytest.raises(UserError, match=f"cannot hold the id '{bad}': it is empty, or has white space"):
            exchange.write_recbole(folder, catalogue, {"test": []}, None, {})
    path.write_text(path.read_text().replace("1.0\t", "1.0\toops", 1))
    assert "small.candidates.inter, line" in refused(capsys, evaluate.main, "--data", prepared, "--scores", path)


def test_evaluate_recommends_by_name(sft_run, capsys):
    data = Opened(json.loads((sft_run / "config.json").read_text())["options"]["data"])
    row = data.examples("test")[2]
    evaluate.main(["--run", str(sft_run), "--user", row.user, "--top-k", "3"])
    out = capsys.readouterr().out
    assert all(data.items.titles[item] in out for item in row.history)
    assert sum(f" {place}. " in out for place in range(1, 11)) == 3
    among = [data.items.ids[item] for item in range(4)]
    evaluate.main(["--run", str(sft_run), "--user", row.user, "--from", ",".join(among)])
    out = capsys.readouterr().out
    assert all(f"({item})" in out for item in among) and "top 4" in out


def test_a_dpo_run_is_refused_once_its_sft_run_has_other_weights(sft_run, tmp_path, capsys):
    shutil.copytree(sft_run, tmp_path / "sft")
    dpo(tmp_path / "sft", tmp_path / "dpo")
    weights = tmp_path / "sft" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert "trained on other weights" in refused(capsys, evaluate.main, "--run", tmp_path / "dpo")


def test_blank_images_at_evaluation_change_the_scores(sft_run):
    evaluate.main(["--run", str(sft_run)])
    before = (sft_run / "predictions.jsonl").read_text()
    evaluate.main(["--run", str(sft_run), "--blank-images"])
    assert (sft_run / "predictions.jsonl").read_text() == before != (sft_run / "blank_predictions.jsonl").read_text()


def test_a_run_of_other_titles_is_refused(sft_run, monkeypatch, capsys):
    """The tiny backbone's tokenizer is made of the titles."""

    def other(name, *further):
        tokenizer = load_tokenizer(name, *further)
        if name == sft_run / "model":
            tokenizer.add_tokens(["of other titles"])
        return tokenizer

    monkeypatch.setattr(finished, "load_tokenizer", other)
    assert "has another tokenizer than" in refused(capsys, evaluate.main, "--run", sft_run)


def test_evaluate_refuses_what_is_no_run(prepared, sft_run, tmp_path, capsys, monkeypatch):
    error = refused(capsys, evaluate.main, "--run", sft_run, "--data", tmp_path)
    assert "one data folder at a time" in error
    assert "give a run folder" in refused(capsys, evaluate.main, "--run", tmp_path)
    assert str(sft_run) in refused(capsys, evaluate.main, "--run", sft_run.parent)
    assert "user nobody has no example in" in refused(capsys, evaluate.main, "--run", sft_run, "--user", "nobody")
    error = refused(capsys, evaluate.main, "--run", sft_run, "--user", "1", "--from", "nothing")
    assert "nothing is not in" in error or "has no example in" in error
    assert "needs --data" in refused(capsys, evaluate.main, "--scores", tmp_path / "x.jsonl")
    error = refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "x.jsonl")
    assert "x.jsonl does not exist" in error
    monkeypatch.chdir(tmp_path)
    assert "run sft.py first" in refused(capsys, evaluate.main)
