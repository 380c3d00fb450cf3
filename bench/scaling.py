"""Measure how a DPO step, the encoding and HaRS's neighbours grow: python bench/scaling.py [--part P] [--json FILE]"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import measure
import ours
import torch
import workload
from peft.tuners.lora import Linear

import hanorec_loss
from hanorec.model.images import encode_items
from hanorec.model.load import load_image_processor, load_tokenizer
from hanorec.model.lora import LeanLinear

SHAPE, SIDE, STEPS = "scaled", 112, 2
HISTORIES, BATCHES, SIDES = (5, 10, 20, 40), (1, 2, 4, 8, 16), (112, 224, 504)
# By row: processes of a run, OMP_NUM_THREADS (None: all cores), runs side by side
PROCESSES = {
    "1 process, all cores": (1, None, 1),
    "1 process, 1 thread": (1, 1, 1),
    "2 processes, 1 thread each": (2, 1, 1),
    "2 runs side by side, 1 process and 1 thread each": (1, 1, 2),
}
REJECTED = (1, 3, 9)
IMAGES = 16
LIVE_SIDES = (112, 224)
NEIGHBOURS = (41_081, 2_048)  # items of MicroLens, width of Qwen2.5-VL-3B


def row(table: str, case: str, unit: str, ours: dict, **further) -> dict:
    return measure.result(table, case, unit, ours, {}, **further)


def dpo_steps(folder: Path, batch: int, history: int = 5, rejected: int = 1) -> tuple[ours.Dpo, int, float]:
    """Prepare DPO steps on ranking pairs.

    Returns (the steps, tokens of a pair's packed prompt and answers, the floor of a step's operations).
    """
    work, core = workload.make(folder, SHAPE, SIDE, examples=32, history=history)
    steps = ours.Dpo(work, ours.trainable(core), batch, rejected=rejected)
    trees = [steps.pairs.tree(number) for number in range(len(steps.pairs))]
    flops = measure.floor(core, trees, training=True) * batch / len(trees)
    return steps, sum(len(node.ids) for node in trees[0]), flops


def dpo_seconds(folder: Path, history: int, batch: int) -> tuple[dict, int, dict]:
    """Measure a DPO step on ranking pairs.

    Returns (seconds of a step, tokens of a pair's packed prompt and answers, the fields `flops` and `rate` of a row).
    """
    steps, tokens, flops = dpo_steps(folder, batch, history)
    (seconds,), rate = measure.alternating(partial(several, steps.step))
    return each_step(seconds), tokens, {"flops": flops, "rate": rate}


def histories(folder: Path) -> list[dict]:
    rows = []
    for history in HISTORIES:
        seconds, tokens, floor = dpo_seconds(folder / f"history{history}", history, 4)
        rows.append(row("Scaling: history", f"{history} items, {tokens} tokens", "s per step of 4", seconds, **floor))
    return rows


def live(folder: Path) -> list[dict]:
    """Compare a step on stored image tokens with a step that runs the vision tower for its distinct images."""
    table, unit, rows = "Scaling: live images", "s per step of 4", []
    for side in LIVE_SIDES:
        work, core = workload.make(folder / f"live{side}", SHAPE, side, examples=32)
        stored = ours.Dpo(work, ours.trainable(core), 4)
        live_tokens = copy.copy(work.tokens)
        live_tokens.paths, processor = work.paths, load_image_processor(work.folder, work.max_pixels)
        live_tokens.live = Path("/"), processor
        live_work = replace(work, tokens=live_tokens)
        live = ours.Dpo(live_work, ours.trainable(workload.load(work.folder)), 4)
        (stored, live), _ = measure.alternating(partial(several, stored.step), partial(several, live.step))
        ratio = f"{live['median'] / stored['median']:.2f} times the stored"
        rows.append(row(table, f"{side} px, stored", unit, each_step(stored)))
        rows.append(row(table, f"{side} px, live: {ratio}", unit, each_step(live)))
    return rows


def several(step) -> None:
    """Take STEPS steps."""
    for _ in range(STEPS):
        step()


def each_step(seconds: dict) -> dict:
    """The summary for one step, from the summary for STEPS steps."""
    return measure.scaled(seconds, 1 / STEPS)


def batches(folder: Path) -> list[dict]:
    rows = []
    for batch in BATCHES:
        seconds, _, floor = dpo_seconds(folder / f"batch{batch}", 5, batch)
        pairs, case = batch / seconds["median"], "1 pair" if batch == 1 else f"{batch} pairs"
        rows.append(row("Scaling: batch", case, "s per step", seconds, pairs_per_second=pairs, **floor))
    return rows


def rejected(folder: Path) -> list[dict]:
    """Measure a step with several rejected answers behind each prompt, S-DPO, in turns."""
    prepared = [dpo_steps(folder / f"rejected{count}", 4, rejected=count) for count in REJECTED]
    seconds, rate = measure.alternating(*(partial(several, steps.step) for steps, _, _ in prepared))
    rows = []
    for count, (_, tokens, flops), values in zip(REJECTED, prepared, map(each_step, seconds), strict=True):
        more = {"pairs_per_second": 4 / values["median"], "flops": flops, "rate": rate}
        rows.append(row("Scaling: rejected", f"{count} rejected, {tokens} tokens", "s per step of 4", values, **more))
    return rows


def adapters(folder: Path) -> list[dict]:
    """Measure a step in bf16: DPO's adapter alone, SFT's frozen adapter below it, and both with PEFT's own layers."""
    steps = {}
    for case in ("DPO's adapter alone", "SFT's adapter below it", "SFT's adapter below it, PEFT's own layers"):
        work, core = workload.make(folder / f"adapters{len(steps)}", SHAPE, SIDE, examples=32, dtype=torch.bfloat16)
        if steps:
            core = ours.with_sft_adapter(core)
            ours.randomize(core)
        packed = ours.trainable(core)
        for layer in packed.modules():
            if type(layer) is LeanLinear and "PEFT" in case:
                layer.__class__ = Linear
        steps[case] = ours.Dpo(work, packed, 4)
    seconds, _ = measure.alternating(*(partial(several, step.step) for step in steps.values()))
    times = dict(zip(steps, map(each_step, seconds), strict=True))
    return [row("Scaling: adapters", case, "s per step of 4", values) for case, values in times.items()]


def processes(folder: Path) -> list[dict]:
    """Measure training on a CPU, launched by accelerate, with 4 pairs in each process."""
    rows = []
    for case, (count, threads, runs) in PROCESSES.items():
        folders = [folder / f"processes{len(rows)}-{number}" for number in range(runs)]
        started = [launch(shared, count, threads) for shared in folders]
        for process in started:
            process.wait()
        for process in started:
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args)
        seconds = [json.loads((shared / "seconds.json").read_text()) for shared in folders]
        pairs = sum(4 * count / values["median"] for values in seconds)
        case = f"{case}, {4 * count} pairs a step"
        slowest = max(seconds, key=lambda values: values["median"])
        rows.append(row("Scaling: processes", case, "s per step", slowest, pairs_per_second=pairs))
    return rows


def launch(shared: Path, count: int, threads: int | None) -> subprocess.Popen:
    """Start `worker` in `count` processes. threads: OMP_NUM_THREADS, or None for all cores."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu", "--main_process_port", "0"] if count > 1 else ["--cpu"]
    command += ["--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", __file__, "--worker", str(shared)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if count > 1 else {}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def worker(shared: Path) -> None:
    """Train in one of the launched processes. The first process writes the references; all processes read them."""
    folder = shared / os.environ.get("RANK", "0")
    work, core = workload.make(folder, SHAPE, SIDE, examples=32)
    work.folder = shared
    steps = ours.Dpo(work, ours.trainable(core), 4)
    (seconds,), _ = measure.alternating(partial(several, steps.step))
    if steps.accelerator.is_main_process:
        (shared / "seconds.json").write_text(json.dumps(each_step(seconds)))


def encoding(folder: Path) -> list[dict]:
    """Measure the seconds per image, from the file to the stored tokens."""
    rows = []
    for side in SIDES:
        work, core = workload.make(folder / f"encode{side}", SHAPE, side, examples=1)
        tools = core, load_tokenizer(work.folder), load_image_processor(work.folder, work.max_pixels)
        items = work.items.titles[:IMAGES], work.paths[:IMAGES]
        (seconds,), _ = measure.alternating(partial(encode_items, *tools, *items, work.folder))
        seconds, tokens = measure.scaled(seconds, 1 / IMAGES), work.tokens.lengths[0]
        rows.append(row("Scaling: encoding", f"{side} x {side} px, {tokens} tokens", "s per image", seconds))
    return rows


def neighbours(items: int, width: int) -> dict:
    """Measure seconds and peak memory of HaRS's neighbour profiles."""
    vectors = torch.randn(items, width, generator=torch.Generator().manual_seed(0))
    before = measure.reset_peak()
    seconds = measure.summary(
        measure.timed(lambda: hanorec_loss.neighbor_profiles(vectors)) for _ in range(measure.BLOCKS)
    )
    memory = (measure.peak() - before) / 2**20
    return row("Scaling: neighbours", f"{items:,} items of width {width:,}", "s", seconds, more_mib=memory)


PARTS = {part.__name__: part for part in (histories, batches, rejected, adapters, processes, encoding, live)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=[*PARTS], help="one table alone; default: all")
    parser.add_argument(
        "--worker", type=Path, metavar="DIR", help="train in this process, one of those that accelerate launched"
    )
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options.worker)
    measure.cpu_only()
    rows = [] if options.part else [neighbours(*NEIGHBOURS)]
    with tempfile.TemporaryDirectory() as name:
        for part in [PARTS[options.part]] if options.part else PARTS.values():
            rows += part(Path(name))
    return measure.save(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
