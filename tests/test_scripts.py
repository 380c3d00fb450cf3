"""The real scripts from end to end, small: what they write, what they log, what they refuse, under the launcher too."""

import json
import os
import re
import shutil
import subprocess
import sys

import families
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_posters, movielens
from forked import launch
from safetensors.torch import load_file

import dpo_hano
import evaluate
import prepare_data
import sft
from hanorec.model import mllm, packing
from hanorec.ranking import exchange, metrics
from hanorec.run import runs


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training(path):
    return [line for line in lines(path) if "loss" in line]


def dpo(sft_run, out, *more):
    argv = ["--sft", sft_run, "--out", out, "--max-steps", 3, "--batch-size", 6, "--eval-limit", 8, "--lr", 1e-3, *more]
    dpo_hano.main([str(word) for word in argv])
    return out


@pytest.fixture(scope="module")
def dpo_run(sft_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dpo_hano"
    return dpo(sft_run, out, "--sigma", 0.05, "--export", out.parent / "export")


def test_sft_learns_and_writes_a_loadable_model(sft_run):
    log = training(sft_run / "metrics.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["lr"] > log[-1]["lr"]
    config = json.loads((sft_run / "config.json").read_text())
    assert config["options"]["tune"] == "full" and set(config["versions"]) >= {"torch", "transformers", "peft"}
    assert (sft_run / "result.json").exists()
    assert mllm.load_model(sft_run / "model").config.model_type == "qwen2_5_vl"


def test_sft_leaves_the_vision_tower_alone(prepared, sft_run):
    before, after = mllm.load_model(prepared / "tiny").state_dict(), mllm.load_model(sft_run / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    assert not any("visual" in name for name in changed)


def test_sft_lora_trains_adapters_of_the_language_model_alone(prepared, tmp_path):
    argv = "--tune lora --max-steps 2 --batch-size 4 --eval-limit 4 --gradient-checkpointing --tasks yesno".split()
    sft.main(["--data", str(prepared), "--out", str(tmp_path / "sft"), *argv])
    weights = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert weights and all(".language_model.layers." in name for name in weights)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert any(name.endswith("lora_B.weight") and value.abs().max() > 0 for name, value in weights.items())
    results = evaluate.main(["--run", str(tmp_path / "sft"), "--limit", "6"])  # ranked by Yes/No, its only task
    assert set(results[str(tmp_path / "sft")].values) == set(metrics.METRICS)


def test_sft_warm_up_and_blank_images(prepared, tmp_path):
    argv = "--max-steps 2 --warmup-steps 3 --batch-size 4 --eval-limit 4 --blank-images --dropout 0.1".split()
    sft.main(["--data", str(prepared), "--out", str(tmp_path / "sft"), *argv])
    log = training(tmp_path / "sft" / "metrics.jsonl")
    assert log[0]["warmup"] == 1 and log[-1]["warmup"] == 0 and log[-1]["step"] == 5
    data = evaluate.Data(prepared, None, blank_images=True)
    with_image = [row for row in range(len(data.catalogue.ids)) if data.catalogue.has_image(row)]
    assert len({data.catalogue.image_tokens(row).sum().item() for row in with_image}) == 1
    assert len(with_image) < len(data.catalogue.ids)  # an item without an image stays without


def test_the_same_seed_gives_the_same_run(prepared, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = f"--max-steps 3 --batch-size 4 --eval-limit 4 --warmup-steps 1 --dropout 0.1 --seed {seed}".split()
        sft.main(["--data", str(prepared), "--out", str(tmp_path / name), *argv])
    losses = {name: [line["loss"] for line in training(tmp_path / name / "metrics.jsonl")] for name in "abc"}
    assert losses["a"] == losses["b"] != losses["c"]


def test_dpo_logs_what_the_readme_explains(dpo_run):
    log = training(dpo_run / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in log[0]:
        assert f"`{name}`" in readme, f"README does not explain {name}"
    first = log[0]  # B = 0, so relative noise in A changes nothing yet: the loss is log 2, to LoRA dropout
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert 0.01 < first["noise"] <= 0.06 and first["lambda_mean"] == pytest.approx(1, abs=0.01)


def test_dpo_adapter_lies_in_the_language_model_alone(dpo_run):
    weights = load_file(dpo_run / "adapter" / "adapter_model.safetensors")
    assert weights and all(".language_model.layers." in name for name in weights)
    assert not any("visual" in name for name in weights)


@pytest.mark.parametrize(
    "switches",
    [
        "--hardness none --responsiveness none --sigma 0",
        "--hardness cosine --responsiveness ema",
        "--noise absolute --sigma 0.05 --gradient-checkpointing",
    ],
)
def test_dpo_ablations_run(sft_run, tmp_path, capsys, switches):
    log = training(dpo(sft_run, tmp_path / "dpo", *switches.split()) / "metrics.jsonl")
    if "none" in switches:
        assert all(line["lambda_mean"] == line["eta"] == 1 and line["noise"] == 0 for line in log)
        assert all(line["beta_p01"] == line["beta_p99"] == pytest.approx(0.1) for line in log)
    if "cosine" in switches:
        low, high = re.search(r"lambda \(cosine\): .* 1%-99% (\S+) to (\S+)", capsys.readouterr().out).groups()
        assert float(high) - float(low) > 1  # over all pairs: a spread that is real
        assert log[0]["eta"] == 1
    if "absolute" in switches:
        assert log[0]["noise"] > 0.1


def test_dpo_refuses_a_reference_that_is_not_its_start(sft_run, tmp_path, capsys):
    shutil.copytree(sft_run, tmp_path / "sft", ignore=shutil.ignore_patterns("reference"))
    dpo(tmp_path / "sft", tmp_path / "dpo")
    (cache,) = (tmp_path / "sft" / "reference").glob("*.safetensors")
    from safetensors.torch import save_file

    save_file({"logps": load_file(cache)["logps"] + torch.tensor([0.5, 0.0])}, cache)
    with pytest.raises(SystemExit) as stop:
        dpo(tmp_path / "sft", tmp_path / "dpo")
    assert stop.value.code == 2
    assert "reward gap is 5.00e-02, not 0" in capsys.readouterr().err


def test_reference_is_the_sft_model_and_policy_starts_there(sft_run, tmp_path):
    """The cached reference against the SFT model loaded by itself, pair by pair."""
    shutil.copytree(sft_run, tmp_path / "sft", ignore=shutil.ignore_patterns("reference"))
    dpo(tmp_path / "sft", tmp_path / "dpo")
    config = json.loads((sft_run / "config.json").read_text())
    data = evaluate.Data(config["options"]["data"], None)
    prompts, rows = data.prompts(), data.rows("train")
    packed = packing.PackedMLLM(evaluate.load_result(sft_run, data))
    (cache,) = (tmp_path / "sft" / "reference").glob("*.safetensors")
    cached = load_file(cache)["logps"]
    trees = [prompts.pair_tree(row, kind) for row in rows for kind in ("rank", "yes", "no")]
    with torch.no_grad():
        found = packed(packed.collate(trees, data.catalogue)).view(-1, 2)
    assert len(cached) == 3 * len(rows)
    known = ~cached.isnan().any(1)  # a short run asks for the pairs of its steps alone
    torch.testing.assert_close(found[known], cached[known], atol=1e-4, rtol=0)
    assert int(known.sum()) == 3 * 6


def test_export_loads_without_this_project(prepared, sft_run, dpo_run):
    """DIR/merged, and DIR/base with DIR/adapter, in a process that has only transformers and peft."""
    folder = dpo_run.parent / "export"
    code = (
        "import sys, torch, peft, transformers as t\n"
        "load = t.AutoModelForImageTextToText.from_pretrained\n"
        "tok = t.AutoTokenizer.from_pretrained(sys.argv[1] + '/merged')\n"
        "chat = tok.apply_chat_template([{'role': 'user', 'content': 'Film 3?'}], tokenize=False)\n"
        "ids = tok(chat, return_tensors='pt')\n"
        "one = load(sys.argv[1] + '/merged')(**ids).logits\n"
        "other = peft.PeftModel.from_pretrained(load(sys.argv[1] + '/base'), sys.argv[1] + '/adapter')(**ids).logits\n"
        "base = load(sys.argv[1] + '/base')(**ids).logits\n"
        "assert not torch.allclose(one, base, atol=1e-6)\n"
        "torch.testing.assert_close(one, other, atol=1e-4, rtol=0)\n"
        "torch.save(one, sys.argv[1] + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd="/")
    data = evaluate.Data(prepared, None)
    model, tokenizer = evaluate.load_result(dpo_run, data), mllm.load_tokenizer(prepared / "tiny")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Film 3?"}], tokenize=False)
    with torch.no_grad():
        expected = model(**tokenizer(text, return_tensors="pt")).logits
    torch.testing.assert_close(torch.load(folder / "logits.pt", weights_only=True), expected, atol=1e-4, rtol=0)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((folder / "base").resolve())


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
        f"small.{n}.inter" for n in ("train", "valid", "test", "candidates")
    } | {"small.item"}
    spaced = type("Catalogue", (), {"ids": ["a b"], "titles": ["A"]})
    with pytest.raises(runs.UserError, match="the id 'a b' holds one"):
        exchange.write_recbole(folder, spaced, {"test": []}, None)
    path.write_text(path.read_text().replace("1.0\t", "1.0\toops", 1))
    assert "small.candidates.inter, line" in refused(capsys, evaluate.main, "--data", prepared, "--scores", path)


def test_evaluate_recommends_by_name(sft_run, capsys):
    data = evaluate.Data(json.loads((sft_run / "config.json").read_text())["options"]["data"], None)
    row = data.rows("test")[2]
    evaluate.main(["--run", str(sft_run), "--user", row.user, "--top-k", "3"])
    out = capsys.readouterr().out
    assert all(data.catalogue.titles[item] in out for item in row.history)
    assert sum(f" {place}. " in out for place in range(1, 11)) == 3
    among = [data.catalogue.ids[item] for item in range(4)]
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


# ---------------------------------------------------------------------------------------------------------------------
# Under the launcher


def test_plain_scoring_gives_the_packed_numbers(prepared, sft_run, tmp_path):
    """A whole evaluation, a warm-up step, an SFT step and DPO steps, with and without --no-pack."""
    evaluate.main(["--run", str(sft_run)])
    packed = lines(sft_run / "predictions.jsonl")
    evaluate.main(["--run", str(sft_run), "--no-pack"])
    plain = lines(sft_run / "predictions.jsonl")
    for one, other in zip(packed, plain, strict=True):
        for key in ("scores", "yes_scores"):
            np.testing.assert_allclose(one[key], other[key], atol=1e-4)

    logs = {}
    for switch in ([], ["--no-pack"]):
        out = tmp_path / f"sft{len(switch)}"
        argv = ["--data", prepared, "--out", out, "--max-steps", 1, "--batch-size", 4, "--eval-limit", 2, *switch]
        argv += ["--warmup-steps", 1, "--warmup-batch-size", 2, "--dropout", 0]
        sft.main([str(word) for word in argv])
        run = dpo(out, tmp_path / f"dpo{len(switch)}", "--sigma", 0, "--lora-dropout", 0, "--max-steps", 1)
        assert bool(json.loads((run / "config.json").read_text())["options"]["no_pack"]) == bool(switch)
        logs[len(switch)] = [line for path in (out, run) for line in training(path / "metrics.jsonl")]
    for one, other in zip(logs[0], logs[1], strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)


def test_images_encoded_live_give_the_stored_numbers(prepared, sft_run, tmp_path, capsys):
    """A folder prepared without image tokens, and one with them that are left unread."""
    data = tmp_path / "raw" / "data"
    shutil.copytree(prepared.parent / "raw", tmp_path / "raw")
    source = ["--dataset", "movielens", "--source", tmp_path / "raw", "--max-pixels", 3136]
    prepare_data.main([*map(str, [*source, "--out", data, "--tokens", "live"])])
    (folder,) = data.glob("encoded/*")
    assert (folder / "image_tokens.safetensors").stat().st_size < 1000
    argv = "--max-steps 2 --batch-size 4 --eval-limit 2 --warmup-steps 0 --dropout 0".split()
    logs = []
    for given, switch in ((prepared, []), (prepared, ["--images", "live"]), (data, [])):
        sft.main(["--data", str(given), "--out", str(tmp_path / f"sft{len(logs)}"), *argv, *switch])
        logs.append(training(tmp_path / f"sft{len(logs)}" / "metrics.jsonl"))
    for stored, *live in zip(*logs, strict=True):
        for line in live:
            assert line["loss"] == pytest.approx(stored["loss"], abs=1e-5)
    run = dpo(tmp_path / "sft1", tmp_path / "dpo", "--max-steps", 1)
    assert json.loads((run / "config.json").read_text())["options"]["images"] == "live"
    evaluate.main(["--run", str(sft_run)])
    stored = lines(sft_run / "predictions.jsonl")
    evaluate.main(["--run", str(sft_run), "--images", "live"])
    for one, other in zip(stored, lines(sft_run / "predictions.jsonl"), strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-4)
    message = refused(capsys, sft.main, "--data", str(data), "--images", "stored")
    assert "holds no image tokens; go without --images, or run prepare_data.py" in message


def encoded_for(family, prepared, folder):
    """A copy of the data folder, encoded for a tiny backbone of the family alone."""
    titles = [line["title"] for line in lines(prepared / "items.jsonl")]
    families.build_backbone(family, folder / "backbone", titles)
    shutil.copytree(prepared, folder / "data", ignore=shutil.ignore_patterns("encoded", "tiny", ".lock"))
    shutil.copytree(prepared.parent / "raw", folder / "raw")  # the posters
    model = str(folder / "backbone")
    prepare_data.main(["--out", str(folder / "data"), "--encode-only", "--model", model, "--max-pixels", "3136"])
    return folder / "data"


SMALL = "--max-steps 1 --batch-size 2 --grad-accum 1 --eval-limit 2".split()


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_another_family_from_end_to_end(family, prepared, tmp_path):
    data = encoded_for(family, prepared, tmp_path)
    argv = ["--data", str(data), "--out", str(tmp_path / "sft"), *SMALL]
    sft.main(argv)
    dpo_hano.main(["--sft", str(tmp_path / "sft"), "--out", str(tmp_path / "dpo"), *SMALL])
    results = evaluate.main(["--run", str(tmp_path / "dpo"), "--limit", "4"])
    assert np.isfinite(list(results[str(tmp_path / "dpo")].values.values())).all()
    evaluate.main(["--run", str(tmp_path / "dpo"), "--limit", "4", "--blank-images"])


def test_a_backbone_that_cannot_be_packed_is_refused_and_runs_without(prepared, tmp_path, capsys):
    """PaliGemma's prompt attends in both directions, which no tree of ours does."""
    data = encoded_for("paligemma", prepared, tmp_path)
    argv = ["--data", str(data), "--out", str(tmp_path / "sft"), *SMALL]
    message = refused(capsys, sft.main, *argv)
    assert f"packing does not hold for {tmp_path / 'backbone'} (log-probabilities differ by" in message
    assert "--no-pack" in message and not (tmp_path / "sft" / "config.json").exists()
    sft.main([*argv, "--no-pack"])
    evaluate.main(["--run", str(tmp_path / "sft"), "--limit", "4"])
    assert len(lines(tmp_path / "sft" / "first4_predictions.jsonl")) == 4


def test_gradients_are_averaged_over_processes(tmp_path, prepared):
    (tmp_path / "out").mkdir()
    launch(2, ROOT / "tests" / "average_gradients.py", prepared, tmp_path / "out", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1"]


def test_a_launch_with_fewer_processes_than_asked_is_refused(prepared, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    command += ["sft.py", "--data", prepared, "--out", tmp_path / "sft"]
    result = subprocess.run([str(w) for w in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "asked for 2 processes but started 1" in result.stderr
    assert not (tmp_path / "sft" / "config.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# A user's mistakes: one line that says what, where and what to do; exit code 2; nothing half-written


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error and "usage:" not in error
    return error.splitlines()[-1]


def raw(folder, **files):
    movielens(folder)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"ratings_csv": "userId,movieId,rating,timestamp\n"}, "holds no interactions"),
        ({"ratings_csv": ""}, "ratings.csv is empty"),
        ({"ratings_csv": "userId,movieId,rating,timestamp\n1,2,five,9\n"}, "line 2: expected user, item, time, rating"),
        ({"ratings_csv": "userId,movieId,rating,timestamp\n1,2,5\n"}, "line 2: expected user, item, time, rating"),
        ({"ratings_csv": "userId,movieId,rating,timestamp\n1,2,5,9\n"}, "no user has 6 interactions; lower --min-"),
        (
            {"movies_csv": "movieId,title,genres\n100,Alone,Drama\n"},
            "items have interactions but no title, the first is",
        ),
        ({"movies_csv": "movieId\n100\n"}, "line 1: expected movieId,title,genres, got movieId"),
    ],
)
def test_bad_raw_files(tmp_path, capsys, files, message):
    folder = raw(tmp_path / "raw", **files)
    error = refused(capsys, prepare_data.main, "--dataset", "movielens", "--source", folder, "--out", tmp_path / "data")
    assert message in error and error.startswith("prepare_data.py: error: ")
    assert [p for p in (tmp_path / "data").glob("*") if p.name != ".lock"] == []


def test_prepare_data_refuses_bad_options_and_images(tmp_path, capsys):
    run = prepare_data.main
    assert "needs --source" in refused(capsys, run, "--dataset", "movielens", "--out", tmp_path / "data")
    error = refused(capsys, run, "--dataset", "movielens", "--source", tmp_path / "no", "--out", tmp_path / "data")
    assert "is not a folder" in error
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    assert "holds other files" in refused(capsys, run, "--out", tmp_path / "thesis")
    assert "--source does not go with --dataset demo" in refused(capsys, run, "--source", tmp_path)
    (tmp_path / "empty").mkdir()
    error = refused(capsys, run, "--dataset", "movielens", "--source", tmp_path / "empty", "--out", tmp_path / "data")
    assert "holds no ratings.dat or ratings.csv" in error
    folder = raw(tmp_path / "raw")
    common = ["--dataset", "movielens", "--source", folder, "--out", tmp_path / "data"]
    assert "touched all but" in refused(capsys, run, *common, "--negatives", 58)
    assert "cannot be loaded" in refused(capsys, run, *common, "--model", "nobody/no-such-model")
    (folder / "posters").mkdir()
    (folder / "posters" / "100.jpg").write_text("this is no picture")
    error = refused(capsys, run, *common)
    assert "100.jpg cannot be read" in error and not (tmp_path / "data" / "encoded").exists()


def test_a_full_disk_is_foreseen(tmp_path, capsys, monkeypatch):
    folder = raw(tmp_path / "raw")
    draw_posters(folder / "posters")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    error = refused(
        capsys, prepare_data.main, "--dataset", "movielens", "--source", folder, "--out", tmp_path / "data",
        "--max-pixels", 3136,
    )  # fmt: skip
    assert "50,000 bytes free; --max-pixels" in error and not (tmp_path / "data" / "encoded").exists()


def test_training_refuses_what_does_not_fit(prepared, sft_run, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "manifest.json does not exist; prepare it with prepare_data.py" in refused(
        capsys, sft.main, "--data", tmp_path, *out
    )
    error = refused(capsys, sft.main, "--data", prepared, "--model", "Qwen/Qwen2-VL-2B-Instruct", *out)
    assert "encoded for tiny, not for Qwen/Qwen2-VL-2B-Instruct; run prepare_data.py" in error
    stale = tmp_path / "stale"
    shutil.copytree(prepared, stale)
    with open(stale / "items.jsonl", "a") as file:
        file.write('{"item": "new", "title": "New", "image": null}\n')
    assert "not what manifest.json lists; prepare it" in refused(capsys, sft.main, "--data", stale, *out)
    error = refused(capsys, sft.main, "--data", prepared, *out, "--batch-size", 100000)
    assert "do not fill a step" in error
    assert "tokens with one history item; raise --max-length" in refused(
        capsys, sft.main, "--data", prepared, *out, "--max-length", 20, "--batch-size", 4
    )
    assert not (tmp_path / "out").exists()
    out = ["--out", tmp_path / "dpo"]
    assert "config.json does not exist; give a run folder" in refused(capsys, dpo_hano.main, "--sft", tmp_path, *out)
    assert "0 is out of range" in refused(capsys, dpo_hano.main, "--beta", "0")
    assert "--top-k 1000 needs more items" in refused(capsys, dpo_hano.main, "--sft", sft_run, "--top-k", 1000, *out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    error = refused(capsys, sft.main, "--data", prepared, "--batch-size", 4, "--out", tmp_path / "thesis")
    assert "is no run folder" in error and "chapter.tex" in os.listdir(tmp_path / "thesis")
    error = refused(capsys, dpo_hano.main, "--sft", sft_run, "--max-steps", 1, "--out", sft_run)  # would destroy it
    assert "is no run folder of dpo_hano.py" in error and (sft_run / "model").exists()
    error = refused(capsys, sft.main, "--data", prepared, "--out", tmp_path / "new", "--report-to", "nonsense")
    assert "accelerate knows no such tracker" in error


def test_a_run_of_other_titles_is_refused(sft_run, monkeypatch, capsys):
    """The tiny backbone's tokenizer is made of the titles."""
    load = mllm.load_tokenizer

    def other(name, *further):
        tokenizer = load(name, *further)
        if name == sft_run / "model":
            tokenizer.add_tokens(["of other titles"])
        return tokenizer

    monkeypatch.setattr(mllm, "load_tokenizer", other)
    assert "has another tokenizer than" in refused(capsys, evaluate.main, "--run", sft_run)


def test_evaluate_refuses_what_is_no_run(prepared, sft_run, tmp_path, capsys, monkeypatch):
    error = refused(capsys, evaluate.main, "--run", sft_run, "--data", tmp_path)
    assert "one data folder at a time" in error
    assert "give a run folder" in refused(capsys, evaluate.main, "--run", tmp_path)
    assert str(sft_run) in refused(capsys, evaluate.main, "--run", sft_run.parent)
    assert "user nobody has no row in" in refused(capsys, evaluate.main, "--run", sft_run, "--user", "nobody")
    error = refused(capsys, evaluate.main, "--run", sft_run, "--user", "1", "--from", "nothing")
    assert "nothing is not in" in error or "has no row in" in error
    assert "needs --data" in refused(capsys, evaluate.main, "--scores", tmp_path / "x.jsonl")
    error = refused(capsys, evaluate.main, "--data", prepared, "--scores", tmp_path / "x.jsonl")
    assert "x.jsonl does not exist" in error
    monkeypatch.chdir(tmp_path)
    assert "run sft.py first" in refused(capsys, evaluate.main)
