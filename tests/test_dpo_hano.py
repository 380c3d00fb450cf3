"""dpo_hano.py from end to end on small data: logs, files, reference, ablations."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, Opened
from safetensors.torch import load_file
from stages import dpo, refused, training

import dpo_hano
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM


def test_dpo_logs_what_the_documents_explain(dpo_run):
    log = training(dpo_run / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3]
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in log[0]:
        assert f"`{name}`" in page, f"docs/training.md does not explain {name}"
    first = log[0]  # B is 0, so noise in A changes nothing yet, and the loss is log 2
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
        "--rejected 9 --hardness clusters --hardness-sign -1 --noise embeddings",
        "--rejected 3 --rejected-from model --hardness margin --lora-dropout 0.1",
        "--rejected 2 --rejected-from popular --hardness constant --sft-weight 0.5",
    ],
)
def test_dpo_ablations_run(sft_run, tmp_path, capsys, switches):
    log = training(dpo(sft_run, tmp_path / "dpo", *switches.split()) / "metrics.jsonl")
    if "none" in switches:
        assert all(line["lambda_mean"] == line["eta"] == 1 and line["noise"] == 0 for line in log)
        assert all(line["beta_p01"] == line["beta_p99"] == pytest.approx(0.1) for line in log)
    if "cosine" in switches:
        low, high = re.search(r"lambda \(cosine\): .* 1%-99% (\S+) to (\S+)", capsys.readouterr().out).groups()
        assert float(high) - float(low) > 1  # over all training pairs
        assert log[0]["eta"] == 1
    if "absolute" in switches:
        assert log[0]["noise"] > 0.1


def test_the_controls_train_another_objective(sft_run, tmp_path):
    """SFT continued lowers the chosen answers' nll and has it as its loss; softmax starts at -log of their share."""
    plain = "--hardness none --responsiveness none --sigma 0 --batch-size 12 --max-steps 12".split()
    first, *_, last = training(dpo(sft_run, tmp_path / "sft", *plain, "--objective", "sft") / "metrics.jsonl")
    assert first["loss"] == first["chosen_nll"] and last["chosen_change"] > 0
    softmax = training(dpo(sft_run, tmp_path / "softmax", *plain, "--objective", "softmax") / "metrics.jsonl")
    dpo_log = training(dpo(sft_run, tmp_path / "dpo", *plain) / "metrics.jsonl")
    assert softmax[0]["chosen_change"] == dpo_log[0]["chosen_change"] == pytest.approx(0, abs=1e-4)
    assert softmax[0]["loss"] != pytest.approx(np.log(2), abs=1e-3)  # no reference: the start is not log 2
    weighted = training(dpo(sft_run, tmp_path / "both", *plain, "--sft-weight", 0.5) / "metrics.jsonl")
    assert weighted[0]["loss"] == pytest.approx(dpo_log[0]["loss"] + 0.5 * dpo_log[0]["chosen_nll"], rel=1e-5)


def test_dpo_refuses_micro_batches_whose_eta_is_always_1(sft_run, tmp_path, capsys):
    argv = ["--sft", sft_run, "--out", tmp_path / "dpo", "--max-steps", 1, "--batch-size", 2, "--eval-limit", 2]
    assert "eta of fewer than 3 pairs is always 1" in refused(capsys, dpo_hano.main, *argv)
    dpo_hano.main([str(word) for word in (*argv, "--responsiveness", "ema")])


def test_dpo_refuses_a_reference_that_is_not_its_start(sft_run, tmp_path, capsys):
    shutil.copytree(sft_run, tmp_path / "sft", ignore=shutil.ignore_patterns("reference"))
    dpo(tmp_path / "sft", tmp_path / "dpo")
    (cache,) = (tmp_path / "sft" / "reference").glob("*.safetensors")
    from safetensors.torch import save_file

    save_file({"logps": load_file(cache)["logps"] + torch.tensor([0.5, 0.0])}, cache)
    with pytest.raises(SystemExit) as stop:
        dpo(tmp_path / "sft", tmp_path / "again")
    assert stop.value.code == 2
    assert "reward gap is 5.00e-02, not 0" in capsys.readouterr().err


def test_reference_is_the_sft_model_and_policy_starts_there(sft_run, tmp_path):
    """Compare the cached reference with the log-probabilities of the SFT model, pair by pair."""
    shutil.copytree(sft_run, tmp_path / "sft", ignore=shutil.ignore_patterns("reference"))
    dpo(tmp_path / "sft", tmp_path / "dpo")
    config = json.loads((sft_run / "config.json").read_text())
    data = Opened(config["options"]["data"])
    prompts, examples = data.prompts(), data.examples("train")
    packed = PackedMLLM(load_finished(sft_run, data.encoding))
    (cache,) = (tmp_path / "sft" / "reference").glob("*.safetensors")
    cached = load_file(cache)["logps"]
    trees = [prompts.pair_tree(example, kind) for example in examples for kind in ("rank", "yes", "no")]
    with torch.no_grad():
        found = packed(packed.collate(trees, data.tokens)).view(-1, 2)
    assert len(cached) == 3 * len(examples)
    computed = ~cached.isnan().any(1)  # a short run computes only the pairs of its steps
    torch.testing.assert_close(found[computed], cached[computed], atol=1e-4, rtol=0)
    assert int(computed.sum()) == 3 * 6


def test_noise_on_embeddings_needs_packed_prompts(sft_run, tmp_path, capsys):
    """Without packing, each answer has a forward of its own, and would draw its own noise for the prompt."""
    argv = ["--sft", sft_run, "--out", tmp_path / "dpo", "--noise", "embeddings", "--no-pack"]
    line = "--noise embeddings needs packed prompts: with --no-pack each answer's prompt gets other noise"
    assert line in refused(capsys, dpo_hano.main, *argv)
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("run", ["sft_run", "lora_run"])
def test_a_quantized_base_needs_a_quantized_sft_run(run, request, tmp_path, capsys):
    """It had no effect on a run that trained all weights, and stopped with a traceback on a run with LoRA."""
    sft = request.getfixturevalue(run)
    line = f"--quantize: {sft} was trained without it; leave it out, or run sft.py with it too"
    assert line in refused(capsys, dpo_hano.main, "--sft", sft, "--out", tmp_path / "dpo", "--quantize", "4bit")
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize("value", ["0", "2", "up"])
def test_the_sign_of_hardness_is_1_or_minus_1(capsys, value):
    assert f"{value} is no sign; give 1 or -1" in refused(capsys, dpo_hano.main, "--hardness-sign", value)
    assert dpo_hano.parse(["--hardness-sign", "-1"]).hardness_sign == -1
