"""Qwen2.5-VL-3B at full size on one GPU, against TRL on the same card: python bench/gpu.py [--json FILE]

Random weights from the config, bf16, histories of 5 posters of 262,144 pixels, ten candidates, LoRA, no gradient
checkpointing. Prints one table: pairs or rows a second, percentage of the card's own matrix rate, peak memory. TRL's
loader gets worker processes, and TRL the better of two settings, autocast (its default) or none, as its DPO step shows.
Nothing is downloaded; without TRL its columns stay empty. Each part is a process of its own, so that one that fails
leaves the others.
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

SIDE = 512  # x 512 = 262,144 pixels, which Qwen rounds to 504 x 504: 324 tokens
BATCHES, ROWS = (4, 2, 1), 24  # pairs in a DPO step, as many as both systems can hold; rows they are made of
SECONDS = 120  # for one process
PARTS = {
    "dpo all kinds of pairs": 4,
    "dpo ranking pairs": 4,
    "sft ranking": 4,
    "sft ranking and Yes/No": 4,
    "evaluation": None,
}  # goals against TRL
HEAD = ("", "per s", "TRL's", "ratio", "goal", "% of matrix rate (goal 45)", "TRL's %")
HEAD += ("peak GiB", "TRL's GiB", "ratio (goal 2)", "loss", "TRL's loss")


def part(name: str, shape: str, side: int, device: str, dtype, autocast: bool, batch: int = 4) -> dict:
    """The result row of one part."""
    trl = {"bf16": autocast, "dataloader_num_workers": min(8, (os.cpu_count() or 2) // 2)}
    shared, case = {"device": device, "dtype": dtype, "rows": ROWS}, name.partition(" ")[2]
    with tempfile.TemporaryDirectory() as folder:
        if name == "evaluation":
            return evaluation.compare(Path(folder), shape, side, **shared | {"rows": evaluation.ROWS})
        if name.startswith("dpo"):
            return dpo_step.compare(Path(folder), shape, side, case, **shared, batch=batch, **trl)
        return sft_step.compare(Path(folder), shape, side, case, **shared, **trl)


def attempt(name: str, *further: str) -> dict | str:
    """The result row of one part, computed in a process of its own on the first GPU, or the last line of its error."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--part", name, "--json", str(path), *further]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
        except subprocess.TimeoutExpired:
            return f"not done after {SECONDS} s"
        if done.returncode:
            sys.stderr.write(done.stderr[-4000:])
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
        return json.loads(path.read_text())["rows"][0]


def run_part(name: str, autocast: bool) -> dict | str:
    """The result row of one part, of fewer pairs where one system runs out of memory, and without TRL where that fails
    otherwise; or the last line of its error."""
    for batch in BATCHES if name.startswith("dpo") else BATCHES[:1]:
        found = attempt(name, "--batch", str(batch), *["--autocast"] * autocast)
        if not isinstance(found, str) or "OutOfMemoryError" not in found:
            break
    if isinstance(found, str) and trl_side.installed():
        alone = attempt(name, "--no-trl")
        return alone if isinstance(alone, str) else alone | {"trl_failed": found}
    return found


def better_autocast(found: dict[bool, dict | str]) -> bool:
    """With which setting TRL took less time for a sample, of those with which it ran at all."""
    ran = {k: row for k, row in found.items() if not isinstance(row, str) and "TRL" in row["others"]}
    return min(ran, key=lambda k: ran[k]["others"]["TRL"]["median"] / ran[k]["per_step"], default=False)


def table_rows(name: str, row: dict | str) -> list[list[str]]:
    """A line for each system that a part was compared with, at least one."""
    if isinstance(row, str):
        return [[name, f"failed: {row}", *[""] * (len(HEAD) - 2)]]
    lines, memory, losses = [], row.get("memory") or {}, row.get("losses") or {}
    peak = {system: f"{memory['weights'] + memory[system]['median']:.1f}" for system in memory if system != "weights"}
    for other in row["others"] or {"": None}:
        cells = dict.fromkeys(HEAD, "")
        cells[""] = f"{name}, {row['case']}" + f", against {other}" * (other not in ("TRL", ""))
        cells |= {"per s": f"{row['per_step'] / row['ours']['median']:.2f}", "goal": str(PARTS[name] or "")}
        cells |= {"% of matrix rate (goal 45)": f"{row['floor']['ours']:.1f}", "peak GiB": peak.get("ours", "")}
        if other:
            cells |= {"TRL's": f"{row['per_step'] / row['others'][other]['median']:.2f}"}
            cells |= {"ratio": f"{row['ratios'][other]:.2f}"}
        if other in row["floor"]:
            cells["TRL's %"] = f"{row['floor'][other]:.1f}"
        if other in peak:
            cells |= {"TRL's GiB": peak[other], "ratio (goal 2)": f"{float(peak[other]) / float(peak['ours']):.2f}"}
        if losses:
            cells |= {"loss": f"{losses['ours']:.4f}", "TRL's loss": f"{losses['TRL']:.4f}"}
        if "trl_failed" in row:
            cells["TRL's"] = f"failed: {row['trl_failed']}"
        lines.append(list(cells.values()))
    return lines


def table(rows: dict[str, dict | str]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(line for name, row in rows.items() for line in table_rows(name, row))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help="one process's part")
    parser.add_argument("--autocast", action="store_true", help="TRL's bf16=True in that part")
    parser.add_argument("--batch", type=int, default=4, help="pairs in its DPO step")
    parser.add_argument("--no-trl", action="store_true", help="that part without TRL")
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
    first = next(iter(PARTS))
    found = {autocast: run_part(first, autocast) for autocast in ([True, False] if trl_side.installed() else [False])}
    autocast = better_autocast(found)
    rows = {first: found[autocast]} | {name: run_part(name, autocast) for name in PARTS if name != first}
    facts = measure.machine("cuda")
    attention = trl_side.attention("cuda")
    print(f"{facts['machine']['gpu']}, {facts['versions']}, TRL with{'out' * (not autocast)} autocast, {attention}")
    if attention == "sdpa":
        print("Without the package flash_attn, TRL's vision tower attends window by window: many small calls.")
    print(f"\n{table(rows)}")
    if options.json:
        measure.save(options.json, {**facts, "autocast": autocast, "attention": attention, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
