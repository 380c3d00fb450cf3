"""The run folder: atomic writes, locks, sample order, schedule, one-line errors."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from hanorec.run import training
from hanorec.run.files import UserError, disk_message, locked, read_jsonl, replacing, write_json
from hanorec.run.launch import launcher_option
from hanorec.run.log import Log
from hanorec.run.runs import begin_run, expand_runs, read_run


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("first", "second"):
        with replacing(tmp_path / "folder") as beside:
            beside.mkdir()
            (beside / name).touch()
    assert os.listdir(tmp_path / "folder") == ["second"]


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept").touch()
    with pytest.raises(UserError, match="results is a folder; give the file to write"):
        write_json(tmp_path / "results", {})
    assert os.listdir(tmp_path) == ["results"] and os.listdir(tmp_path / "results") == ["kept"]


def test_a_folder_whose_replacement_fails_stays(tmp_path, monkeypatch):
    folder, real = tmp_path / "folder", os.replace
    folder.mkdir()
    (folder / "first").touch()

    def replace(source, target):
        if "new.partial" in str(source) and target == folder:
            raise OSError(errno.EIO, "broken disk")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="broken disk"), replacing(folder) as beside:
        beside.mkdir()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(folder) == ["first"]


def test_a_folder_that_a_killed_process_renamed_comes_back(tmp_path):
    """A process was killed after the first of the two renames in `replacing`, or in the middle of `delete`."""
    for name in (".adapter.17.old.partial", ".adapter.17.new.partial", ".model.17.deleted.partial", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    (tmp_path / "checkpoints" / ".step-4.old.17.old.partial").mkdir()
    (tmp_path / ".reference.17.old.partial").mkdir()
    (tmp_path / "reference").mkdir()
    with locked(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "adapter", "checkpoints", "reference"]
    assert os.listdir(tmp_path / "adapter") == ["weights"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-4.old", "weights"]


def test_the_error_of_a_failed_lock_does_not_name_another_process(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot be locked .*no locks available"), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EACCES, "permissions"), (errno.EROFS, "written")]
)
def test_each_error_of_the_disk_has_its_own_remedy(number, remedy):
    message = disk_message(OSError(number, "broken", "items.jsonl"))
    assert message.startswith("items.jsonl: ") and remedy in message
    assert "make room" in message or number != errno.ENOSPC
    assert disk_message(OSError(errno.ENOENT, "broken")) is None


def test_a_folder_in_use_is_refused(tmp_path):
    other = "import sys, time, pathlib\nfrom hanorec.run.files import locked\nwith locked(pathlib.Path(sys.argv[1])):\n"
    other += " print('held', flush=True)\n time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", other, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"held\n"
    try:
        with pytest.raises(UserError, match="in use by another process"), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path):  # a killed process leaves no lock behind
        pass


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_micro_batches_cover_each_epoch_once(processes):
    examples, per_example, batch, accum = 29, 2, 2, 3
    per_step = batch * accum * processes
    steps = examples * per_example // per_step
    sizes = examples, per_example, batch, accum, processes
    streams = [training.micro_batches(*sizes, rank, seed=3) for rank in range(processes)]
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(steps):
            by_process = [next(stream) for stream in streams]
            assert all(len(micro) == accum and all(len(b) == batch for b in micro) for micro in by_process)
            # The processes' batches side by side are in the order of one process
            seen += [n for i in range(accum) for micro in by_process for n in micro[i]]
        assert len(set(seen)) == len(seen) == steps * per_step <= examples * per_example
        pairs = [(a // per_example, b // per_example) for a, b in zip(seen[::2], seen[1::2], strict=True)]
        assert all(a == b for a, b in pairs)  # an example's samples stay side by side
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    if processes > 1:
        single = training.micro_batches(examples, per_example, batch, accum * processes, 1, 0, seed=3)
        assert [n for b in next(single) for n in b] == epochs[0][:per_step]


def test_micro_batches_refuse_too_few_samples():
    with pytest.raises(ValueError, match="4 samples do not fill a step of 8"):
        next(training.micro_batches(2, 2, 8, 1, 1, 0, seed=0))


def test_cosine_by_hand():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = training.cosine(optimizer, steps=4, warmup_steps=2, warmup_peak=3.0)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    half = 0.5**0.5
    assert rates == pytest.approx([0.3, 0.15, 0.1, 0.05 * (1 + half), 0.05, 0.05 * (1 - half)])
    assert schedule.get_last_lr()[0] == pytest.approx(0)
    # The warm-up begins with a rise over two steps
    schedule = training.cosine(optimizer, steps=1, warmup_steps=40, warmup_peak=1.0)
    start = optimizer.param_groups[0]["initial_lr"]
    assert schedule.get_last_lr()[0] == pytest.approx(start / 2)


def test_readers_name_file_line_and_remedy(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError, match=r"rows.jsonl does not exist; make it"):
        read_jsonl(path, {"a": int}, "make it")
    path.write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(UserError, match=r"line 2: no 'a'; make it"):
        read_jsonl(path, {"a": int}, "make it")
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"line 2: not JSON"):
        read_jsonl(path, {"a": int}, "make it")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="no run folder"):
        begin_run(tmp_path, "sft", {})
    with pytest.raises(UserError, match="does not exist"):
        read_run(tmp_path)
    write_json(tmp_path / "config.json", {"stage": "sft", "options": {}})
    with pytest.raises(UserError, match="not finished"):
        read_run(tmp_path)
    with pytest.raises(UserError, match=r"no run of dpo_hano.py"):
        read_run(tmp_path, ["dpo_hano"])


def test_a_finished_run_is_replaced_only_with_overwrite_and_says_so(tmp_path, capsys):
    begin_run(tmp_path, "sft", {})
    assert capsys.readouterr().out == ""
    write_json(tmp_path / "result.json", {})
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match="holds a finished run; choose another --out, or give --overwrite"):
        begin_run(tmp_path, "sft", {})
    assert (tmp_path / "adapter").exists() and (tmp_path / "result.json").exists()
    begin_run(tmp_path, "sft", {"overwrite": True})
    assert capsys.readouterr().out == f"replaces the finished run in {tmp_path}\n"
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "adapter").exists()


def test_the_number_of_processes_in_the_launchers_command(monkeypatch):
    def launched(line):
        monkeypatch.setattr(Path, "read_text", lambda path, errors: "\0".join(line.split()))
        return launcher_option("--num_processes")

    assert launched("python accelerate launch --cpu --num_processes 2 sft.py") == "2"
    assert launched("python accelerate launch --num-processes=4 sft.py") == "4"
    assert launched("python -m accelerate.commands.accelerate_cli launch --num_processes 3 sft.py") == "3"
    assert launched("python /opt/bin/accelerate launch sft.py") is None
    assert launched("bash") is None
    assert launched("python launch --num_processes 2 sft.py") is None  # another program has this option
    assert launched("bash launch accelerate --num_processes 2") is None


def loaded(batches, device):
    """The sample numbers of each step, loaded as the stages load them."""
    for number, (step, batch, value) in enumerate(training.loaded(lambda step, batch: batch, batches, 0, device), 1):
        assert step == number and value == batch
        yield value


def test_loading_ahead_keeps_values_and_raises_errors_in_order():
    def values():
        yield from range(3)
        raise ValueError("after three")

    gpu, cpu = torch.device("cuda"), torch.device("cpu")  # only the names of the devices are used
    assert list(loaded(range(7), gpu)) == list(loaded(range(7), cpu)) == list(range(7))
    assert list(loaded([], gpu)) == []
    taken, iterator = [], loaded(values(), gpu)
    with pytest.raises(ValueError, match="after three"):
        while True:
            taken.append(next(iterator))
    assert taken == [0, 1, 2]


def one_process():
    device = torch.device("cpu")
    return SimpleNamespace(is_main_process=True, num_processes=1, device=device, gather=lambda tensor: tensor)


def test_speed_is_measured_at_the_steps_not_when_metrics_are_read(tmp_path):
    options = SimpleNamespace(report_to=None, out=tmp_path)
    log = Log("sft", one_process(), options, 3)
    for step in (1, 2):
        time.sleep(0.1)
        log.step(step, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}, ["a"] * 4)
    log.flush()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(5 < line["samples_per_second"] <= 40 for line in lines)


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    log = Log("sft", one_process(), SimpleNamespace(report_to=None, out=tmp_path), 3)
    log.write(1, {"noise": torch.tensor(float("nan")), "eta": float("inf"), "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "noise": None, "eta": None, "lr": 0.5}


@pytest.mark.parametrize(("processes", "text"), [(1, "after this step"), (2, "after the next step")])
def test_a_signal_prints_when_the_run_will_stop(processes, text, capfd):
    log = SimpleNamespace(signal=0, accelerator=SimpleNamespace(num_processes=processes))
    before = signal.signal(signal.SIGTERM, partial(Log.on_signal, log))
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert log.signal == signal.SIGTERM and text in capfd.readouterr().err


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step_is_logged(tmp_path):
    log = Log("sft", one_process(), SimpleNamespace(out=tmp_path, report_to=None, lr=1), 3)
    good = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}
    log.step(1, good, ["a", "b", "a", "b"])
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # metrics are read after the next step has started
    log.step(2, good | {"grad_norm": torch.tensor(float("inf"))}, ["c", "d", "d", "c"])
    with pytest.raises(UserError, match=r"grad_norm is inf at step 2 \(users c, d\); lower --lr 1"):
        log.flush()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def a_run(folder, stage, data="data/shop", finished=True):
    write_json(folder / "config.json", {"stage": stage, "options": {"data": data}})
    if finished:
        write_json(folder / "result.json", {})


def test_a_folder_of_runs_stands_for_the_finished_runs_inside(tmp_path):
    for name, stage in (("a-dpo", "dpo_hano"), ("sft-10", "sft"), ("sft-9", "sft"), ("taught", "teach")):
        a_run(tmp_path / name, stage)
    a_run(tmp_path / "unfinished", "sft", finished=False)
    (tmp_path / "notes").mkdir()
    found = [tmp_path / name for name in ("sft-9", "sft-10", "a-dpo")]
    assert expand_runs([tmp_path], None, []) == found
    assert expand_runs([tmp_path / "a-dpo", tmp_path], None, []) == [found[2], *found[:2]]
    nothing = tmp_path / "notes"
    assert expand_runs([nothing], None, []) == [nothing]  # read_run refuses it


def test_the_runs_of_a_data_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "runs" / "shop" / "sft", "sft")
    a_run(tmp_path / "runs" / "shop" / "older", "sft", data="data/shop-2025")
    for spelling in ("data/shop", "./data/shop/", str(tmp_path / "data" / "shop")):
        assert expand_runs([], Path(spelling), []) == [Path("runs/shop/sft")]
    with pytest.raises(UserError, match=r"runs/other holds no finished run on data/other; run sft.py"):
        expand_runs([], Path("data/other"), [])
    demo = [Path("runs/demo/sft"), Path("runs/shop/sft")]
    assert expand_runs([], None, demo) == demo[1:]
    with pytest.raises(UserError, match="no --run given"):
        expand_runs([], None, demo[:1])
