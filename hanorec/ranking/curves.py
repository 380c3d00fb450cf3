"""The report's training curves, from a run's metrics.jsonl."""

import math
from pathlib import Path

from hanorec.ranking.charts import Series, curves, grid
from hanorec.ranking.markdown import short
from hanorec.ranking.markup import Html, element
from hanorec.ranking.report_recipes import off_parts
from hanorec.run.files import read_jsonl

# Title, note, and the series: (legend, field of the curve, fields of the band). Fields that a run lacks are left out
CURVES = (
    ("loss", "", (("loss", "loss"),)),
    ("validation", "", (("NDCG@3", "val_NDCG@3"), ("AUC", "val_AUC"))),
    ("accuracy", "share of pairs whose reward gap is positive", (("accuracy", "accuracy"),)),
    ("margin", "mean reward gap, equation (7)", (("margin", "margin"),)),
    ("rewards", "the two parts of the gap", (("chosen", "reward_chosen"), ("rejected", "reward_rejected"))),
    ("eta", "responsiveness, equation (8)", (("eta", "eta"),)),
    (
        "lambda",
        "hardness, equation (6): mean, and 1% to 99% of the pairs",
        (("lambda", "lambda_mean", "lambda_p01", "lambda_p99"),),
    ),
    (
        "beta",
        "dynamic beta, equation (11): mean, and 1% to 99% of the pairs",
        (("beta", "beta_mean", "beta_p01", "beta_p99"),),
    ),
    ("noise", "NoDO: size of the noise over the size of the weights", (("noise", "noise"),)),
    ("effect of the noise", "KL divergence of the next token from the clean policy, in nats", (("KL", "noise_kl"),)),
)
PAPER = "Equations (6) to (12) of HaNoRec, arXiv 2511.18740."
OFF = {"lambda": ["lambda"], "eta": ["eta"], "noise": ["noise", "effect of the noise"]}  # their charts, by part
# The options that tell runs apart at first sight
DESCRIBED = ("sft", "tune", "prompt", "objective", "rejected", "beta", "hardness", "responsiveness", "noise", "sigma")
DESCRIBED += ("lr", "seed")


def numbers(lines: list[dict], field: str) -> list[float | None]:
    """Return a field of each line; None where it is absent or no number."""
    values = [line.get(field) for line in lines]
    return [value if isinstance(value, (int, float)) else None for value in values]


def loss_note(config: dict) -> str:
    """Say what the loss is, and of DPO its value while the policy is the reference."""
    options = config["options"]
    if config["stage"] != "dpo_hano":
        return "nats per answer token" if config["stage"] == "sft" else ""
    if options.get("objective", "dpo") != "dpo":
        return {"softmax": "softmax over the answers", "sft": "of the chosen answers"}.get(options["objective"], "")
    if options.get("sft_weight"):
        return "equation (12), plus the weighted loss of the chosen answers"
    rejected = options.get("rejected", 1)
    formula, several = "log 2", ""
    if rejected > 1:
        formula, several = f"log(1 + {rejected})", f" for {rejected} rejected"
    return f"equation (12){several}; before learning {formula} = {short(math.log(1 + rejected))}"


def training_charts(run: Path, config: dict, is_open: bool) -> Html:
    """Return the curves of a run, below its name and its main options.

    Args:
        is_open: whether the reader sees them without a click.
    """
    path = run / "metrics.jsonl"
    lines = read_jsonl(path, {"step": int}, "train the run again") if path.exists() else []
    warm_up = max((line["step"] for line in lines if line.get("warmup")), default=None)
    shown, steps = [], [line["step"] for line in lines]
    off = off_parts(config) if config["stage"] == "dpo_hano" else []
    hidden = [title for part in off for title in OFF[part]] + ["beta"] * ({"lambda", "eta"} <= {*off})
    for title, note, fields in CURVES:
        series = [Series(name, steps, *(numbers(lines, column) for column in columns)) for name, *columns in fields]
        if title not in hidden or any(len({*one.y} - {None}) > 1 for one in series):
            shown.append(curves(title, loss_note(config) if title == "loss" else note, series, warm_up))
    options = config["options"]
    words = [f"{name} {options[name]}" for name in DESCRIBED if options.get(name) not in (None, "")]
    missing = None if lines else element("p", f"{path} is missing, so there are no curves.", class_="note")
    description = element("p", f"{config['stage']}: {', '.join(words)}", class_="note")
    without = element("p", f"off in this run: {', '.join(off)}", class_="note") if off else None
    state = {"open": ""} if is_open else {}
    return element("details", element("summary", run), description, without, missing, grid(shown), **state)
