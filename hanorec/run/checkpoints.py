"""Save and load checkpoints of a training run, <out>/checkpoints/step-<n>/.

state.safetensors holds the trained weights, AdamW's state by the names of the weights, and the random state of every
process. state.json holds the small values: the schedule, the size of metrics.jsonl, moving averages. Nothing is
pickled. The run's config.json holds the options, versions and machine. A checkpoint is saved after a complete optimizer
step. A run that continues repeats the steps after its last checkpoint, with the same samples and the same random
numbers.
"""

import argparse
import platform
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hanorec.run.files import UserError, delete, locked, read_json, replacing, write_json
from hanorec.run.runs import json_options, versions
from hanorec.run.training import reshard, trained_weights

# A run may continue with other values of these options. They do not change the result, or they name a folder, and
# `check` compares the hash of the folder.
MAY_CHANGE = {"out", "data", "sft", "resume", "overwrite", "save_every", "keep", "report_to", "gradient_checkpointing"}
MAY_CHANGE |= {"prompts", "descriptions"}  # of mllm_srec.teach: COMPARED has the hash of their content, "lessons"
COMPARED = {  # fields of config.json that must not change, and the option that each comes from
    "data": "the data folder",
    "sft_weights": "--sft",
    "processes": "the launcher's --num_processes",
    "lessons": "--descriptions or --prompts",
    "prompts": "the texts of the prompts",
}


def folders(out: Path) -> list[Path]:
    """Return the checkpoints in a run folder, the oldest first."""
    return sorted(out.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def newest(out: Path) -> Path | None:
    """Return the last checkpoint of an unfinished run in `out`. None if the run is finished or has no checkpoint."""
    if (out / "result.json").exists():
        return None
    return next(reversed(folders(out)), None)


def machine(device) -> dict[str, str]:
    """Describe the hardware, threads and versions that the last digits of a result depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"CPU": model, "threads": str(torch.get_num_threads())} | gpu | versions()


def check(options: argparse.Namespace, accelerator, **hashes) -> None:
    """Check that a run with these options can continue or replace the run in --out.

    An unfinished run without a checkpoint is replaced. `check_out` has already checked a finished run.

    Raises:
        UserError: the run in --out is in use; or it is unfinished, and began with other options or --resume is never.
    """
    out, config = options.out, options.out / "config.json"
    if accelerator.is_main_process and out.exists():
        with locked(out):  # fail now if it is in use; `started` locks it again after everything is loaded
            pass
    if (out / "result.json").exists() or not config.exists():
        return
    remedy = f"choose another --out, or delete {out}"
    if options.resume == "never":
        raise UserError(f"{out} holds an unfinished run: continue it without --resume never, {remedy}")
    if not folders(out):
        return
    config = read_json(config, {"options": dict}, remedy)
    before, changed = config["options"], []
    for name, value in json_options(options).items():
        absent = name not in before and value is False  # a switch that an earlier version did not have
        if name not in MAY_CHANGE and not absent and before.get(name) != value:
            changed.append(f"--{name.replace('_', '-')} (was {before.get(name)}, now {value})")
    fields = hashes | {"processes": accelerator.num_processes}
    for name, origin in COMPARED.items():
        if name in fields and config.get(name, fields[name]) != fields[name]:  # an older run may lack a field
            changed.append(f"{origin} (not the same as before)")
    if changed:
        raise UserError(f"{out} began with other options: {', '.join(changed)}; continue it with the same, or {remedy}")


def sharded_like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Move `value`, a complete tensor, to the device of `tensor` and shard it like `tensor`. Scalars stay complete."""
    if not hasattr(tensor, "device_mesh") or not value.dim():
        return value.to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def save(out: Path, step: int, model, optimizer, parts: dict, keep: int, accelerator) -> bool:
    """Write a checkpoint, and delete the oldest so that `keep` remain. All processes must call this.

    Return False if it cannot be saved: DeepSpeed and FSDP 1 keep AdamW's state in a layout of their own.

    Args:
        model: the module with the trained weights.
        parts: other objects with a state, by name. state_dict() of each returns JSON values.
    """
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED" or (kind == "FSDP" and not accelerator.is_fsdp2):
        return False
    reshard(model)
    tensors = {}
    for name, parameter in trained_weights(model).items():
        for key, value in {"weight": parameter, **optimizer.state[parameter]}.items():
            complete = value.full_tensor() if hasattr(value, "full_tensor") else value  # gathers a sharded tensor
            if accelerator.is_main_process:
                tensors[f"{key}/{name}"] = complete.detach().cpu().contiguous()
    random = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    for rank, states in enumerate(gather_object([random])):
        tensors |= {f"random/{kind}/{rank}": state for kind, state in states.items()}
    states_of_parts = {name: part.state_dict() for name, part in parts.items()}
    if accelerator.is_main_process:
        with replacing(out / "checkpoints" / f"step-{step}") as new:
            new.mkdir()
            save_file(tensors, new / "state.safetensors")
            write_json(new / "state.json", {"step": step, **states_of_parts})
        for old in folders(out)[:-keep]:
            delete(old)
    accelerator.wait_for_everyone()
    return True


def load(folder: Path, model, optimizer, parts: dict, accelerator) -> int:
    """Restore the model, the optimizer, the parts and the random state from a checkpoint. Return its step."""
    remedy = f"delete {folder}: then the run continues from the checkpoint before it"
    state = read_json(folder / "state.json", {"step": int, **dict.fromkeys(parts, dict)}, remedy)
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({error}); {remedy}") from error
    for name, parameter in trained_weights(model).items():
        parameter.data.copy_(sharded_like(tensors[f"weight/{name}"], parameter))
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
        optimizer.state[parameter] = {key: sharded_like(tensors[f"{key}/{name}"], parameter) for key in keys}
    for name, part in parts.items():
        part.load_state_dict(state[name])
    for group, rate in zip(optimizer.param_groups, parts["schedule"].get_last_lr(), strict=True):
        group["lr"] = rate
    rank = accelerator.process_index
    torch.set_rng_state(tensors[f"random/cpu/{rank}"].clone())
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random/cuda/{rank}"].clone(), accelerator.device)
    return state["step"]
