"""The report's words for how a run was trained, from its config.json."""

from collections.abc import Sequence
from pathlib import Path

from hanorec.ranking.gallery import System
from hanorec.ranking.pooling import NOT_COMPARED, STARTS

ALWAYS = {"sft": ("tune", "lr", "epochs"), "dpo_hano": ("rejected", "beta", "lr")}  # options that are always named
PARTS = ("hardness", "responsiveness", "sigma", "noise")  # options that `parts_of` describes
# Options that are named only where they differ from these values
USUAL = {"objective": "dpo", "hardness_sign": 1, "rejected_from": "data", "sft_weight": 0.0, "prompt": "plain"}
USUAL |= {
    "summaries": None,
    "candidate_images": False,
    "history_first": False,
    "blank_images": False,
    "quantize": None,
    "max_steps": None,
}


def recipes(systems: Sequence[System], configs: dict[Path, dict], reference: str | None) -> list[str]:
    """Return the recipe of each system; empty for a system that is no run.

    Args:
        configs: config.json of the runs.
        reference: name of the system with which the others are compared, or None.
    """
    by_name = {str(run): config for run, config in configs.items()}
    own = {system.name: by_name.get(system.run or system.name) for system in systems}
    return [recipe(config, own.get(reference)) if config else "" for config in own.values()]


def recipe(config: dict, reference: dict | None = None) -> str:
    """Describe a run: its stage, its main options, and those that differ from their usual values or the reference run.

    >>> own = {"sft": "runs/sft-1", "rejected": 9, "beta": 1.0, "lr": 0.003, "hardness": "none", "sigma": 0.0}
    >>> recipe({"stage": "dpo_hano", "options": {**own, "responsiveness": "none"}})
    'DPO from sft-1: 9 rejected, beta 1, lr 0.003; no lambda, eta, noise'
    """
    stage, options = config["stage"], config["options"]
    names = [name for name in ALWAYS.get(stage, ()) if options.get(name) is not None]
    names += [name for name, value in USUAL.items() if options.get(name, value) != value]
    if reference and reference["stage"] == stage:
        other = reference["options"]
        silent = (*NOT_COMPARED, *STARTS, *PARTS, *names)
        names += [name for name in options if name in other and options[name] != other[name] and name not in silent]
    words = ", ".join(
        f"{shown(options[name])} rejected" if name == "rejected" else worded(name, options) for name in names
    )
    start = next((Path(options[name]).name for name in STARTS if options.get(name)), options.get("model"))
    whole = options.get("objective", "dpo") == "dpo" and not off_parts(config)
    method = stage.upper() if stage != "dpo_hano" else "HaNoRec" if whole else "DPO"
    title = f"{method} from {start}" if start else method
    return "; ".join([f"{title}: {words}" if words else title, *parts_of(config)])


def worded(name: str, options: dict) -> str:
    return f"{name.replace('_', ' ')} {shown(options[name])}"


def shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def off_parts(config: dict) -> list[str]:
    """Return which of lambda, eta and noise a DPO run does without."""
    options = config["options"]
    off = {"lambda": options.get("hardness") == "none", "eta": options.get("responsiveness") == "none"}
    off["noise"] = options.get("sigma") == 0
    return [name for name, is_off in off.items() if is_off]


def parts_of(config: dict) -> list[str]:
    """Return the parts of the method that a DPO run has, and those that are off, in words."""
    options, off = config["options"], off_parts(config)
    if config["stage"] != "dpo_hano" or options.get("objective", "dpo") != "dpo":
        return []
    on = {"lambda": options.get("hardness"), "eta": options.get("responsiveness")}
    texts = [f"{name} by {value}" for name, value in on.items() if value and name not in off]
    if options.get("sigma"):
        texts.append(f"noise {shown(options['sigma'])} ({options.get('noise')})")
    return [text for text in (", ".join(texts), f"no {', '.join(off)}" if off else "") if text]
