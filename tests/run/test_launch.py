"""Number of threads, the launcher's command line, and the command to continue a run."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hanorec.run import launch
from hanorec.run.files import UserError


@pytest.fixture
def threads():
    """Restore torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_omp_num_threads_is_obeyed(monkeypatch, threads):
    monkeypatch.setattr(launch, "launcher_command", list)
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.start_accelerator()
    assert torch.get_num_threads() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch.start_accelerator()
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("load", "said"), [(0.5, False), (2.0, True)])
def test_a_busy_machine_is_said(monkeypatch, threads, capsys, load, said):
    monkeypatch.setattr(launch, "launcher_command", list)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load * os.cpu_count(), 0.0, 0.0), raising=False)
    launch.start_accelerator()
    assert ("OMP_NUM_THREADS=1" in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({}, [], False),
        ({"OMP_NUM_THREADS": "3"}, [], True),
        ({}, ["--num_cpu_threads_per_process", "2"], True),
        ({}, ["--num-cpu-threads-per-process=2"], True),
        ({}, ["--num_processes", "2"], False),
    ],
)
def test_threads_set_by_the_launchers_environment_or_options(monkeypatch, variables, options, expected):
    """The launcher always sets OMP_NUM_THREADS for the script, so the launcher's own environment counts."""
    command = ["sh", "-c", "sleep 60; true", "accelerate", "launch", *options]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    launcher = subprocess.Popen(command, env=environment | variables)
    try:
        while not Path(f"/proc/{launcher.pid}/cmdline").read_bytes():  # empty for a moment after the start
            time.sleep(0.01)
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert launch.user_sets_threads() == expected
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "/env/bin/accelerate", "launch", "sft.py"], True),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "sft.py"], True),
        (["python", "/env/bin/accelerate-launch", "sft.py"], True),
        (["python", "-m", "accelerate.commands.launch", "sft.py"], True),
        (["python", "/env/lib/accelerate/commands/launch.py", "sft.py"], True),
        (["make", "launch"], False),
        (["bash", "launch", "accelerate"], False),
    ],
)
def test_every_form_of_the_launcher_is_recognised(monkeypatch, words, expected):
    monkeypatch.setattr(launch, "parent_words", lambda name: words)
    assert launch.launcher_command() == (words if expected else [])


def test_the_command_to_continue(monkeypatch):
    """A script is named by its path. A module that was started with -m is named by the module's name."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--seed", "1"])
    main = SimpleNamespace(__spec__=None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert launch.python_command() == ["python", "sft.py", "--seed", "1"]
    main.__spec__ = SimpleNamespace(name="mllm_srec.teach")
    assert launch.python_command() == ["python", "-m", "mllm_srec.teach", "--seed", "1"]


def test_an_unknown_tracker_and_a_missing_package_have_their_own_messages(monkeypatch):
    with pytest.raises(UserError, match=r"--report-to wand: no such tracker; give one of .*wandb.*trackio"):
        launch.check_tracker("wand")
    monkeypatch.setattr(launch, "get_available_trackers", list)
    with pytest.raises(UserError, match=r"trackio: its package is not installed; python -m pip install trackio$"):
        launch.check_tracker("trackio")
