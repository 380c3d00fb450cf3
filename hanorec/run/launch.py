"""Start the accelerator with the processes and threads that the user requested, and divide work among processes."""

import atexit
import os
import re
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from hanorec.run.files import UserError
from hanorec.run.runs import json_options

# Finds the launcher (accelerate launch, accelerate-launch, or python -m) in a command line where NUL ends each word
LAUNCHER = re.compile(
    r"[\0/](accelerate|accelerate_cli\.py|accelerate\.commands\.accelerate_cli)\0launch\0"
    r"|[\0/](accelerate-launch|accelerate/commands/launch\.py|accelerate\.commands\.launch)\0"
)


def start_accelerator(mixed_precision: str = "no", report_to: str | None = None, out: Path | None = None):
    """Return an Accelerator with the number of processes that the user requested.

    Args:
        mixed_precision: no or bf16. DeepSpeed takes the precision from its own config file.
        report_to: name of a tracker, for the stages that train.
        out: folder for the tracker's files.

    Raises:
        UserError: the tracker cannot be used, or the launcher started fewer processes than requested.
    """
    if report_to:
        check_tracker(report_to)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise the processes would not communicate
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    precision = None if deepspeed else mixed_precision
    accelerator = Accelerator(mixed_precision=precision, log_with=report_to, project_dir=out)
    if deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # each process loads and checks all weights; DeepSpeed shards them later
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # required, not used
    if accelerator.num_processes > 1:
        # If the process group is still open when the interpreter ends, gloo's threads may abort the process
        atexit.register(accelerator.state.destroy_process_group)
    requested = int(launcher_option("--num_processes") or 1)
    if requested > accelerator.num_processes:
        started = f"the launcher was asked for {requested} processes but started {accelerator.num_processes}"
        raise UserError(f"{started}; on CPUs use accelerate launch --multi_gpu --num_processes {requested}")
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and not user_sets_threads():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(cores)  # the launcher, if there is one, had set 1
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if cores > 1 and load >= os.cpu_count():
            advice = "if this is slow, put OMP_NUM_THREADS=1 before the command"
            print(f"the machine is busy (load {load:.1f}): {advice}", file=sys.stderr)
    return accelerator


def check_tracker(name: str) -> None:
    """Raise UserError if accelerate has no tracker of this name, or if its package is not installed."""
    names = [tracker.value for tracker in LoggerType if tracker != LoggerType.ALL]
    if name not in names:
        raise UserError(f"--report-to {name}: no such tracker; give one of {', '.join(names)}")
    if name not in [tracker.value for tracker in get_available_trackers()]:  # packages have the names of trackers
        raise UserError(f"--report-to {name}: its package is not installed; python -m pip install {name}")


def start_tracker(options, accelerator) -> None:
    """Start the tracker --report-to for the run --out, with the run's options.

    TensorBoard writes into the folder tensorboard/ of the run. It gets no options: it would write a folder for them.
    """
    if options.report_to == "tensorboard":
        accelerator.init_trackers("tensorboard")
        return
    config = json_options(options)
    config = {name: v if isinstance(v, (int, float, str, bool)) else str(v) for name, v in config.items()}
    named = options.report_to in ("trackio", "wandb")
    settings = {options.report_to: {"name": str(options.out)}} if named else {}
    accelerator.init_trackers("hanorec", config, settings)


def parent_words(name: str) -> list[str]:
    """Read `cmdline` or `environ` of the parent process. Return [] if that is not possible."""
    try:
        return Path(f"/proc/{os.getppid()}/{name}").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:  # no /proc, or the parent runs as another user
        return []


def launcher_command() -> list[str]:
    """Return the words of the `accelerate launch` command that started this process, [] if none did."""
    words = parent_words("cmdline")
    return words if LAUNCHER.search("\0".join(["", *words, ""])) else []


def python_command() -> list[str]:
    """Return the words that start this script without a launcher: by its path, or with -m as a module."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]]


def launcher_option(name: str) -> str | None:
    """Return the value of an option of the launcher, spelled with `_` or `-`. None without the option."""
    arguments = launcher_command()
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, _, value = argument.partition("=")
        if flag.replace("-", "_") == name.replace("-", "_"):
            return value or following
    return None


def user_sets_threads() -> bool:
    """Return whether the user chose the number of threads, by OMP_NUM_THREADS or by an option of the launcher.

    `accelerate launch` sets OMP_NUM_THREADS for the script if the user did not. So look at the environment of the
    launcher.
    """
    if not launcher_command():
        return "OMP_NUM_THREADS" in os.environ
    given = any(variable.startswith("OMP_NUM_THREADS=") for variable in parent_words("environ"))
    return given or launcher_option("--num_cpu_threads_per_process") is not None


def shared_out(chunks: list, accelerator) -> list:
    """Return this process's share of the chunks.

    Every process gets the same number of chunks, because sharded weights need that. So two processes may get the same
    chunk.
    """
    world = accelerator.num_processes
    rounds = -(-len(chunks) // world)
    return [chunks[(i * world + accelerator.process_index) % len(chunks)] for i in range(rounds)]
