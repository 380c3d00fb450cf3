"""The run folder that a training stage writes: config.json, metrics.jsonl, weights, checkpoints, result.json.

result.json is written last. A folder without it holds an unfinished run.
"""

import argparse
import importlib.metadata
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from hanorec.run.files import UserError, delete, file_hash, printable, read_json, require, value_hash, write_json

TINY = "tiny"  # the backbone that prepare_data.py builds in the data folder

# The fields of config.json that other stages read, and their types
RUN = {"stage": str, "options": dict, "data": str}
RUN_OPTIONS = {
    "data": str,
    "model": str,
    "tasks": list,
    "max_length": int,
    "candidate_images": bool,
    "history_first": bool,
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
# The command that writes the runs of each stage
COMMANDS = {"sft": "sft.py", "dpo_hano": "dpo_hano.py", "teach": "python -m mllm_srec.teach"}
COMMANDS |= {"sasrec": "python -m hanorec.ranking.sasrec"}
# The command to give after each stage; the words in braces are options of the stage
NEXT = {
    "sft": "python dpo_hano.py --sft {out}",
    "dpo_hano": "python evaluate.py --run {sft} {out}",
    "teach": "python -m mllm_srec.summarize --data {data} --run {out}",
    "summarize": "python sft.py --data {data} --prompt cot --summaries {name}",
    "prepare_data": "python sft.py --data {out}",
    "later_data": "python -m hanorec.recommend --run {run} --data {out} --users all --out recommendations.jsonl",
    "evaluate": "python -m hanorec.recommend --run {run} --user {user}",
}


def weights_hash(run: Path) -> str:
    """Return the SHA-256 of the weight files in a run folder."""
    files = sorted([*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")])
    return value_hash([file_hash(path) for path in files])


def json_options(options: argparse.Namespace) -> dict:
    """Return the options as a dict of JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def next_command(stage: str, options: argparse.Namespace) -> str:
    """Return the command to give after this stage."""
    return NEXT[stage].format(**{name: shlex.quote(str(value)) for name, value in vars(options).items()})


def check_out(out: Path, stage: str, overwrite: bool = False) -> None:
    """Check that a stage may write its run to `out`.

    Args:
        overwrite: `out` may hold a finished run.

    Raises:
        UserError: `out` holds a finished run of this stage, or anything other than a run of this stage.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another --out")
    if any(not path.name.startswith(".") for path in out.glob("*")):
        config = out / "config.json"
        before = read_json(config, {}, "choose another --out") if config.exists() else {}
        if before.get("stage") != stage:
            raise UserError(f"{out} holds files but is no run folder of {COMMANDS[stage]}; choose another --out")
    if (out / "result.json").exists() and not overwrite:
        raise UserError(f"{out} holds a finished run; choose another --out, or give --overwrite to replace that run")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that change the last digits of a result."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def begin_run(out: Path, stage: str, options: dict, **fields) -> None:
    """Begin a run in `out`: write config.json and delete the files of an earlier run.

    Args:
        fields: further fields of config.json.

    Raises:
        UserError: `out` holds anything other than an earlier run of this stage, or a finished one without --overwrite.
    """
    check_out(out, stage, options.get("overwrite", False))
    if (out / "result.json").exists():
        print(f"replaces the finished run in {printable(out)}", flush=True)
        (out / "result.json").unlink()  # before all other files: without result.json the run is unfinished
    delete(out / "checkpoints")  # before config.json changes: the checkpoints belong to the old options
    write_json(out / "config.json", {"stage": stage, "options": options, **fields, "versions": versions()})
    evaluation = ("*metrics.json", "*predictions.jsonl", "*results.md", "*results.csv", "*report.html")
    for pattern in ("metrics.jsonl", *evaluation, "adapter", "model", "reference", "tensorboard"):
        for path in out.glob(pattern):
            delete(path)


def runs_inside(folder: Path, stages: Iterable[str], data: Path | None = None) -> list[Path]:
    """Return the finished runs directly inside `folder`: by stage in the order of `stages`, then by name.

    Args:
        data: only runs that were trained on this data folder.
    """
    order, found = [*stages], []
    for path in folder.glob("*/config.json"):
        config = read_json(path, {"options": dict}, "delete that folder")
        if config.get("stage") not in order or not (path.parent / "result.json").exists():
            continue
        if data is None or Path(config["options"].get("data", "")).resolve() == data.resolve():
            numbers = [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", path.parent.name)]
            found.append((order.index(config["stage"]), numbers, path.parent))
    return [run for _, _, run in sorted(found)]


def expand_runs(folders: list[Path], data: Path | None, default: Iterable[Path]) -> list[Path]:
    """Return the runs to evaluate: `folders`, with the runs inside in place of a folder that holds runs.

    Args:
        data: without `folders`: the finished runs in runs/<name of data>/ that were trained on this data folder.
        default: the runs without `folders` and `data`, as far as they exist.

    Raises:
        UserError: there is no run.
    """
    stages = ("sft", "dpo_hano")
    if not folders and data:
        place = Path("runs") / data.resolve().name
        folders = runs_inside(place, stages, data)
        if not folders:
            raise UserError(f"{place} holds no finished run on {data}; run sft.py --data {data} first, or give --run")
    folders = folders or [run for run in default if run.exists()]
    if not folders:
        raise UserError("no --run given and no runs/demo here; run sft.py first")
    runs = []
    for folder in folders:
        inside = [] if (folder / "config.json").exists() else runs_inside(folder, stages)
        runs += inside or [folder]  # read_run refuses what is no run
    return [*dict.fromkeys(runs)]


def read_run(run: Path, stages: Iterable[str] = ("sft", "dpo_hano")) -> dict:
    """Read the config.json of a finished run of one of these stages.

    Raises:
        UserError: the folder is no such run, or the run is not finished.
    """
    writers = " or ".join(COMMANDS[stage] for stage in stages)
    remedy = f"give a run folder that {writers} wrote"
    inside = sorted(str(path.parent) for path in run.glob("*/config.json"))
    if inside:
        remedy += f" (it contains {', '.join(inside)})"
    config = read_json(run / "config.json", {}, remedy)
    if config.get("stage") not in stages:
        raise UserError(f"{run} is no run of {writers}; {remedy}")
    if not (run / "result.json").exists():
        raise UserError(f"{run} is not finished (no result.json); repeat the command that began it, to continue it")
    require(config, RUN, f"{run}/config.json", remedy)
    if config["stage"] in ("sft", "dpo_hano"):
        config["options"].setdefault("history_first", False)  # runs of earlier versions do not have it
    require(config["options"], STAGES[config["stage"]], f"{run}/config.json", remedy)
    if config["options"].get("tasks", ["rank"]) not in (["rank"], ["yesno"], ["rank", "yesno"]):
        raise UserError(f"{run}/config.json: unknown tasks; {remedy}")
    return config


def is_run(folder: Path) -> bool:
    """Return whether a training stage wrote the folder."""
    config = folder / "config.json"
    return config.is_file() and read_json(config, {}, "choose another folder").get("stage") in STAGES


def backbone_files(run: Path) -> str:
    """Return the hub name or folder that holds the tokenizer, image processor and vision tower of a run's model.

    They are in the run if it trained all weights, and in the SFT run for a DPO run. Otherwise they are the backbone's.
    """
    config = read_run(run, STAGES)
    options = config["options"]
    if config["stage"] == "dpo_hano":
        return backbone_files(Path(options["sft"]))
    return str(run / "model") if options["tune"] == "full" else options["model"]


def backbone_for_later_data(run: Path) -> str:
    """Return `backbone_files`. UserError for an adapter on a tiny backbone, which only its own data has."""
    name = backbone_files(run)
    if name == TINY:
        fault = f"{run} is an adapter on the tiny backbone of the data that it was trained on, and does not hold it"
        raise UserError(f"{fault}; train with --tune full to use a run with data that is prepared later")
    return name


def same_backbone(one: str, other: str) -> bool:
    """Return whether two backbones have the same name, or are the same folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())
