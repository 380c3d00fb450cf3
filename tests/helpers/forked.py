"""Run scripts in processes of their own.

The processes are forked from one that has loaded the libraries, because loading takes longer than the scripts. Tests of
the launcher start ordinary processes.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

from conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "accelerate", "peft", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"])


def run(argv, log, environment):
    """Run `python argv` in this process. Its output goes to the file `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= environment
    os.chdir(ROOT)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def start(*argv, log, **environment):
    """Start `python argv`. Returns a multiprocessing.Process.

    Args:
        log: the file for the output.
        environment: environment variables.
    """
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    process = SERVER.Process(target=run, args=([str(word) for word in argv], str(log), environment))
    process.start()
    return process


def wait_for(condition, process):
    """Wait until condition() is true. Fails if the process ends before."""
    while not condition():
        assert process.is_alive(), process
        time.sleep(0.0005)


def kill(process):
    process.kill()
    process.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment variables by which torch.distributed finds the other processes."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


def launch(processes, *argv, folder):
    """Run `python argv` in several distributed processes, with logs in `folder`. Each must end with exit code 0."""
    port, started = free_port(), []
    for rank in range(processes):
        started.append(start(*argv, log=Path(folder) / f"{rank}.log", **rank_variables(rank, processes, port)))
    for rank, process in enumerate(started):
        process.join(300)
        output = (Path(folder) / f"{rank}.log").read_text()
        if process.exitcode != 0:
            for each in started:
                each.kill()
        assert process.exitcode == 0, output[-3000:]
