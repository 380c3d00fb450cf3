"""Several processes: they compute what one computes, sharded weights too; and what happens to them when one of them
dies or all are told to stop."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from forked import launch
from forked import start as start_forked
from safetensors.torch import load_file
from stages import lines

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
WORLDS = ("2", "4", "2_sharded")


@pytest.fixture(scope="module")
def trained(prepared, sft_run, tmp_path_factory):
    """The folder where tests/helpers/several_processes.py has trained."""
    out = tmp_path_factory.mktemp("several") / "out"
    log = out.with_name("log")
    process = start_forked(ROOT / "tests" / "helpers" / "several_processes.py", prepared, sft_run, out, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    return out


def weights(run):
    return load_file(next(iter([*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")])))


def distance(one, other):  # of tied weights, one may hold both
    return float(sum((one[name] - other[name]).double().square().sum() for name in one.keys() & other.keys())) ** 0.5


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("run", ["sft", "clean", "noisy"])
def test_several_processes_train_as_one_does(trained, prepared, run, world):
    one, several = trained / "1" / run, trained / world / run
    logs = [lines(path / "metrics.jsonl") for path in (one, several)]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert len(losses[0]) == len(losses[1]) == (3 if run == "sft" else 20)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert logs[1][-1]["step"] == 20 and logs[1][-1]["val_NDCG@3"] == logs[0][-1]["val_NDCG@3"]
    before = load_file(prepared / "tiny" / "model.safetensors")
    if run != "sft":  # LoRA's B starts at 0; A, whose start is not kept, is left out
        before = {name: 0 * weight for name, weight in weights(one).items() if "lora_B" in name}
    assert distance(weights(several), weights(one)) < 1e-3 * distance(weights(one), before)


def test_noise_and_eta_are_those_of_one_process(trained):
    logs = {world: lines(trained / world / "noisy" / "metrics.jsonl")[:20] for world in ("1", *WORLDS)}
    for world in WORLDS:
        for name in ("noise", "eta"):
            values = [[line[name] for line in logs[w]] for w in (world, "1")]
            assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert all(line["noise"] > 0.05 for line in logs["1"])


@pytest.mark.parametrize("world", WORLDS[:2])
def test_several_processes_score_each_example_as_one_does(trained, world):
    """Seven rows in batches of two do not share out evenly."""
    one, several = (trained / w / "start" / "first7_predictions.jsonl" for w in ("1", world))
    assert len(lines(one)) == 7 and one.read_text() == several.read_text()


@pytest.mark.parametrize("world", WORLDS[:2])
def test_several_processes_recommend_what_one_does(trained, prepared, world):
    one, several = (trained / w / "recommendations.jsonl" for w in ("1", world))
    assert len(lines(one)) == len(lines(prepared / "histories.jsonl")) and one.read_bytes() == several.read_bytes()


def test_noise_and_checkpoints_of_sharded_weights(tmp_path):
    (tmp_path / "out").mkdir()
    launch(2, ROOT / "tests" / "helpers" / "sharded.py", tmp_path / "out", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1", "checkpoints"]


def test_sharded_weights_are_shards_after_a_forward_without_gradients(prepared, sft_run, tmp_path):
    (tmp_path / "out").mkdir()
    launch(2, ROOT / "tests" / "helpers" / "resharded.py", prepared, sft_run, tmp_path / "out", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1"]


def test_configurations_are_what_accelerate_reads(prepared, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {p.stem: load_config_from_file(str(p)).distributed_type.value for p in (ROOT / "configs").glob("*.yaml")}
    assert kinds == {
        "ddp": "MULTI_GPU", "ddp_cpu": "MULTI_GPU", "multi_node": "MULTI_GPU",
        "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED",
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += ["configs/ddp_cpu.yaml", "sft.py", "--data", str(prepared), "--out", str(tmp_path / "sft")]
    command += "--max-steps 1 --batch-size 2 --eval-limit 2 --warmup-steps 0".split()
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "ACCELERATE_USE_CPU"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "x 2 processes = 4" in result.stdout, result.stderr[-3000:]


def start(processes, prepared, out, log):
    """A launched run in a process group of its own, as a shell makes one."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *several]
    command += ["--num_processes", processes, "sft.py", "--data", prepared, "--out", out, "--max-steps", 2000]
    command += "--batch-size 2 --grad-accum 2 --eval-limit 4 --save-every 5 --epochs 999 --warmup-steps 0".split()
    command = [str(word) for word in command]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)


def wait_for_step(step, out, process):
    while not any(int(path.name[5:]) >= step for path in (out / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)


def ends(process, workers):
    """The launcher's exit code, once its workers have ended too."""
    code = process.wait(120)
    assert psutil.wait_procs(workers, 120)[1] == []
    return code


def test_two_processes_of_which_one_dies_and_which_are_then_told_to_stop(prepared, tmp_path):
    out = tmp_path / "sft"
    with open(tmp_path / "log", "w") as log:
        process = start(2, prepared, out, log)
        wait_for_step(5, out, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
        assert ends(process, workers) != 0
        saved = sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
        assert saved and not (out / "result.json").exists()

        process = start(2, prepared, out, log)
        wait_for_step(saved[-1] + 5, out, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
        assert ends(process, workers) != 0
    said = (tmp_path / "log").read_text()
    assert f"continues after step {saved[-1]}" in said
    step = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
    assert f"stopped; step {step} is saved. To continue: {sys.executable} -m accelerate" in said
    state = json.loads((out / "checkpoints" / f"step-{step}" / "state.json").read_text())
    assert state["step"] == step and state["log"]["metrics_bytes"] == (out / "metrics.jsonl").stat().st_size
    steps = [line["step"] for line in lines(out / "metrics.jsonl") if "loss" in line]
    assert steps == sorted(set(steps))


def test_one_launched_process_is_told_to_stop(prepared, tmp_path):
    with open(tmp_path / "log", "w") as log:
        process = start(1, prepared, tmp_path / "sft", log)
        wait_for_step(5, tmp_path / "sft", process)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        assert ends(process, workers) != 0
    assert "is saved. To continue: " in (tmp_path / "log").read_text()


def test_gradients_are_averaged_over_processes(tmp_path, prepared):
    (tmp_path / "out").mkdir()
    launch(2, ROOT / "tests" / "helpers" / "average_gradients.py", prepared, tmp_path / "out", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1"]


def test_a_launch_with_fewer_processes_than_asked_is_refused(prepared, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    command += ["sft.py", "--data", prepared, "--out", tmp_path / "sft"]
    result = subprocess.run([str(w) for w in command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "asked for 2 processes but started 1" in result.stderr
    assert not (tmp_path / "sft" / "config.json").exists()
