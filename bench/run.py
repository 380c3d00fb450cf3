"""Run all measurements, one after the other: python bench/run.py

Each measurement is a script of its own and runs in a process of its own. Writes results.json and RESULTS.md beside this
file.
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
import operations
import torch
import workload

from hanorec.run.files import replacing, write_json

HERE = Path(__file__).resolve().parent
SCRIPTS = ("dpo_step", "conditions", "sft_step", "evaluation", "memory", "scaling", "summaries")
ABOUT = """# Against TRL

`make bench` writes this file and `results.json`. A measured value is the median over several turns (min to max). A
ratio is the other system's median over this project's. Both systems are measured in turns in one process, so that the
machine's drift hits both. Memory is measured in turns too, each time in a process of its own. {facts}

**The backbone.** `scaled` is Qwen2.5-VL-3B an eighth as wide and a sixth as deep. Language model, head and vision tower
keep about their proportions: {weights}. It was chosen for these proportions, before the first comparison. `demo` is the
demo's own tiny backbone ({demo_weights}). Weights are random; random weights cost as much time as trained ones. 28 x 28
pixels are one token.

**The work.** An example has 5 history items with JPEG posters and ten candidate titles. Both systems train LoRA of rank
8 on every linear layer of the language model, with dropout 0, batch 4, float32, AdamW, clipping at 1, and no gradient
checkpointing. Both read the same image files and the same tokens (asserted, token by token). With the same LoRA weights
both give the same loss: {losses}.

**The steps.** TRL runs its own `train()`. A step of TRL is timed from the end of the step before, so that the time
includes TRL's loader. A step of this project is `PackedMLLM.collate`, then `take_step` of `dpo_hano.py` (with noise,
hardness and responsiveness, which TRL does not have) or the step of `sft.py`.

**TRL's settings.** TRL does no logging, evaluation, saving or checkpointing and shows no progress bar. Its data has the
standard format, so that it applies no chat template. Each batch has samples of one kind, so that it pads next to
nothing. Its loader runs in the main process and takes {loader} of its step. On a CPU, TRL computes its head for every
position of a sequence (on a GPU for the answers alone). The head takes {head} of TRL's DPO steps here. No setting of
TRL avoids that.

**The reference.** TRL's reference is the policy with LoRA off, computed in every step. TRL refuses to compute it once:
"{refusal}" (`{place}`). This project computes the reference once, before the first step. With this time spread over
the paper's 5 epochs, the first ratio below is {with_reference}. Image tokens are also computed once, in {encode} ms a
poster, and are not in the step either.

**The floor.** The floor is the work that a step cannot do without. A token costs 4 N operations with frozen weights: 2
N forward and 2 N backward, where N is the number of weights in the linear layers of the language model. The head counts
where an answer is predicted. Attention counts over the pairs of tokens that see each other. Each prompt counts once. In
the last layer, tokens that predict nothing need only keys and values. The vision tower and the reference do not count,
and nothing counts twice. The tables give the floor's operations over the measured time, in percent of the machine's
matrix rate. This is the rate of a square float32 product of 2,048 (`torch.mm`), measured in the same turns: {rate}.
"""
EXTRA_COLUMNS = {
    "pairs_per_second": "pairs per second",
    "more_mib": "MiB more at the peak",
    "matrix_rate": "matrix rate [GFLOP/s]",
}


def number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def spread(summary: dict) -> str:
    return f"{number(summary['median'])} ({number(summary['min'])} to {number(summary['max'])})"


def floor_percent(row: dict, system: str) -> str:
    """A system's percentage of the matrix rate; "" for a system that does other work."""
    return f"{row['floor'][system]:.0f}" if system in row["floor"] else ""


def table(rows: list[dict]) -> str:
    """Markdown of one table. A result row takes one line for each system that it is compared with."""
    compared = any(row["others"] for row in rows)
    with_floor = any("floor" in row for row in rows)
    extra = [name for name in EXTRA_COLUMNS if any(name in row for row in rows)]
    unit = rows[0]["unit"]
    head = ["case", f"this project [{unit}]"]
    if compared:
        head += ["other system", f"other [{unit}]", "ratio", "goal"]
    if with_floor:
        head.append("this project, % of matrix rate")
    if with_floor and compared:
        head.append("other, % of matrix rate")
    head += [EXTRA_COLUMNS[name] for name in extra]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        for position, other in enumerate(row["others"] or [None]):
            cells = [row["case"], spread(row["ours"])]
            if compared:
                goal = str(row["goal"]) if position == 0 else ""
                cells += [other, spread(row["others"][other]), f"**{row['ratios'][other]:.2f}**", goal]
            if with_floor:
                cells.append(floor_percent(row, "ours"))
            if with_floor and compared:
                cells.append(floor_percent(row, other))
            cells += [number(row[name]) for name in extra]
            lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


NOTES = {
    "DPO step": "All kinds of pairs are the pairs that `dpo_hano.py` trains on, in its order: for each example one "
    "ranking pair and two Yes/No pairs. The two Yes/No pairs share their history; with `--history-first` the ranking "
    "pair shares it too. Ranking pairs alone share nothing. With nine rejected answers the other system takes nine "
    "pairs of the same prompt, one after the other: nine times the time of its step of 4 pairs.",
    "Conditions": "All kinds of pairs at 112 px, as in the table above. Each condition has a process of its own, with "
    "one thread for each core. The other program copies 256 MiB again and again on the other core. 256 bits: AVX2 "
    "instead of AVX-512 in PyTorch, oneDNN and MKL. glibc keeps freed memory, or asks the kernel for each tensor above "
    "128 KiB: its variables `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` and `MALLOC_TOP_PAD_`, as "
    "bench/conditions.py sets them. By default glibc begins with this limit, and raises it with each larger tensor "
    "that is freed, up to 32 MiB.",
    "Scaling: live images": "With `--images live` the vision tower runs in the step, once for each distinct image.",
    "SFT step": "With both tasks TRL gets an example's three answers as three samples, each with its own prompt. Here "
    "two of the three share a prompt, and all three the history with `--history-first`. With ranking alone no prompt "
    "is shared; only the vision tower is saved.",
    "Evaluation": "This project and the plain forwards both run `score_examples` on stored image tokens, packed and "
    "with `--no-pack`. `generate` decodes greedily from the image files, up to the longest title, in batches of 4 "
    "examples. It gives one answer for an example and no ranks.",
    "Memory": "The peak of a process over two steps, less what the process held before the steps. The memory of the "
    "whole processes, with Python and its libraries: {}.",
    "Summaries": "The texts of `mllm_srec.summarize` for the demo's films and users, written by its own writer after "
    "400 steps of `mllm_srec.teach`. One by one, only every eighth text is written.",
    "Scaling: rejected": "Ranking pairs, with several rejected answers behind one prompt (`--rejected`), measured in "
    "turns.",
    "Scaling: neighbours": "`neighbor_profiles` on as many items as MicroLens has. The memory of the item vectors is "
    "not counted.",
}


def worst_difference(results: dict) -> float:
    """The largest difference between the two systems' losses, over all steps that were compared; NaN if one is NaN."""
    losses = [row["losses"] for part in results.values() for row in part["rows"] if row.get("losses")]
    return float(torch.tensor([abs(pair["ours"] - pair["TRL"]) for pair in losses], dtype=torch.float64).max())


def about_values(results: dict, facts: dict) -> dict[str, str]:
    """The values for the placeholders in ABOUT."""
    dpo, demo = results["dpo_step"]["rows"][0], results["dpo_step"]["rows"][-1]
    place, _, refusal = results["dpo_step"]["precomputed_reference"].partition(": ")
    counts = [", ".join(f"{name} {count:,}" for name, count in row["weights"].items()) for row in (dpo, demo)]
    heads = [row["head"] for row in results["dpo_step"]["rows"]]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    ratio_with_reference = dpo["others"]["TRL"]["median"] / dpo["with_reference"]
    origin = f"Commit {facts['commit']}; {facts['seconds']:,.0f} s in all."
    return {
        "facts": f"Machine: {machine}. Versions: {versions}. {origin}",
        "weights": counts[0],
        "demo_weights": counts[1],
        "losses": f"the largest difference over all cases is {worst_difference(results):.1e}",
        "loader": f"{dpo['loader']['TRL'] / dpo['others']['TRL']['median']:.0%}",
        "head": " to ".join(f"{share:.0%}" for share in (min(heads), max(heads))),
        "refusal": refusal,
        "place": place,
        "with_reference": f"{ratio_with_reference:.2f} instead of {dpo['ratios']['TRL']:.2f}",
        "encode": f"{dpo['encode'] * 1000:.0f}",
        "rate": f"{dpo['rate']['median'] / 1e9:.0f} GFLOP/s",
    }


def report(results: dict, facts: dict) -> str:
    """The text of RESULTS.md.

    Args:
        results: what each script measured, by the script's name.
        facts: machine, versions, commit, seconds, the section about the GPU, and the counts of operations.py.
    """
    text = wrapped(ABOUT.format(**about_values(results, facts)))
    for script, part in results.items():
        for name in dict.fromkeys(row["table"] for row in part["rows"]):
            chosen = [row for row in part["rows"] if row["table"] == name]
            measured_at = part.get("commit") or chosen[0].get("commit")  # set by hand if it was measured again
            commit = f", measured by itself at commit {measured_at}" if measured_at else ""
            text += f"\n## {name}\n\n`python bench/{script}.py`{commit}\n\n{table(chosen)}\n"
            if name in NOTES:
                note = NOTES[name].format("; ".join(whole_process(row) for row in chosen if "whole_process" in row))
                text += f"\n{wrapped(note)}"
    if facts.get("operations", {}).get("counts"):
        counted = operations.report(facts["operations"])
        text += f"\n## Operations and memory at full size\n\n`python bench/operations.py`\n\n{counted}\n"
    return f"{text}\n## GPU\n\n{facts['gpu']}\n"


def wrapped(text: str) -> str:
    """The paragraphs of a text, with lines of at most 120 characters."""
    paragraphs = (textwrap.fill(part, 120, break_on_hyphens=False) for part in text.strip().split("\n\n"))
    return "\n\n".join(paragraphs) + "\n"


def whole_process(row: dict) -> str:
    """The memory of both systems' whole processes in one case."""
    process = row["whole_process"]
    return f"{row['case']}: {spread(process['ours'])} MiB against {spread(process['TRL'])}"


def gpu() -> str:
    """The table of gpu.py, or the reason why there is none."""
    if not torch.cuda.is_available():
        return "Not measured: this machine has no CUDA device. Run `python bench/gpu.py` on a machine that has one."
    command = [sys.executable, str(HERE / "gpu.py"), "--json", str(HERE / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else f"`python bench/gpu.py` failed: {done.stderr.splitlines()[-1]}"


def main() -> None:
    began, results = time.perf_counter(), {}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # the scripts measure on the CPU
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            print(f"bench/{name}.py", flush=True)
            path = Path(folder) / f"{name}.json"
            command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr[-4000:])
            results[name] = json.loads(path.read_text())
            if not worst_difference(results) <= 1e-4:  # also if it is NaN
                sys.exit("the two systems do not compute the same loss; nothing is written")
    facts = measure.machine() | {"gpu": gpu(), "seconds": time.perf_counter() - began}
    facts["operations"] = operations.counts(HERE / "results.json")  # of an earlier run: it takes an hour
    write_json(HERE / "results.json", {**facts, **results})
    with replacing(HERE / "RESULTS.md") as beside:
        beside.write_text(report(results, facts), encoding="utf-8")
    print(f"{HERE.relative_to(workload.ROOT)}/RESULTS.md, {facts['seconds']:.0f} s")


if __name__ == "__main__":
    main()
