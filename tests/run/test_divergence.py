"""Learning rates that diverge."""

import re

import numpy as np
import pytest
import torch
from layouts import lines
from safetensors.torch import load_file
from spoilt import refused

import dpo_hano
import sft
from hanorec.model.supervised import supervised_step


def test_divergence_names_the_samples_and_keeps_the_weights(prepared, tmp_path, capsys, monkeypatch):
    """The weights of the first epoch are kept. Then a gradient is not finite, and nothing is written after it."""
    out, steps_taken = tmp_path / "sft", []
    users = [example["user"] for example in lines(prepared / "train.jsonl")]
    steps = len(users) // 32

    def step(model, micro_batches, parameters, optimizer, *rest):
        if len(steps_taken) == steps + 2:
            with torch.no_grad():
                parameters[0][:] = torch.nan
        steps_taken.append(1)
        return supervised_step(model, micro_batches, parameters, optimizer, *rest)

    monkeypatch.setattr(sft, "supervised_step", step)
    argv = ["--data", prepared, "--out", out, "--epochs", 2, "--tasks", "yesno", "--batch-size", 32, "--eval-limit", 4]
    error = refused(capsys, sft.main, *argv, "--warmup-steps", 0)
    message = rf"at step (\d+) \(users (.*)\); lower --lr .*the weights of step {steps} stay"
    bad_step, bad_users = re.search(message, error).groups()
    order = np.random.default_rng([42, 1]).permutation(len(users))[2 * 32 : 3 * 32]
    assert int(bad_step) == steps + 3 and set(bad_users.split(", ")) == {users[number] for number in order}
    assert all(torch.isfinite(weight).all() for weight in load_file(out / "model" / "model.safetensors").values())
    assert not (out / "result.json").exists()
    assert all(np.isfinite(line.get("loss", 0)) for line in lines(out / "metrics.jsonl"))


@pytest.mark.parametrize(("rate", "steps"), [("1e30", 1), ("1e30", 4), ("1e5", 4)])
@pytest.mark.parametrize("stage", ["sft", "dpo_hano"])
def test_learning_rates_that_diverge(stage, rate, steps, prepared, lora_run, tmp_path, capsys):
    argv = ["--out", tmp_path / "run", "--lr", rate, "--max-steps", steps, "--batch-size", 4, "--eval-limit", 2]
    if stage == "sft":
        error = refused(capsys, sft.main, "--data", prepared, "--warmup-steps", 0, *argv)
    else:
        error = refused(capsys, dpo_hano.main, "--sft", lora_run, "--sigma", 0, *argv)
    assert "(users " in error or "scores are NaN or infinite" in error
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").glob("*/*.safetensors"))
