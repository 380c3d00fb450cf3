"""Runs that are killed or stopped continue and end like a run that was never stopped; wrong options are refused."""

import contextlib
import json
import os
import shutil
import signal

import pytest
from forked import kill, start, wait_for
from soak import left
from spoilt import sign
from stages import refused, training

import dpo_hano
import prepare_data
import sft
from hanorec.data.folder import DataFolder
from hanorec.model.supervised import supervised_step
from hanorec.run.files import delete, locked

STEPS = "--batch-size 4 --grad-accum 2 --eval-limit 4 --save-every 3 --lr 1e-3".split()


def logged(out):
    """The number of lines in a run's metrics.jsonl."""
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def test_sft_killed_in_mid_epoch_and_in_a_checkpoint_ends_as_if_it_had_not_been(prepared, tmp_path):
    argv = ["--data", prepared, *STEPS, *"--max-steps 20 --warmup-steps 5 --warmup-items 8 --dropout 0.1".split()]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sft.main([str(word) for word in [*argv, "--out", whole]])
    process = start("sft.py", *argv, "--out", cut, log=f"{cut}.log")
    wait_for(lambda: (cut / "checkpoints" / "step-6").exists(), process)
    kill(process)
    process = start("sft.py", *argv, "--out", cut, log=f"{cut}.log")
    wait_for(lambda: any("step-12" in name or "step-15" in name for name in os.listdir(cut / "checkpoints")), process)
    kill(process)  # while .step-12.<process>.new.partial is written
    assert not (cut / "result.json").exists()
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] != []
    sft.main([str(word) for word in [*argv, "--out", cut]])
    assert left(cut) == left(whole)
    assert {"result.json", "metrics.jsonl", "model/model.safetensors"} < left(whole).keys()
    assert training(cut / "metrics.jsonl")[-1]["step"] == 25


def test_dpo_killed_and_its_moving_average(sft_run, tmp_path):
    argv = ["--sft", sft_run, *STEPS, *"--max-steps 15 --responsiveness ema".split()]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    dpo_hano.main([str(word) for word in [*argv, "--out", whole]])
    process = start("dpo_hano.py", *argv, "--out", cut, log=f"{cut}.log")
    wait_for(lambda: logged(cut) >= 7, process)
    kill(process)
    dpo_hano.main([str(word) for word in [*argv, "--out", cut]])
    assert left(cut) == left(whole)
    assert [line["step"] for line in training(cut / "metrics.jsonl")] == list(range(1, 16))


def test_dpo_that_draws_anew_in_each_epoch_continues_with_its_draw(sft_run, tmp_path, monkeypatch):
    """Stopped in the second epoch, whose rejected items the policy of the first epoch's end has ranked."""
    argv = ["--sft", sft_run, *"--rejected-from self --rejected 2 --epochs 2 --batch-size 6 --lr 0.01".split()]
    argv = [str(word) for word in [*argv, "--eval-limit", 4, "--hardness", "margin"]]
    examples = DataFolder.examples
    monkeypatch.setattr(DataFolder, "examples", lambda self, split, limit=0: examples(self, split, limit or 6))
    drawn = []

    def step_with_signal(step, micro_batches, *args):
        (batch,) = micro_batches
        drawn.append((step, float(batch.reference.nansum())))
        if step == 5 and len(drawn) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(step, micro_batches, *args)

    take_step = dpo_hano.take_step
    monkeypatch.setattr(dpo_hano, "take_step", step_with_signal)
    dpo_hano.main([*argv, "--out", str(tmp_path / "whole")])
    for _ in range(2):
        with contextlib.suppress(SystemExit):
            dpo_hano.main([*argv, "--out", str(tmp_path / "cut")])
    assert [step for step, _ in drawn] == [1, 2, 3, 4, 5, 6] * 2 and drawn[:6] == drawn[6:]
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_an_unfinished_data_folder_is_refused_and_prepared_again(prepared, capsys):
    out = prepared.parent / "again"  # beside the raw files like `prepared`, so that both manifests name the same paths
    argv = ["--dataset", "movielens", "--source", prepared.parent / "raw", "--max-pixels", 3136]
    process = start("prepare_data.py", *argv, "--out", out, log=f"{out}.log")
    wait_for(lambda: (out / "encoded").exists() and os.listdir(out / "encoded"), process)
    kill(process)  # while encoded/.tiny.<process>.new.partial is written
    assert (out / "manifest.json").exists() and not (out / "encoded" / "tiny").exists()
    error = refused(capsys, sft.main, "--data", out, "--out", out.parent / "sft")
    assert "is encoded for no backbone, not for tiny; run prepare_data.py" in error
    prepare_data.main([str(word) for word in [*argv, "--out", out]])
    assert left(out) == left(prepared)


@pytest.fixture
def unfinished(prepared, tmp_path, monkeypatch, capsys):
    """An SFT run that SIGTERM has stopped after step 4 of 8. Returns (its options, its folder, its output)."""
    argv = ["--data", str(prepared), "--out", str(tmp_path / "sft"), *STEPS, "--max-steps", "8", "--warmup-steps", "0"]

    def step_with_signal(*args):
        if args[4].last_epoch == 3:  # args[4] is the schedule: three steps are done
            os.kill(os.getpid(), signal.SIGTERM)
        return supervised_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "supervised_step", step_with_signal)
        with pytest.raises(SystemExit) as stop:
            sft.main(argv)
    assert stop.value.code == 128 + signal.SIGTERM
    return argv, tmp_path / "sft", capsys.readouterr().out


def test_a_stopped_run_saves_a_checkpoint_and_prints_the_command_to_continue(unfinished, tmp_path, capsys):
    argv, out, printed = unfinished
    assert "stopped; step 4 is saved. To continue: python " in printed
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-3", "step-4"]
    config = json.loads((out / "config.json").read_text())
    config["machine"]["threads"] = "99"
    del config["prompts"], config["options"]["history_first"]  # as in a run from before there were these
    (out / "config.json").write_text(json.dumps(config))
    sft.main(argv)
    printed = capsys.readouterr().out
    assert "continues after step 4" in printed
    assert "the last digits may differ, because these have changed: threads: 99, now 1\n" in printed
    assert f"next: python dpo_hano.py --sft {out}\n" in printed
    argv[3] = str(tmp_path / "whole")
    sft.main(argv)
    assert left(out) == left(tmp_path / "whole") and not (out / "checkpoints").exists()


def test_a_run_is_not_continued_with_other_options_or_data(unfinished, sft_run, tmp_path, capsys):
    argv, out, _ = unfinished
    before = left(out)
    for option, value in {"--seed": 7, "--batch-size": 2, "--lr": 0.01, "--max-steps": 9, "--dropout": 0.3}.items():
        error = refused(capsys, sft.main, *argv, option, value)
        assert f"{option} (was " in error and f"now {value})" in error and "choose another --out, or delete" in error
    other = ["--data", json.loads((sft_run / "config.json").read_text())["options"]["data"]]
    shutil.copytree(other[1], tmp_path / "data")
    examples = (tmp_path / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(reversed(examples)))
    sign(tmp_path / "data")
    assert "the data folder (not the same as before)" in refused(capsys, sft.main, *argv, "--data", tmp_path / "data")
    assert "--resume never" in refused(capsys, sft.main, *argv, "--resume", "never")
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(json.dumps(json.loads(config) | {"prompts": "0" * 64}))
    assert "the texts of the prompts (not the same as before)" in refused(capsys, sft.main, *argv)
    (out / "config.json").write_text(config)
    with locked(out):
        assert "is in use by another process" in refused(capsys, sft.main, *argv)
    assert left(out) == before
    state = out / "checkpoints" / "step-4" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    error = refused(capsys, sft.main, *argv)
    assert f"delete {state.parent}: then the run continues from the checkpoint before it" in error
    delete(state.parent)
    # None of these options changes the result
    sft.main([*argv, "--save-every", "100", "--keep", "1", "--gradient-checkpointing"])
    assert "continues after step 3" in capsys.readouterr().out
    finished = left(out)
    assert "holds a finished run; choose another --out, or give --overwrite" in refused(capsys, sft.main, *argv)
    assert left(out) == finished
    sft.main([*argv, "--overwrite", "--resume", "never", "--seed", "7"])
    assert json.loads((out / "config.json").read_text())["options"]["seed"] == 7
