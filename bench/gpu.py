"""Compare Qwen2.5-VL-3B at full size with TRL on one GPU: python bench/gpu.py [--json FILE]

The model has random weights from its config, in bf16, with LoRA and without gradient checkpointing. An example has 5
posters of 262,144 pixels and ten candidates. Nothing is downloaded.

Prints one table: pairs or examples per second, percentage of the GPU's matrix rate, peak memory. TRL's loader gets
worker processes. TRL runs with autocast (its default) or without, whichever is faster in the first part. Its columns
stay empty if TRL is not installed. Each part runs in a process of its own: if one part fails, the others still run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import dpo_step
import evaluation
import measure
import sft_step
import torch
import trl_side

SIDE = 512  # 512 x 512 = 262,144 pixels; Qwen rounds the sides to 504, which gives 324 tokens
BATCHES = (4, 2, 1)  # pairs in a DPO step: the first number that fits in the memory with both systems
EXAMPLES = 24
TIMEOUT = 120  # seconds for one process
PARTS = {  # goals against TRL
    "dpo all kinds of pairs": 4,
    "dpo ranking pairs": 4,
    "sft ranking": 4,
    "sft ranking and Yes/No": 4,
    "evaluation": None,
}
# "other" is TRL, and for the evaluation what the first column names
HEAD = ("", "per second", "other per second", "ratio", "goal", "% of matrix rate (goal 45)", "other %")
HEAD += ("peak GiB", "other GiB", "ratio (goal 2)", "loss", "other loss")


def part(name: str, shape: str, side: int, device: str, dtype, autocast: bool, batch: int = 4) -> dict:
    """Measure one part. Returns its result row."""
    trl = {"bf16": autocast, "dataloader_num_workers": min(8, (os.cpu_count() or 2) // 2)}
    case = name.partition(" ")[2]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder), shape, side
        if name == "evaluation":
            return evaluation.compare(*place, device=device, dtype=dtype)
        shared = {"device": device, "dtype": dtype, "examples": EXAMPLES, **trl}
        if name.startswith("dpo"):
            return dpo_step.compare(*place, case, batch=batch, **shared)
        return sft_step.compare(*place, case, **shared)


def attempt(name: str, *options: str) -> dict | str:
    """Measure one part in a process of its own, on the first GPU.

    Returns its result row, or the last line of its error.
    """
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": first_gpu}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--part", name, "--json", str(path), *options]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
        except subprocess.TimeoutExpired:
            return f"not done after {TIMEOUT} s"
        if done.returncode:
            sys.stderr.write(done.stderr[-4000:])
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
        return json.loads(path.read_text())["rows"][0]


def run_part(name: str, autocast: bool) -> dict | str:
    """Measure one part. Returns its result row, or the last line of its error.

    A DPO part that runs out of memory is tried again with fewer pairs. A part that fails is tried again without TRL.
    """
    flags = ["--autocast"] if autocast else []
    for batch in BATCHES if name.startswith("dpo") else BATCHES[:1]:
        row = attempt(name, "--batch", str(batch), *flags)
        if not isinstance(row, str) or "OutOfMemoryError" not in row:
            break
    if isinstance(row, str) and trl_side.installed():
        without_trl = attempt(name, "--no-trl")
        return without_trl if isinstance(without_trl, str) else without_trl | {"trl_failed": row}
    return row


def better_autocast(rows: dict[bool, dict | str]) -> bool:
    """The setting of autocast with which TRL took less time for a sample; False if TRL ran with neither.

    Args:
        rows: the result of the first part with autocast and without.
    """
    seconds = {}
    for autocast, row in rows.items():
        if not isinstance(row, str) and "TRL" in row["others"]:
            seconds[autocast] = row["others"]["TRL"]["median"] / row["per_step"]
    return min(seconds, key=seconds.get, default=False)


def table_rows(name: str, row: dict | str) -> list[list[str]]:
    """A line for each system that a part was compared with; one line for a part without another system."""
    if isinstance(row, str):
        return [[name, f"failed: {row}", *[""] * (len(HEAD) - 2)]]
    lines, memory, losses = [], row.get("memory") or {}, row.get("losses") or {}
    peak = {system: f"{memory['weights'] + memory[system]['median']:.1f}" for system in memory if system != "weights"}
    for other in row["others"] or [None]:
        cells = dict.fromkeys(HEAD, "")
        cells[""] = f"{name}, {row['case']}"
        if other not in ("TRL", None):
            cells[""] += f", against {other}"
        cells["per second"] = f"{row['per_step'] / row['ours']['median']:.2f}"
        cells["goal"] = str(PARTS[name] or "")
        cells["% of matrix rate (goal 45)"] = f"{row['floor']['ours']:.1f}"
        cells["peak GiB"] = peak.get("ours", "")
        if other:
            cells["other per second"] = f"{row['per_step'] / row['others'][other]['median']:.2f}"
            cells["ratio"] = f"{row['ratios'][other]:.2f}"
        if other in row["floor"]:
            cells["other %"] = f"{row['floor'][other]:.1f}"
        if other in peak:
            cells["other GiB"] = peak[other]
            cells["ratio (goal 2)"] = f"{float(peak[other]) / float(peak['ours']):.2f}"
        if losses:
            cells["loss"], cells["other loss"] = f"{losses['ours']:.4f}", f"{losses['TRL']:.4f}"
        if "trl_failed" in row:
            cells["other per second"] = f"failed: {row['trl_failed']}"
        lines.append(list(cells.values()))
    return lines


def table(rows: dict[str, dict | str]) -> str:
    """Markdown of the results of all parts, by name."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for name, row in rows.items():
        lines += table_rows(name, row)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help="measure this part alone, in this process")
    parser.add_argument("--autocast", action="store_true", help="with --part: give TRL bf16=True")
    parser.add_argument("--batch", type=int, default=4, help="with --part: pairs in a DPO step")
    parser.add_argument("--no-trl", action="store_true", help="with --part: leave out TRL")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench/gpu.py: this machine has no CUDA device, so nothing was measured", file=sys.stderr)
        return 2
    if options.part:
        if options.no_trl:
            trl_side.installed = lambda: False
        row = part(options.part, "full", SIDE, "cuda", torch.bfloat16, options.autocast, options.batch)
        measure.save(options.json, {"rows": [row]})
        return 0
    first, *rest = PARTS
    settings = [True, False] if trl_side.installed() else [False]
    first_rows = {autocast: run_part(first, autocast) for autocast in settings}
    autocast = better_autocast(first_rows)
    rows = {first: first_rows[autocast]}
    for name in rest:
        rows[name] = run_part(name, autocast)
    facts = measure.machine("cuda")
    attention = trl_side.attention("cuda")
    setting = "with" if autocast else "without"
    print(f"{facts['machine']['gpu']}, {facts['versions']}, TRL {setting} autocast, {attention}")
    if attention == "sdpa":
        print("Without the package flash_attn, TRL's vision tower attends window by window, in many small calls.")
    print(f"\n{table(rows)}")
    if options.json:
        measure.save(options.json, {**facts, "autocast": autocast, "attention": attention, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
