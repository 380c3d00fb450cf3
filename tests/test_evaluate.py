"""evaluate.py from end to end, small: its files, its table, other systems' scores, recommending, what it refuses."""

import csv
import json
import shutil

import pytest
from conftest import Opened, words
from safetensors.torch import load_file, save_file
from stages import dpo, lines, refused

import dpo_hano
import evaluate
from hanorec.model import finished, prompts
from hanorec.model.load import load_tokenizer
from hanorec.ranking import exchange
from hanorec.run.files import UserError, file_hash, write_json, write_jsonl
from hanorec.run.runs import begin_run, weights_hash
from mllm_srec import scored_runs


def test_evaluate_files_table_and_comparison(sft_run, dpo_run, capsys):
    results = evaluate.main(["--run", str(dpo_run), "--compare", str(sft_run), "--slices"])
    table = capsys.readouterr().out
    for name in ("popularity", "co-occurrence", "chance", f"minus {sft_run}", "leave-one-out", "seed 42"):
        assert name in table
    rows = lines(dpo_run / "predictions.jsonl")
    assert len(rows) == len(lines(sft_run / "predictions.jsonl")) > 5
    for row in rows:
        assert len(row["scores"]) == len(row["yes_scores"]) == len(row["candidates"]) == 10
        assert row["target"] in row["candidates"] and max(row["scores"]) < 0
    metrics = json.loads((dpo_run / "metrics.json").read_text())
    assert metrics["values"] == pytest.approx(results[str(dpo_run)].values)
    difference = results[f"{dpo_run} minus {sft_run}"]
    for stored, result in ((metrics, results[str(dpo_run)]), (metrics[f"minus {sft_run}"], difference)):
        assert len(stored["slices"]) == 4
        for slicing, slices in stored["slices"].items():
            assert sum(part["examples"] for part in slices.values()) == len(rows)
            for name, part in slices.items():
                assert part["intervals"]["MRR"] == result.slices[slicing][name].interval("MRR")
                assert table.count(f" {name} ") >= 2
    low, high = metrics["intervals"]["NDCG@3"]
    assert low <= metrics["values"]["NDCG@3"] <= high
    data = str(json.loads((sft_run / "config.json").read_text())["options"]["data"])
    again = evaluate.main(["--data", data, "--scores", str(dpo_run / "predictions.jsonl")])
    assert again[str(dpo_run / "predictions.jsonl")].values == pytest.approx(metrics["values"])


def test_report_and_result_files(sft_run, dpo_run, tmp_path, capsys):
    """--report writes into the run, and of several runs into the file. The screen shows no slices."""
    words = ["--limit", "6", "--compare", str(sft_run), "--run"]
    results = evaluate.main([*words, str(dpo_run), "--report"])
    printed = capsys.readouterr().out
    page = (dpo_run / "first6_report.html").read_text(encoding="utf-8")
    assert f"{dpo_run / 'first6_report.html'}: open it in a browser" in printed
    for title in ("loss", "validation", "accuracy", "margin", "rewards", "eta", "lambda", "beta", "noise"):
        assert f"<figcaption><b>{title}</b>" in page
    assert page.index(f"<summary>{sft_run}</summary>") < page.index(f"<summary>{dpo_run}</summary>")
    text = (dpo_run / "first6_results.md").read_text(encoding="utf-8")
    assert "popularity of the target" in text and "popularity of the target" not in printed
    assert f"next: python -m hanorec.recommend --run {dpo_run} --user " in printed
    assert text.split("\n\n")[1] in printed and (sft_run / "first6_results.md").read_text(encoding="utf-8") == text
    with open(dpo_run / "first6_results.csv", newline="", encoding="utf-8") as file:
        whole = {
            (row["system"], row["minus"], row["metric"]): row for row in csv.DictReader(file) if not row["slicing"]
        }
    assert float(whole[str(dpo_run), "", "MRR"]["value"]) == results[str(dpo_run)].values["MRR"]
    difference = results[f"{dpo_run} minus {sft_run}"].interval("AUC")
    assert float(whole[str(dpo_run), str(sft_run), "AUC"]["low"]) == difference[0]

    assert "of several runs" in refused(capsys, evaluate.main, "--run", sft_run, dpo_run, "--report")
    assert "is a folder" in refused(capsys, evaluate.main, "--run", sft_run, "--report", tmp_path)
    assert "do not give" in refused(capsys, evaluate.main, "--run", sft_run, "--user", "1", "--report")
    path = tmp_path / "both.html"
    results = evaluate.main(["--limit", "6", "--run", str(sft_run), str(dpo_run), "--report", str(path)])
    assert f"{dpo_run} minus {sft_run}" in results and path.stat().st_size < 5e6
    shutil.copytree(dpo_run, tmp_path / "again")
    begin_run(tmp_path / "again", "dpo_hano", {"overwrite": True})
    assert not list((tmp_path / "again").glob("first6_*"))


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


def test_blank_and_shuffled_images_change_the_scores(sft_run, monkeypatch, capsys):
    """The share of changed ranks is that of the files; without the run's own predictions they are computed."""
    words = ["--run", str(sft_run), "--limit", "6"]
    evaluate.main(words)
    own = (sft_run / "first6_predictions.jsonl").read_text()
    scored = []
    score_run = scored_runs.score_run
    for module in (evaluate, scored_runs):
        monkeypatch.setattr(module, "score_run", lambda *given: scored.append(given) or score_run(*given))

    def ranks(prefix):
        rows = lines(sft_run / f"{prefix}predictions.jsonl")
        positions = [row["candidates"].index(row["target"]) for row in rows]
        return [
            (sum(s > row["scores"][n] for s in row["scores"]), sum(s == row["scores"][n] for s in row["scores"]))
            for row, n in zip(rows, positions, strict=True)
        ]

    for option, prefix in (("--blank-images", "blank_first6_"), ("--shuffle-images", "shuffled_first6_")):
        scored.clear()
        evaluate.main([*words, option])
        assert len(scored) == 1
        assert (
            (sft_run / "first6_predictions.jsonl").read_text()
            == own
            != (sft_run / f"{prefix}predictions.jsonl").read_text()
        )
        changed = sum(one != other for one, other in zip(ranks(prefix), ranks("first6_"), strict=True)) / len(
            ranks("first6_")
        )
        assert json.loads((sft_run / f"{prefix}metrics.json").read_text())["rank_changes"] == pytest.approx(changed)
        assert f"{changed:.1%} of the targets have another rank" in capsys.readouterr().out
    stored = (sft_run / "shuffled_first6_predictions.jsonl").read_text()
    (sft_run / "first6_predictions.jsonl").unlink()
    scored.clear()
    evaluate.main([*words, "--shuffle-images", "--images", "live"])
    assert len(scored) == 2 and not (sft_run / "first6_predictions.jsonl").exists()
    assert f"{changed:.1%} of the targets have another rank" in capsys.readouterr().out
    for one, other in zip(stored.splitlines(), lines(sft_run / "shuffled_first6_predictions.jsonl"), strict=True):
        assert other["scores"] == pytest.approx(json.loads(one)["scores"], abs=1e-4)
    error = refused(capsys, evaluate.main, "--run", sft_run, "--shuffle-images", "--blank-images")
    assert "give --blank-images or --shuffle-images, not both" in error
    assert "do not give --pool, --slices" in refused(capsys, evaluate.main, "--user", "1", "--slices")


def test_a_run_of_other_titles_is_refused(sft_run, monkeypatch, capsys):
    """The tiny backbone's tokenizer is made of the titles."""

    def other(name, *further):
        tokenizer = load_tokenizer(name, *further)
        if name == sft_run / "model":
            tokenizer.add_tokens(["of other titles"])
        return tokenizer

    monkeypatch.setattr(finished, "load_tokenizer", other)
    assert "has another tokenizer than" in refused(capsys, evaluate.main, "--run", sft_run)


def test_a_run_is_refused_once_a_question_was_edited(sft_run, tmp_path, monkeypatch, capsys):
    """Evaluation and DPO refuse it. A run from before the prompts were recorded is evaluated, with a line about it."""
    config = json.loads((sft_run / "config.json").read_text())
    shutil.copytree(sft_run, tmp_path / "old", ignore=shutil.ignore_patterns("*metrics.json", "*predictions.jsonl"))
    write_json(tmp_path / "old" / "config.json", {name: config[name] for name in config if name != "prompts"})
    texts = [text.replace("Does the candidate come next", "Will the user like the candidate") for text in prompts.TEXTS]
    assert texts != [*prompts.TEXTS]
    evaluate.main(["--run", str(sft_run), "--limit", "2"])
    assert "recorded" not in capsys.readouterr().out
    monkeypatch.setattr(prompts.Prompts, "texts", tuple(texts))
    for main, argv in (
        (evaluate.main, ["--run", sft_run]),
        (dpo_hano.main, ["--sft", sft_run, "--out", tmp_path / "x"]),
    ):
        error = refused(capsys, main, *argv)
        assert "was trained on other prompts than those of today (hanorec/model/prompts.py, or" in error
    evaluate.main(["--run", str(tmp_path / "old"), "--limit", "2"])
    line = (
        f"{tmp_path / 'old'} was trained before prompts were recorded: whether it knows today's prompts is not checked"
    )
    assert capsys.readouterr().out.splitlines().count(line) == 1


def test_evaluate_refuses_what_is_no_run(prepared, sft_run, tmp_path, capsys, monkeypatch):
    error = refused(capsys, evaluate.main, "--run", sft_run, "--data", tmp_path)
    assert "one data folder at a time" in error
    assert "give a run folder" in refused(capsys, evaluate.main, "--run", tmp_path)
    assert "user nobody has no example in" in refused(capsys, evaluate.main, "--run", sft_run, "--user", "nobody")
    error = refused(capsys, evaluate.main, "--run", sft_run, "--user", "1", "--from", "nothing")
    assert "nothing is not in" in error or "has no example in" in error
    assert "needs --data" in refused(capsys, evaluate.main, "--scores", tmp_path / "x.jsonl")
    error = refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "x.jsonl")
    assert "x.jsonl does not exist" in error
    shutil.copytree(sft_run, tmp_path / "earlier")
    config = json.loads((sft_run / "config.json").read_text())
    write_json(tmp_path / "earlier" / "config.json", config | {"data": "of another hash"})
    error = refused(capsys, evaluate.main, "--run", tmp_path / "earlier")
    assert f"was trained on an earlier {prepared}; train it again, or prepare that data again" in error
    monkeypatch.chdir(tmp_path)
    assert "run sft.py first" in refused(capsys, evaluate.main)


def another_run(run, out, seed, **options):
    """A copy of a finished run with other options, and with other weights for another seed."""
    shutil.copytree(run, out)
    config = json.loads((out / "config.json").read_text())
    config["options"] |= {"seed": seed, "out": str(out), **options}
    write_json(out / "config.json", config)
    weights = load_file(out / "model" / "model.safetensors")
    save_file(
        {n: v * (1 + seed / 20) for n, v in weights.items()}, out / "model" / "model.safetensors", {"format": "pt"}
    )
    write_json(out / "result.json", json.loads((out / "result.json").read_text()) | {"weights": weights_hash(out)})
    return str(out)


def test_runs_of_several_seeds_are_pooled_and_compared_by_seed(sft_run, tmp_path, capsys):
    high = [another_run(sft_run, tmp_path / f"high-{seed}", seed, lr=0.5) for seed in (2, 1)]
    low = [another_run(sft_run, tmp_path / f"low-{seed}", seed) for seed in (1, 2)]
    words = ["--limit", "6", "--pool", "--run", *high, *low]
    results = evaluate.main([*words, "--compare", low[1]])
    one, two = f"{tmp_path}/high-* (2 seeds)", f"{tmp_path}/low-* (2 seeds)"
    assert list(results) == [one, two, "co-occurrence", "popularity", "chance", f"{one} minus {two}"]
    assert one in capsys.readouterr().out
    single = [json.loads((tmp_path / f"low-{seed}" / "first6_metrics.json").read_text())["values"] for seed in (1, 2)]
    for name, value in results[two].values.items():
        assert value == pytest.approx((single[0][name] + single[1][name]) / 2)
        assert results[two].sd[name] == pytest.approx(abs(single[0][name] - single[1][name]) / 2**0.5)
    difference = results[f"{one} minus {two}"]  # the weights of equal seeds are equal
    assert difference.interval("AUC") == [0, 0] and difference.sd["AUC"] == 0
    error = refused(capsys, evaluate.main, "--pool", "--run", *low, high[0], "--compare", low[1])
    assert f"{high[0]} has 2, but {two} has 1, 2" in error
    for few in (low[:1], [low[0], high[0]]):
        assert "differ in nothing but --seed" in refused(capsys, evaluate.main, "--pool", "--run", *few)
    assert "several runs only with --pool" in refused(capsys, evaluate.main, "--run", *low, "--compare", *low)


def test_ceilings_and_hard_candidates(data, sft_run, capsys):
    """A data folder may hold exact probabilities and a split of harder negatives."""
    assert "has no split test_hard" in refused(capsys, evaluate.main, "--run", sft_run, "--split", "test_hard")
    rows = lines(data / "test.jsonl")
    items = [line["item"] for line in lines(data / "items.jsonl")]
    hard = []
    for row in rows:
        others = [item for item in items if item != row["target"]][:4]
        hard.append(row | {"candidates": [*others, row["target"]], "rejected": others[0]})
    write_jsonl(data / "test_hard.jsonl", hard)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["test_hard.jsonl"] = file_hash(data / "test_hard.jsonl")
    write_json(data / "manifest.json", manifest)

    def predictions(name, rows, yes=None):
        for row in rows:
            row["scores"] = [float(item == row["target"]) for item in row["candidates"]]
            row["yes_scores"] = yes and [-score for score in row["scores"]]
        write_jsonl(data / name, rows)
        return str(data / name)

    words = ["--data", str(data), "--scores"]
    other = predictions("mine.jsonl", rows)
    assert "ceiling" not in evaluate.main([*words, other])
    predictions("oracle.jsonl", rows, yes=True)
    predictions("oracle_titles.jsonl", rows)
    results = evaluate.main([*words, other, "--report", str(data / "report.html")])
    page = (data / "report.html").read_text(encoding="utf-8")
    for name in ("ceiling", "ceiling, titles", "co-occurrence", "popularity", "chance"):
        assert f'<span class="key other">{name}</span>' in page
    assert list(results) == [other, "ceiling", "ceiling, titles", "co-occurrence", "popularity", "chance"]
    assert results["ceiling"].values["HR@1"] == 1 > max(results["popularity"].values["HR@1"], 0.1)
    assert results["ceiling"].values["AUC"] == 0 and results["ceiling, titles"].values["AUC"] == 1

    hard_scores = predictions("hard.jsonl", hard)
    capsys.readouterr()
    words += [hard_scores, "--split", "test_hard"]
    assert "ceiling" not in evaluate.main(words)
    printed = capsys.readouterr().out
    assert (
        "5 candidates, hard negatives, seed 42, test_hard.jsonl " + file_hash(data / "test_hard.jsonl")[:8] in printed
    )
    predictions("test_hard_oracle.jsonl", hard)
    assert evaluate.main(words)["ceiling"].values["HR@1"] == 1
    error = refused(capsys, evaluate.main, "--data", data, "--scores", hard_scores)
    assert "not the candidates of this data: the file is of another split, or the data has been prepared again" in error


def test_alignment_is_printed_and_written(sft_run, dpo_run, capsys):
    evaluate.main(words("--run", sft_run, dpo_run, "--alignment", "--limit", 6))
    table = capsys.readouterr().out
    assert all(words in table for words in ("mean cosine before", "slope of the change", "follows the poster"))
    assert "AUC, highest" in table
    sft, dpo = (json.loads((run / "first6_metrics.json").read_text())["alignment"] for run in (sft_run, dpo_run))
    assert sft["mean"] == pytest.approx(dpo["mean"] - dpo["change"])  # DPO starts where SFT ended
    assert abs(dpo["change"]) < abs(sft["change"])  # three steps of LoRA, and all weights from nothing
    assert set(dpo["thirds"]) == {"lowest", "middle", "highest"}
    assert all(len(dpo[metric]) > 0 and set(dpo[metric]) <= set(dpo["thirds"]) for metric in ("NDCG@3", "HR@3", "AUC"))
    assert "follows_poster" not in dpo


def test_alignment_of_a_run_that_only_ranks_has_no_auc(sft_run, tmp_path, capsys):
    shutil.copytree(sft_run, tmp_path / "run")
    config = json.loads((sft_run / "config.json").read_text())
    config["options"]["tasks"] = ["rank"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    evaluate.main(words("--run", tmp_path / "run", "--alignment", "--limit", 6))
    found = json.loads((tmp_path / "run" / "first6_metrics.json").read_text())["alignment"]
    assert found["AUC"] == {} and set(found["NDCG@3"]) == set(found["HR@3"]) != set()
