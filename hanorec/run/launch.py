"""The accelerator with the processes and threads that the user asked for, and work shared out over processes."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from hanorec.run.files import UserError


def start_accelerator(mixed_precision: str = "no", report_to: str | None = None, out: Path | None = None):
    """Return an Accelerator with the processes that the launcher was asked for.

    Args:
        mixed_precision: no or bf16. DeepSpeed has the precision of its config file.
        report_to: a tracker, for the stages that train.
        out: folder for the tracker's files.

    Raises:
        UserError: the tracker is unknown, or the launcher started fewer processes than it was asked for.
    """
    if report_to and report_to not in [str(tracker.value) for tracker in get_available_trackers()]:
        raise UserError(f"--report-to {report_to}: accelerate knows no such tracker, or its package is not installed")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else each process would run by itself
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    precision = None if deepspeed else mixed_precision
    accelerator = Accelerator(mixed_precision=precision, log_with=report_to, project_dir=out)
    if deepspeed:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # weights are loaded whole and checked, then sharded
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # any number will do
    requested = requested_processes()
    if requested > accelerator.num_processes:
        raise UserError(
            f"the launcher was asked for {requested} processes but started {accelerator.num_processes}; several CPU "
            f"processes are accelerate launch --multi_gpu --num_processes {requested} ..."
        )
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and not user_sets_threads():
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the launcher sets 1 by itself
    return accelerator


def launcher_command() -> list[str]:
    """The command line of the `accelerate launch` that started this process; empty without one."""
    try:
        arguments = Path(f"/proc/{os.getppid()}/cmdline").read_text().rstrip("\0").split("\0")
    except OSError:
        return []
    return arguments if "launch" in arguments else []


def launcher_option(name: str) -> str | None:
    """The value of an option of that `accelerate launch`, `--num_processes` or `--num-processes` alike."""
    arguments = launcher_command()
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, _, value = argument.replace("-", "_").partition("=")
        if flag == name.replace("-", "_"):
            return value or following
    return None


def requested_processes() -> int:
    """The launcher's --num_processes, 1 without a launcher."""
    return int(launcher_option("--num_processes") or 1)


def user_sets_threads() -> bool:
    """Whether the user gave a number of threads: OMP_NUM_THREADS, or the launcher's option for it.

    `accelerate launch` sets OMP_NUM_THREADS for the script if the user did not. So the launcher's own environment is
    what counts.
    """
    if not launcher_command():
        return "OMP_NUM_THREADS" in os.environ
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_text(errors="replace").split("\0")
    except OSError:  # the launcher is of another user
        environment = []
    given = any(variable.startswith("OMP_NUM_THREADS=") for variable in environment)
    return given or launcher_option("--num_cpu_threads_per_process") is not None


def shared_out(chunks: list, accelerator) -> list:
    """This process's share of the chunks.

    Every process gets the same number of them, since sharded weights need it. So some chunks come twice.
    """
    world = accelerator.num_processes
    rounds = -(-len(chunks) // world)
    return [chunks[(i * world + accelerator.process_index) % len(chunks)] for i in range(rounds)]
