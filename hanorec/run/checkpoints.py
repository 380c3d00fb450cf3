"""Checkpoints of a training run: <out>/checkpoints/step-<n>/, from which it continues as if it had never stopped.

state.safetensors holds the trained weights, AdamW's state by the names of the weights, and every process's random
state; state.json what is small: the schedule, the log's place in metrics.jsonl, moving averages. Nothing is pickled.
The options, versions and the machine stand in the run's config.json. Only whole optimizer steps are saved: one that was
cut off is done again, with the same samples and the same draws.
"""

import argparse
import platform
from collections.abc import Iterator
from pathlib import Path

from hanorec.run import runs
from hanorec.run.runs import UserError

# Options that do not change what comes out; the data and the SFT run are compared by their hashes
FREE = {"out", "data", "sft", "export", "resume", "save_every", "keep", "report_to", "gradient_checkpointing"}
FACTS = {"data": "--data", "sft_weights": "--sft", "processes": "the launcher's --num_processes"}
FACTS |= {"lessons": "--descriptions or --prompts"}


def folders(out: Path) -> list[Path]:
    """The checkpoints in a run folder, the oldest first."""
    return sorted(out.glob("checkpoints/step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def newest(out: Path) -> Path | None:
    """The checkpoint that an unfinished run in `out` continues from; None for a run that starts."""
    found = folders(out)
    return found[-1] if found and not (out / "result.json").exists() else None


def facts(accelerator, **hashes) -> dict:
    """What config.json keeps of a run beside its options, and `check` compares."""
    return hashes | {"processes": accelerator.num_processes, "machine": machine(accelerator.device)}


def machine(device) -> dict[str, str]:
    """What a result's last bits depend on."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"CPU": model, "threads": str(torch.get_num_threads())} | gpu | runs.versions()


def check(options: argparse.Namespace, accelerator, **hashes) -> None:
    """UserError where the run that --out holds is in use, or is unfinished and not to be continued with these options.
    A finished one is trained anew."""
    out, config = options.out, options.out / "config.json"
    if accelerator.is_main_process and out.exists():
        with runs.locked(out):  # it is taken again, for good, when all is loaded
            pass
    if (out / "result.json").exists() or not config.exists():
        return
    anew = f"choose another --out, or delete {out}"
    if options.resume == "never":
        raise UserError(f"{out} holds an unfinished run: leave --resume never away to continue it, {anew}")
    if not folders(out):  # nothing was saved, so nothing is lost: it begins anew
        return
    config = runs.read_json(config, {"options": dict}, anew)
    before, now = config["options"], runs.plain(options)
    changed = [
        f"--{name.replace('_', '-')} (was {before.get(name)}, now {value})"
        for name, value in now.items()
        if name not in FREE and before.get(name) != value
    ]
    found = facts(accelerator, **hashes)
    changed += [
        f"{FACTS[name]} (another than before)" for name in FACTS.keys() & found if config.get(name) != found[name]
    ]
    if changed:
        raise UserError(
            f"{out} holds an unfinished run of other options: {', '.join(changed)}; continue it as it began, or {anew}"
        )


def possible(accelerator) -> bool:
    """Whether a run can have checkpoints: DeepSpeed and FSDP's first version keep AdamW's state in their own layout."""
    kind = accelerator.distributed_type.value
    return kind != "DEEPSPEED" and (kind != "FSDP" or accelerator.is_fsdp2)


def trained(model) -> Iterator[tuple]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def named_tensors(model, optimizer) -> Iterator[tuple]:
    """The trained weights and AdamW's state of each, put together where they are sharded: for all processes at once."""
    for name, parameter in trained(model):
        for key, value in ({"weight": parameter} | optimizer.state[parameter]).items():
            yield f"{key}/{name}", (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()


def like(value, tensor):
    """`value`, a whole tensor, on the device of `tensor` and, but for a scalar, sharded as that is."""
    if not hasattr(tensor, "device_mesh") or not value.dim():
        return value.to(tensor.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def random_states(device) -> dict:
    import torch

    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def save(out: Path, step: int, model, optimizer, parts: dict, keep: int, accelerator) -> None:
    """Write a checkpoint, and drop all but the last `keep`; a call for all processes, which return when it is written.

    model: whose trainable weights are saved. parts: what else has a state, each with state_dict() in JSON values.
    """
    from accelerate.utils import gather_object
    from safetensors.torch import save_file

    tensors = {}
    for name, value in named_tensors(model, optimizer):
        if accelerator.is_main_process:
            tensors[name] = value.cpu().contiguous()
    states = gather_object([random_states(accelerator.device)])
    tensors |= {f"random/{kind}/{rank}": value for rank, each in enumerate(states) for kind, value in each.items()}
    small = {name: part.state_dict() for name, part in parts.items()}
    if accelerator.is_main_process:
        with runs.replacing(out / "checkpoints" / f"step-{step}") as beside:
            beside.mkdir()
            save_file(tensors, beside / "state.safetensors")
            runs.write_json(beside / "state.json", {"step": step, **small})
        for old in folders(out)[:-keep]:
            runs.remove(old)
    accelerator.wait_for_everyone()


def load(folder: Path, model, optimizer, parts: dict, accelerator) -> int:
    """Set everything to what a checkpoint holds, and return its step."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = f"delete {folder}: then the checkpoint before it is taken"
    small = runs.read_json(folder / "state.json", {"step": int, **dict.fromkeys(parts, dict)}, remedy)
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({error}); {remedy}") from error
    for name, parameter in trained(model):
        parameter.data.copy_(like(tensors[f"weight/{name}"], parameter))
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors]
        values = {key: tensors[f"{key}/{name}"] for key in keys}
        optimizer.state[parameter] = {key: like(value, parameter) for key, value in values.items()}
    for name, part in parts.items():
        part.load_state_dict(small[name])
    for group, rate in zip(optimizer.param_groups, parts["schedule"].get_last_lr(), strict=True):
        group["lr"] = rate
    rank = accelerator.process_index
    torch.set_rng_state(tensors[f"random/cpu/{rank}"].clone())
    if accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"random/cuda/{rank}"].clone(), accelerator.device)
    return small["step"]
