"""The run folder that a training stage writes: config.json, metrics.jsonl, weights, checkpoints, result.json.

result.json is written last. A folder without it holds an unfinished run.
"""

import argparse
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from hanorec.run.files import UserError, delete, file_hash, read_json, require, value_hash, write_json

# The fields of config.json that other stages read, and their types
RUN = {"stage": str, "options": dict, "data": str}
RUN_OPTIONS = {
    "data": str,
    "model": str,
    "tasks": list,
    "max_length": int,
    "candidate_images": bool,
    "blank_images": bool,
    "lora_rank": int,
    "lora_alpha": int,
    "lora_dropout": (int, float),
}
STAGES = {
    "sft": RUN_OPTIONS | {"tune": str},
    "dpo_hano": RUN_OPTIONS | {"sft": str},
    "teach": {"data": str, "model": str, "tune": str, "share": (int, float), "seed": int},
}
# The command that writes the runs of a stage
COMMANDS = {"sft": "sft.py", "dpo_hano": "dpo_hano.py", "teach": "mllm_srec.teach"}


def weights_hash(run: Path) -> str:
    """SHA-256 over the weight files that a run ended with."""
    files = sorted([*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")])
    return value_hash([file_hash(path) for path in files])


def json_options(options: argparse.Namespace) -> dict:
    """The options as JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def check_out(out: Path, stage: str) -> None:
    """UserError if `out` holds something else than an earlier run of this stage."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another --out")
    if any(not path.name.startswith(".") for path in out.glob("*")):
        config = out / "config.json"
        before = read_json(config, {}, "choose another --out") if config.exists() else {}
        if before.get("stage") != stage:
            raise UserError(f"{out} holds files but is no run folder of {COMMANDS[stage]}; choose another --out")


def versions() -> dict[str, str]:
    """The versions of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def begin_run(out: Path, stage: str, options: dict, **facts) -> None:
    """Start a run in `out`: write config.json and delete what an earlier run left there.

    Raises:
        UserError: `out` holds something else.
    """
    check_out(out, stage)
    (out / "result.json").unlink(missing_ok=True)  # first: from here on the run is unfinished
    delete(out / "checkpoints")  # before the options are those of the new run
    write_json(out / "config.json", {"stage": stage, "options": options, **facts, "versions": versions()})
    for pattern in ("metrics.jsonl", "*metrics.json", "*predictions.jsonl"):
        for old in out.glob(pattern):
            old.unlink()
    for old in ("adapter", "model", "reference"):
        delete(out / old)


def read_run(run: Path, stages: Iterable[str] = ("sft", "dpo_hano")) -> dict:
    """Read the config.json of a finished run of one of these stages. UserError if it is not one."""
    run, stages = Path(run), tuple(stages)
    writers = " or ".join(COMMANDS[stage] for stage in stages)
    remedy = f"give a run folder, as {writers} writes it"
    inside = sorted(str(path.parent) for path in run.glob("*/config.json"))
    if inside:
        remedy += f" (there are {', '.join(inside)})"
    config = read_json(run / "config.json", {}, remedy)
    if config.get("stage") not in stages:
        raise UserError(f"{run} is no run of {writers}; give a run folder that it wrote")
    if not (run / "result.json").exists():
        raise UserError(f"{run} is not finished (no result.json); give its own command again, which continues it")
    require(config, RUN, f"{run}/config.json", remedy)
    require(config["options"], STAGES[config["stage"]], f"{run}/config.json", remedy)
    if config["options"].get("tasks", ["rank"]) not in (["rank"], ["yesno"], ["rank", "yesno"]):
        raise UserError(f"{run}/config.json: unknown tasks; {remedy}")
    return config
