"""Measure the peak memory of a DPO step, each system in a process of its own: python bench/memory.py [--json FILE]

The result is the peak of a process over two steps, less the memory that it held before the steps, when model, data and
trainer were ready.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import dpo_step
import measure
import ours
import trl_side
import workload

STEPS = 2


def child(system: str, side: int, shape: str) -> dict:
    """Take the steps of one system in this process. Returns the bytes held before the steps, and at the peak."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work, core = workload.make(folder, shape, side, examples=16)
        if system == "ours":
            steps = ours.Dpo(work, ours.trainable(core), dpo_step.BATCH)
            before = measure.reset_peak()
            for _ in range(STEPS):
                steps.step()
        else:
            trainer = trl_side.dpo_trainer(work, core, dpo_step.BATCH, STEPS)
            before = measure.reset_peak()
            trainer.train()
    return {"before": before, "peak": measure.peak()}


def compare(side: int, shape: str = "scaled") -> dict:
    """Measure both systems at one image size, in turns. Returns the result row."""
    memory = {"ours": [], "TRL": []}
    for _ in range(measure.BLOCKS):
        for system, values in memory.items():
            command = [sys.executable, __file__, "--system", system, "--side", str(side), "--shape", shape]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            values.append(json.loads(output.splitlines()[-1]))
    growth = {
        name: measure.summary((v["peak"] - v["before"]) / 2**20 for v in values) for name, values in memory.items()
    }
    whole = {name: measure.summary(v["peak"] / 2**20 for v in values) for name, values in memory.items()}
    return measure.result(
        "Memory",
        f"{shape}, {side} px, batch {dpo_step.BATCH}",
        "MiB more than before the steps",
        growth["ours"],
        {"TRL": growth["TRL"]},
        goal=2,
        whole_process=whole,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--system", choices=["ours", "TRL"], help="measure this system alone, in this process")
    parser.add_argument("--side", type=int, help="with --system: width and height of the images in pixels")
    parser.add_argument("--shape", default="scaled", choices=workload.SHAPES)
    options = parser.parse_args(argv)
    measure.cpu_only()
    if options.system:
        print(json.dumps(child(options.system, options.side, options.shape)))
    else:
        measure.save(options.json, {"rows": [compare(side) for side in (112, 224)]})


if __name__ == "__main__":
    main()
