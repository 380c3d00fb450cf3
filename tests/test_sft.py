"""sft.py from end to end on small data: training, files, refusals. Backbones of other families in all stages."""

import json
import os
import shutil

import numpy as np
import pytest
import tiny_backbones
import torch
from conftest import Opened
from safetensors.torch import load_file
from stages import SMALL, dpo, lines, refused, training

import dpo_hano
import evaluate
import prepare_data
import sft
from hanorec.model.load import load_model
from hanorec.ranking import metrics


def test_sft_learns_and_writes_a_loadable_model(sft_run):
    log = training(sft_run / "metrics.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["lr"] > log[-1]["lr"]
    config = json.loads((sft_run / "config.json").read_text())
    assert config["options"]["tune"] == "full" and set(config["versions"]) >= {"torch", "transformers", "peft"}
    assert (sft_run / "result.json").exists()
    assert load_model(sft_run / "model").config.model_type == "qwen2_5_vl"


def test_sft_leaves_the_vision_tower_alone(prepared, sft_run):
    before, after = load_model(prepared / "tiny").state_dict(), load_model(sft_run / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    assert not any("visual" in name for name in changed)


def test_sft_lora_trains_adapters_of_the_language_model_alone(prepared, tmp_path, capsys):
    argv = "--tune lora --max-steps 2 --batch-size 4 --eval-limit 4 --gradient-checkpointing --tasks yesno".split()
    sft.main(["--data", str(prepared), "--out", str(tmp_path / "sft"), *argv])
    assert "warm-up" not in capsys.readouterr().out  # a run without warm-up does not mention one
    weights = load_file(tmp_path / "sft" / "adapter" / "adapter_model.safetensors")
    assert weights and all(".language_model.layers." in name for name in weights)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert any(name.endswith("lora_B.weight") and value.abs().max() > 0 for name, value in weights.items())
    results = evaluate.main(["--run", str(tmp_path / "sft"), "--limit", "6"])  # ranks by Yes/No, its only task
    assert set(results[str(tmp_path / "sft")].values) == set(metrics.METRICS)


def test_sft_warm_up_and_blank_images(prepared, tmp_path, capsys):
    argv = "--max-steps 2 --warmup-steps 3 --batch-size 4 --eval-limit 4 --blank-images --dropout 0.1".split()
    sft.main(["--data", str(prepared), "--out", str(tmp_path / "sft"), *argv])
    log = training(tmp_path / "sft" / "metrics.jsonl")
    assert log[0]["warmup"] == 1 and log[-1]["warmup"] == 0 and log[-1]["step"] == 5
    printed = capsys.readouterr().out
    assert "step 4: the warm-up is over; the loss is now that of answers (" in printed
    assert printed.count("the warm-up is over") == 1
    data = Opened(prepared, blank_images=True)
    with_image = [item for item in range(len(data.items.ids)) if data.tokens.lengths[item]]
    assert len({data.tokens.of(item).sum().item() for item in with_image}) == 1
    assert len(with_image) < len(data.items.ids)  # items without an image do not get the neutral one


def test_the_same_seed_gives_the_same_run(prepared, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = f"--max-steps 3 --batch-size 4 --eval-limit 4 --warmup-steps 1 --dropout 0.1 --seed {seed}".split()
        sft.main(["--data", str(prepared), "--out", str(tmp_path / name), *argv])
    losses = {name: [line["loss"] for line in training(tmp_path / name / "metrics.jsonl")] for name in "abc"}
    assert losses["a"] == losses["b"] != losses["c"]


def test_plain_scoring_gives_the_packed_numbers(prepared, sft_run, tmp_path):
    """Compare an evaluation, a warm-up step, an SFT step and a DPO step with and without --no-pack."""
    evaluate.main(["--run", str(sft_run)])
    packed = lines(sft_run / "predictions.jsonl")
    evaluate.main(["--run", str(sft_run), "--no-pack"])
    plain = lines(sft_run / "predictions.jsonl")
    for one, other in zip(packed, plain, strict=True):
        for key in ("scores", "yes_scores"):
            np.testing.assert_allclose(one[key], other[key], atol=1e-4)

    logs = []
    for name, switch in (("packed", []), ("plain", ["--no-pack"])):
        out = tmp_path / f"sft_{name}"
        argv = ["--data", prepared, "--out", out, "--max-steps", 1, "--batch-size", 4, "--eval-limit", 2, *switch]
        argv += ["--warmup-steps", 1, "--warmup-batch-size", 2, "--dropout", 0]
        sft.main([str(word) for word in argv])
        run = dpo(out, tmp_path / f"dpo_{name}", "--sigma", 0, "--lora-dropout", 0, "--max-steps", 1)
        assert bool(json.loads((run / "config.json").read_text())["options"]["no_pack"]) == bool(switch)
        logs.append(training(out / "metrics.jsonl") + training(run / "metrics.jsonl"))
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], abs=1e-4)


def test_images_encoded_live_give_the_stored_numbers(prepared, sft_run, tmp_path, capsys):
    """Compare stored image tokens with live images, in a data folder with image tokens and in one without."""
    data = tmp_path / "raw" / "data"
    shutil.copytree(prepared.parent / "raw", tmp_path / "raw")
    source = ["--dataset", "movielens", "--source", tmp_path / "raw", "--max-pixels", 3136]
    prepare_data.main([*map(str, [*source, "--out", data, "--tokens", "live"])])
    (folder,) = data.glob("encoded/*")
    assert (folder / "image_tokens.safetensors").stat().st_size < 1000
    argv = "--max-steps 2 --batch-size 4 --eval-limit 2 --warmup-steps 0 --dropout 0".split()
    logs = []
    for data_folder, switch in ((prepared, []), (prepared, ["--images", "live"]), (data, [])):
        sft.main(["--data", str(data_folder), "--out", str(tmp_path / f"sft{len(logs)}"), *argv, *switch])
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
    assert "holds no image tokens; leave out --images, or run prepare_data.py" in message


def encoded_for(family, prepared, folder):
    """Copy the data folder to `folder` and encode it for a tiny backbone of this family. Returns the copy."""
    titles = [line["title"] for line in lines(prepared / "items.jsonl")]
    tiny_backbones.build_backbone(family, folder / "backbone", titles)
    shutil.copytree(prepared, folder / "data", ignore=shutil.ignore_patterns("encoded", "tiny", ".lock"))
    shutil.copytree(prepared.parent / "raw", folder / "raw")  # the posters
    model = str(folder / "backbone")
    prepare_data.main(["--out", str(folder / "data"), "--encode-only", "--model", model, "--max-pixels", "3136"])
    return folder / "data"


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
    """PaliGemma's prompt attends in both directions. A packed prompt attends causally."""
    data = encoded_for("paligemma", prepared, tmp_path)
    argv = ["--data", str(data), "--out", str(tmp_path / "sft"), *SMALL]
    message = refused(capsys, sft.main, *argv)
    assert f"packed prompts do not work with {tmp_path / 'backbone'} (log-probabilities differ by" in message
    assert "--no-pack" in message and not (tmp_path / "sft" / "config.json").exists()
    sft.main([*argv, "--no-pack"])
    evaluate.main(["--run", str(tmp_path / "sft"), "--limit", "4"])
    assert len(lines(tmp_path / "sft" / "first4_predictions.jsonl")) == 4


def test_training_refuses_wrong_options_and_folders(prepared, sft_run, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    error = refused(capsys, sft.main, "--data", tmp_path, *out)
    assert "manifest.json does not exist; prepare the data with prepare_data.py" in error
    error = refused(capsys, sft.main, "--data", prepared, "--model", "Qwen/Qwen2-VL-2B-Instruct", *out)
    assert "encoded for tiny, not for Qwen/Qwen2-VL-2B-Instruct; run prepare_data.py" in error
    stale = tmp_path / "stale"
    shutil.copytree(prepared, stale)
    with open(stale / "items.jsonl", "a") as file:
        file.write('{"item": "new", "title": "New", "image": null}\n')
    assert "not what manifest.json lists; prepare the data" in refused(capsys, sft.main, "--data", stale, *out)
    error = refused(capsys, sft.main, "--data", prepared, *out, "--batch-size", 100000)
    assert "do not fill a step" in error
    error = refused(capsys, sft.main, "--data", prepared, *out, "--max-length", 20, "--batch-size", 4)
    assert "tokens with one history item; train with a larger --max-length" in error
    assert not (tmp_path / "out").exists()
    out = ["--out", tmp_path / "dpo"]
    assert "config.json does not exist; give a run folder" in refused(capsys, dpo_hano.main, "--sft", tmp_path, *out)
    assert "0 is out of range" in refused(capsys, dpo_hano.main, "--beta", "0")
    assert "--top-k 1000 needs more items" in refused(capsys, dpo_hano.main, "--sft", sft_run, "--top-k", 1000, *out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    error = refused(capsys, sft.main, "--data", prepared, "--batch-size", 4, "--out", tmp_path / "thesis")
    assert "is no run folder" in error and "chapter.tex" in os.listdir(tmp_path / "thesis")
    # dpo_hano.py must not overwrite the SFT run
    error = refused(capsys, dpo_hano.main, "--sft", sft_run, "--max-steps", 1, "--out", sft_run)
    assert "is no run folder of dpo_hano.py" in error and (sft_run / "model").exists()
    error = refused(capsys, sft.main, "--data", prepared, "--out", tmp_path / "new", "--report-to", "nonsense")
    assert "no such tracker; give one of " in error
