"""Scripts in processes of their own, forked from one that has loaded the libraries: loading takes longer than what they
do here. Tests of the launcher start true ones."""

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
    """Become `python argv`, with its output in the file `log`."""
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
    """`python argv` as a multiprocessing.Process."""
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    process = SERVER.Process(target=run, args=([str(word) for word in argv], str(log), environment))
    process.start()
    return process


def wait_for(condition, process):
    while not condition():
        assert process.is_alive(), process
        time.sleep(0.0005)


def kill(process):
    process.kill()
    process.join()


def launch(processes, *argv, folder):
    """`python argv` in so many processes that know of each other; their logs in `folder`. Each must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": free.getsockname()[1]}
    started = []
    for rank in range(processes):
        own = place | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        own = {name: str(value) for name, value in own.items()}
        started.append(start(*argv, log=Path(folder) / f"{rank}.log", **own))
    for rank, process in enumerate(started):
        process.join(300)
        said = (Path(folder) / f"{rank}.log").read_text()
        if process.exitcode != 0:
            for each in started:
                each.kill()
        assert process.exitcode == 0, said[-3000:]
