"""Checkpoints of a training run: <out>/checkpoints/step-<n>/, from which it continues as if it had never stopped.

state.safetensors holds the trained weights, AdamW's state by the names of the weights, and every process's random
state. state.json holds what is small: the schedule, the log's place in metrics.jsonl, moving averages. Nothing is
pickled. The options, versions and the machine stand in the run's config.json. Only whole optimizer steps are saved; a
step that was cut off is done again, with the same samples and the same draws.
"""

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hanorec.run.files import UserError, delete, locked, read_json, replacing, write_json
from hanorec.run.runs import json_options, versions

# Options that do not change the result, and those that name a folder, which is compared by its hash
FREE = {"out", "data", "sft", "export", "resume", "save_every", "keep", "report_to", "gradient_checkpointing"}
FACTS = {  # what config.json has beside the options, and where it comes from
    "data": "--data",
    "sft_weights": "--sft",
    "processes": "the launcher's --num_processes",
    "lessons": "--descriptions or --prompts",
}


def folders(out: Path) -> list[Path]:
    """The checkpoints in a run folder, the oldest first."""
    return sorted(out.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def newest(out: Path) -> Path | None:
    """The checkpoint that an unfinished run in `out` continues from, None if there is none."""
    if (out / "result.json").exists():
        return None
    return next(reversed(folders(out)), None)


def facts(accelerator, **hashes) -> dict:
    """What config.json keeps of a run beside its options."""
    return hashes | {"processes": accelerator.num_processes, "machine": machine(accelerator.device)}


def machine(device) -> dict[str, str]:
    """What the last digits of a result depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"CPU": model, "threads": str(torch.get_num_threads())} | gpu | versions()


def check(options: argparse.Namespace, accelerator, **hashes) -> None:
    """UserError if the run in --out is in use, or is unfinished and cannot continue with these options.

    A finished run is trained anew. So is an unfinished one without a checkpoint: nothing of it would be lost.
    """
    out, config = options.out, options.out / "config.json"
    if accelerator.is_main_process and out.exists():
        with locked(out):  # held again, until the end, once everything is loaded
            pass
    if (out / "result.json").exists() or not config.exists():
        return
    remedy = f"choose another --out, or delete {out}"
    if options.resume == "never":
        raise UserError(f"{out} holds an unfinished run: leave --resume never away to continue it, {remedy}")
    if not folders(out):
        return
    config = read_json(config, {"options": dict}, remedy)
    before, changed = config["options"], []
    for name, value in json_options(options).items():
        if name not in FREE and before.get(name) != value:
            changed.append(f"--{name.replace('_', '-')} (was {before.get(name)}, now {value})")
    now = facts(accelerator, **hashes)
    for name in FACTS.keys() & now:
        if config.get(name) != now[name]:
            changed.append(f"{FACTS[name]} (another than before)")
    if changed:
        raise UserError(
            f"{out} holds an unfinished run of other options: {', '.join(changed)}; "
            f"continue it as it began, or {remedy}"
        )


def possible(accelerator) -> bool:
    """Whether a run can have checkpoints: DeepSpeed and FSDP's first version keep AdamW's state in their own layout."""
    kind = accelerator.distributed_type.value
    return kind != "DEEPSPEED" and (kind != "FSDP" or accelerator.is_fsdp2)


def trained_weights(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def named_tensors(model, optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained weights and AdamW's state of each, whole even if sharded. All processes must iterate together."""
    for name, parameter in trained_weights(model):
        for key, value in ({"weight": parameter} | optimizer.state[parameter]).items():
            yield f"{key}/{name}", (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()


def sharded_like(value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`value`, a whole tensor, on the device of `tensor` and sharded as that is (a scalar never is)."""
    if not hasattr(tensor, "device_mesh") or not value.dim():
        return value.to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def save(out: Path, step: int, model, optimizer, parts: dict, keep: int, accelerator) -> None:
    """Write a checkpoint, and delete all but the last `keep`. All processes must call this; they return together.

    Args:
        model: the module with the trained weights.
        parts: whatever else has a state, by name; each has state_dict(), in JSON values.
    """
    tensors = {}
    for name, value in named_tensors(model, optimizer):
        if accelerator.is_main_process:
            tensors[name] = value.cpu().contiguous()
    random = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    for rank, states in enumerate(gather_object([random])):
        tensors |= {f"random/{kind}/{rank}": state for kind, state in states.items()}
    small = {name: part.state_dict() for name, part in parts.items()}
    if accelerator.is_main_process:
        with replacing(out / "checkpoints" / f"step-{step}") as new:
            new.mkdir()
            save_file(tensors, new / "state.safetensors")
            write_json(new / "state.json", {"step": step, **small})
        for old in folders(out)[:-keep]:
            delete(old)
    accelerator.wait_for_everyone()


def load(folder: Path, model, optimizer, parts: dict, accelerator) -> int:
    """Set everything to the state that a checkpoint holds. Return its step."""
    remedy = f"delete {folder}: then the checkpoint before it is taken"
    small = read_json(folder / "state.json", {"step": int, **dict.fromkeys(parts, dict)}, remedy)
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({error}); {remedy}") from error
    for name, parameter in trained_weights(model):
        parameter.data.copy_(sharded_like(tensors[f"weight/{name}"], parameter))
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
        optimizer.state[parameter] = {key: sharded_like(tensors[f"{key}/{name}"], parameter) for key in keys}
    for name, part in parts.items():
        part.load_state_dict(small[name])
    for group, rate in zip(optimizer.param_groups, parts["schedule"].get_last_lr(), strict=True):
        group["lr"] = rate
    rank = accelerator.process_index
    torch.set_rng_state(tensors[f"random/cpu/{rank}"].clone())
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random/cuda/{rank}"].clone(), accelerator.device)
    return small["step"]
