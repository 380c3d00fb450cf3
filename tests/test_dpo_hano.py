"""dpo_hano.py from end to end on small data: logs, files, reference, ablations."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Opened
from safetensors.torch import load_file
from stages import dpo, refused, training

import dpo_hano
from hanorec.data.folder import DataFolder
from hanorec.model.finished import load_finished
from hanorec.model.packing import PackedMLLM
from hanorec.run.options import complete


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


def recorded(monkeypatch, name, taken):
    """Let dpo_hano.<name> keep taken(what it returns, its arguments) of each call. Returns the growing list."""
    original, calls = getattr(dpo_hano, name), []

    def record(*args):
        value = original(*args)
        calls.append(taken(value, args))
        return value

    monkeypatch.setattr(dpo_hano, name, record)
    return calls


def test_the_guard_of_eta_is_of_the_runs_beta_and_dtype(sft_run, tmp_path, monkeypatch):
    """1e-4 nats in float32 and 0.1 in bfloat16, times --beta."""
    made = recorded(monkeypatch, "Responsiveness", lambda response, _: (response.kind, response.rounding))
    short = ("--max-steps", 1, "--eval-limit", 2, "--beta", 0.3)
    dpo(sft_run, tmp_path / "float32", *short)
    dpo(sft_run, tmp_path / "bfloat16", *short, "--dtype", "bfloat16")
    assert made == [("batch", pytest.approx(0.3 * 1e-4)), ("batch", pytest.approx(0.3 * 0.1))]


@pytest.mark.parametrize("source", ["model", "self"])
def test_the_harder_half_of_the_pool_is_drawn_by_the_ranking_pairs(source):
    """Of nine items four are drawn: the half, five, without the hardest. The other pairs rank them the other way."""
    ranks = np.argsort(np.random.default_rng(0).random((200, 9)), axis=1)  # 0 is the most probable item
    logps = torch.full((600, 10), torch.nan)
    logps[1::3, 1:] = -torch.tensor(ranks).float()
    logps[0::3, 1:] = logps[2::3, 1:] = torch.tensor(ranks).float()
    logps[:, 0] = 1e3  # of the chosen answers
    pairs = SimpleNamespace(kinds=["yes", "rank", "no"], columns=None)
    options = SimpleNamespace(rejected_from=source, rejected=2, seed=3)
    dpo_hano.choose_rejected(pairs, logps, None, options)
    drawn = np.take_along_axis(ranks, pairs.columns.numpy(), 1)
    assert drawn.shape == (200, 2) and set(drawn.ravel()) == {1, 2, 3, 4}
    first = pairs.columns
    dpo_hano.choose_rejected(pairs, logps, None, options, epoch=1)
    assert not torch.equal(pairs.columns, first)


def test_rejected_items_come_from_the_reference_that_is_kept(sft_run, tmp_path, monkeypatch):
    shutil.copytree(sft_run, tmp_path / "sft", ignore=shutil.ignore_patterns("reference"))
    chosen = recorded(monkeypatch, "choose_rejected", lambda _, args: args[0].columns)
    dpo(tmp_path / "sft", tmp_path / "dpo", "--rejected-from", "model", "--rejected", 2)
    (cache,) = (tmp_path / "sft" / "reference").glob("*.safetensors")
    kept = load_file(cache)["logps"][0::3, 1:]  # of the ranking pairs
    (columns,) = chosen
    planned = ~kept.isnan().any(1)
    ranks = (-kept[planned]).argsort().argsort()
    assert int(planned.sum()) == 6 and kept.shape[1] == 9
    assert set(ranks.gather(1, columns[planned]).flatten().tolist()) <= {1, 2, 3, 4}


def test_each_epoch_draws_anew_from_its_own_policy(sft_run, tmp_path, monkeypatch):
    """The second draw is from the log-probabilities that the policy of the first epoch's end has, pair by pair."""
    examples = DataFolder.examples
    monkeypatch.setattr(DataFolder, "examples", lambda self, split, limit=0: examples(self, split, limit or 6))
    opened = Opened(json.loads((sft_run / "config.json").read_text())["options"]["data"])
    steps = recorded(monkeypatch, "take_step", lambda _, args: (args[3], args[1][0].reference))
    draws = recorded(monkeypatch, "choose_rejected", lambda _, args: (policy_logps(args[0]), args[1], args[0].columns))

    def policy_logps(pairs):
        """Of the ranking pairs' whole pools, after the steps so far."""
        if not steps:
            return None
        packed, prompts = steps[-1][0].eval(), opened.prompts()
        rows = zip(pairs.examples, pairs.pool, strict=True)
        trees = [prompts.pair_tree(example, "rank", pool) for example, pool in rows]
        with torch.no_grad():
            return packed(packed.collate(trees, opened.tokens)).view(len(trees), -1)

    argv = "--rejected-from self --rejected 2 --max-steps 6 --epochs 2 --lr 0.01 --eval-limit 4".split()
    dpo(sft_run, tmp_path / "dpo", *argv)
    (_, reference, old), (expected, policy, new) = draws
    torch.testing.assert_close(policy[0::3], expected, atol=1e-4, rtol=0)
    assert float((policy - reference)[0::3].abs().mean()) > 0.1
    for logps, columns, epoch in ((reference, old, steps[:3]), (policy, new, steps[3:])):
        ranks = (-logps[0::3, 1:]).argsort().argsort().gather(1, columns)
        assert set(ranks.flatten().tolist()) <= {1, 2, 3, 4}
        trained = torch.cat([table[~table[:, 2].isnan(), 1:] for _, table in epoch])  # of the ranking pairs
        drawn = reference[0::3, 1:].gather(1, columns)
        assert sorted(trained.tolist()) == sorted(drawn.tolist())


def test_the_effect_of_noise_is_logged_every_50_steps(sft_run, tmp_path, monkeypatch):
    """Here every 2, of the step's first micro-batch."""
    assert dpo_hano.NOISE_EFFECT_EVERY == 50
    monkeypatch.setattr(dpo_hano, "NOISE_EFFECT_EVERY", 2)
    effects = recorded(monkeypatch, "noise_effect", lambda effect, _: effect)
    out = dpo(sft_run, tmp_path / "dpo", *"--max-steps 5 --batch-size 3 --grad-accum 2".split())
    log = training(out / "metrics.jsonl")
    names = {"noise_kl", "noisy_margin_size", "clean_margin_size"}
    assert [names & line.keys() for line in log] == [set(), names, set(), names, set()]
    for line, effect in zip(log[1::2], effects, strict=True):
        assert {name: line[name] for name in names} == pytest.approx({n: float(effect[n]) for n in names}, rel=1e-5)
        assert line["noise_kl"] > 0 and line["noisy_margin_size"] != line["clean_margin_size"]


@pytest.mark.parametrize("tiny", [True, False])
def test_the_new_lora_has_no_dropout_by_default(tiny, dpo_run):
    """Neither the paper's 0.05 nor the SFT run's."""
    options = dpo_hano.parse([])
    complete(options, dpo_hano.OPTIONS, tiny, {"lora_dropout": 0.2}, "the SFT run", dpo_hano.INHERITED)
    assert options.lora_dropout == 0
    assert json.loads((dpo_run / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0
