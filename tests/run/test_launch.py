"""Threads and processes: what the user and the launcher asked for."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch

from hanorec.run import launch


@pytest.fixture
def threads():
    """Sets the number of threads back."""
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
def test_the_launchers_own_environment_and_options_count(monkeypatch, variables, options, expected):
    """The launcher sets OMP_NUM_THREADS for the script in any case."""
    command = ["sh", "-c", "sleep 60; true", "accelerate", "launch", *options]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    launcher = subprocess.Popen(command, env=environment | variables)
    try:
        while not Path(f"/proc/{launcher.pid}/cmdline").read_bytes():  # for a moment after its start
            time.sleep(0.01)
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert launch.user_sets_threads() == expected
    finally:
        launcher.kill()
        launcher.wait()
