"""All measurements, one after the other: python bench/run.py

Each is a script of its own, run in a process of its own. Writes results.json and RESULTS.md beside this file.
"""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import measure
import torch
import workload

from hanorec.run.files import replacing, write_json

HERE = Path(__file__).resolve().parent
SCRIPTS = ("dpo_step", "sft_step", "evaluation", "memory", "scaling", "summaries")
ABOUT = """# Against TRL

`make bench` wrote this file and `results.json`. Medians of the runs (min to max); a ratio is the other system's median
over ours, both taken in turns in one process, so that the machine's drift hits both (memory: in turns, each in a
process of its own). {facts}

**The backbone.** `scaled` is Qwen2.5-VL-3B an eighth as wide and a sixth as deep, so that language model, head and
vision tower keep about their proportions: {weights}. It was chosen for that, before the first comparison. `demo` is
the demo's own tiny backbone ({demo_weights}). Weights are random: they cost as much as trained ones. 28 x 28 pixels
are one token.

**The work.** Rows have 5 history items with JPEG posters and ten candidate titles; LoRA of rank 8 on every linear
layer of the language model, dropout 0, batch 4, float32, AdamW, clipping at 1, no gradient checkpointing on either
side. Both systems read the same tokens (asserted, token by token) and image files, and give the same loss, LoRA drawn
alike ({losses}). TRL runs its own `train()`; a step is timed from the end of the one before, so its loader is in it.
Ours are `PackedMLLM.collate` and `take_step` of `dpo_hano.py` (with noise, hardness and responsiveness, which TRL has
not) and `sft.py`. TRL's settings: no logging, evaluation, saving, checkpointing or progress bar; standard format, so
that it applies no chat template; batches of one kind of samples each, so that it pads next to nothing; its loader in
the main process, where it takes {loader} of its step. On a CPU it computes its head for every position of a sequence
(on a GPU for the answers' alone), which takes {head} of its DPO steps here: no setting of its own avoids that. Its
reference is the policy with LoRA off, in every step: asked to compute it once, it answers "{refusal}" (`{place}`).
Ours is computed once, {reference}.

**The floor.** What a step cannot do without: 4 N operations a token with frozen weights (2 N forward, 2 N backward; N:
the linear layers of the language model), the head where an answer is predicted, attention over the pairs of tokens
that see each other; each prompt once, no vision tower, no reference, nothing recomputed; in the last layer, of tokens
that predict nothing, only keys and values. Its percentage is this over the time, of the rate of a square float32
product of 2,048 (`torch.mm`), measured in the same turns: {rate}.
"""


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def spread(found: dict) -> str:
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def table(rows: list[dict]) -> str:
    """Markdown of the rows of one table; a line for each system that a row is compared with."""
    head = ["", f"ours [{rows[0]['unit']}]"]
    compared, floored = any(row["others"] for row in rows), any("floor" in row for row in rows)
    extra = [name for name in ("pairs_per_second", "more_mib") if any(name in row for row in rows)]
    head += ["against", "its", "ratio", "goal"] * compared
    head += ["ours, % of floor rate", *["its"] * compared] * floored + extra
    lines = [head, ["---"] * len(head)]
    for row in rows:
        for name, other in (row["others"] or {"": None}).items():
            cells = [row["case"], spread(row["ours"])]
            if compared:
                first = name == next(iter(row["others"]))
                cells += [name, spread(other), f"**{row['ratios'][name]:.2f}**", str(row["goal"]) if first else ""]
            if floored:
                systems = ["ours", *[name] * compared]
                cells += [f"{row['floor'][system]:.0f}" if system in row["floor"] else "" for system in systems]
            cells += [number(row[key]) for key in extra]
            lines.append(cells)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return text.replace("pairs_per_second", "pairs per second").replace("more_mib", "MiB more at the peak")


NOTES = {
    "DPO step": "All kinds of pairs are what `dpo_hano.py` trains on, in its order: a ranking pair and two Yes/No "
    "pairs a row, of which the latter share their history. Ranking pairs alone share nothing between pairs.",
    "Scaling: live images": "`--images live`: the vision tower runs in the step, once for each distinct image.",
    "SFT step": "With both tasks TRL is given a row's three answers as three samples with a prompt each; here two of "
    "them share theirs. With ranking alone no prompt is shared, and what is saved is the vision tower.",
    "Evaluation": "Ours and the plain forwards are `score_examples`, packed and with `--no-pack`, both on stored "
    "image tokens. `generate` decodes greedily from the image files up to the longest title, in batches of 4 rows: it "
    "gives one answer a row and no ranks.",
    "Memory": "Peak of a process over two steps, less what it held before them. The whole processes, Python and its "
    "libraries included: {}.",
    "Summaries": "The texts of `mllm_srec.summarize` for the demo's films and users, by its own writer, after 400 "
    "steps of `mllm_srec.teach`; one by one, an eighth of them.",
    "Scaling: neighbours": "`neighbor_profiles`, at MicroLens's size; the vectors themselves are not counted.",
}


def worst_difference(found: dict) -> float:
    """The largest difference between the two systems' losses, over all steps that were compared."""
    rows = found["dpo_step"]["rows"] + found["sft_step"]["rows"]
    return max(abs(row["losses"]["ours"] - row["losses"]["TRL"]) for row in rows)


def facts_of(found: dict, facts: dict) -> dict[str, str]:
    """The values for the placeholders in ABOUT."""
    dpo, demo = found["dpo_step"]["rows"][0], found["dpo_step"]["rows"][-1]
    place, _, refusal = found["dpo_step"]["precomputed_reference"].partition(": ")
    counts = [", ".join(f"{n} {value:,}" for n, value in row["weights"].items()) for row in (dpo, demo)]
    heads = [row["head"] for row in found["dpo_step"]["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    spread_out = dpo["others"]["TRL"]["median"] / dpo["with_reference"]
    origin = f"Commit {facts['commit']}; {facts['seconds']:,.0f} s in all."
    return {
        "facts": f"Machine: {machine}. Versions: {versions}. {origin}",
        "weights": counts[0],
        "demo_weights": counts[1],
        "losses": f"the largest difference over all cases is {worst_difference(found):.1e}",
        "loader": f"{dpo['loader']['TRL'] / dpo['others']['TRL']['median']:.0%}",
        "head": " to ".join(f"{share:.0%}" for share in (min(heads), max(heads))),
        "refusal": refusal,
        "place": place,
        "reference": f"before the first step: spread over the paper's 5 epochs, it makes the first ratio below "
        f"{spread_out:.2f} instead of {dpo['ratios']['TRL']:.2f}. Image tokens are also computed once, in "
        f"{dpo['encode'] * 1000:.0f} ms a poster, and are not in the step",
        "rate": f"{dpo['rate']['median'] / 1e9:.0f} GFLOP/s",
    }


def report(found: dict, facts: dict) -> str:
    """RESULTS.md."""
    text = wrapped(ABOUT.format(**facts_of(found, facts)))
    for script, part in found.items():
        for name in dict.fromkeys(row["table"] for row in part["rows"]):
            chosen = [row for row in part["rows"] if row["table"] == name]
            alone = f", measured alone at commit {part['commit']}" if "commit" in part else ""
            text += f"\n## {name}\n\n`python bench/{script}.py`{alone}\n\n{table(chosen)}\n"
            if name in NOTES:
                note = NOTES[name].format("; ".join(whole(row) for row in chosen if "whole_process" in row))
                text += f"\n{wrapped(note)}"
    return f"{text}\n## GPU\n\n{facts['gpu']}\n"


def wrapped(text: str) -> str:
    paragraphs = (textwrap.fill(part, 120, break_on_hyphens=False) for part in text.strip().split("\n\n"))
    return "\n\n".join(paragraphs) + "\n"


def whole(row: dict) -> str:
    process = row["whole_process"]
    return f"{row['case']}: {spread(process['ours'])} MiB against {spread(process['TRL'])}"


def gpu() -> str:
    """The table of gpu.py, or why there is none."""
    if not torch.cuda.is_available():
        return "Unmeasured: this machine has no CUDA device. `python bench/gpu.py` measures by itself on one that has."
    command = [sys.executable, str(HERE / "gpu.py"), "--json", str(HERE / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else f"`python bench/gpu.py` failed: {done.stderr.splitlines()[-1]}"


def main() -> None:
    began, found = time.perf_counter(), {}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # these are a CPU's figures
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            print(f"bench/{name}.py", flush=True)
            path = Path(folder) / f"{name}.json"
            command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            found[name] = json.loads(path.read_text())
    if worst_difference(found) > 1e-4:
        sys.exit("the two systems do not compute the same loss; nothing is written")
    facts = measure.machine() | {"gpu": gpu(), "seconds": time.perf_counter() - began}
    write_json(HERE / "results.json", {**facts, **found})
    with replacing(HERE / "RESULTS.md") as beside:
        beside.write_text(report(found, facts), encoding="utf-8")
    print(f"{HERE.relative_to(workload.ROOT)}/RESULTS.md, {facts['seconds']:.0f} s")


if __name__ == "__main__":
    main()
