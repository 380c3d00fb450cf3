"""How a DPO step, encoding and HaRS's neighbours grow with their sizes: python bench/scaling.py [--json FILE]"""

import argparse
import copy
import json
import os
import socket
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

import hanorec_loss
from hanorec.model.images import encode_items
from hanorec.model.load import load_image_processor, load_tokenizer

SHAPE, SIDE, STEPS = "scaled", 112, 2
HISTORIES, BATCHES, PROCESSES, SIDES = (5, 10, 20, 40), (1, 2, 4, 8, 16), (1, 2), (112, 224, 504)
IMAGES = 16
LIVE_SIDES = (112, 224)
NEIGHBOURS = (41_081, 2_048)  # items of MicroLens, width of Qwen2.5-VL-3B


def row(table: str, case: str, unit: str, ours: dict, **further) -> dict:
    return measure.result(table, case, unit, ours, {}, **further)


def dpo_seconds(folder: Path, history: int, batch: int) -> tuple[dict, int, dict]:
    """(seconds of a step, tokens of a packed row, what the floor is made of)."""
    work, core = workload.make(folder, SHAPE, SIDE, rows=32, history=history)
    steps = ours.Dpo(work, ours.trainable(core), batch)
    (found,), rate = measure.alternating(partial(several, steps.step))
    trees = [steps.pairs.tree(number) for number in range(len(steps.pairs))]
    tokens = sum(len(node.ids) for node in trees[0])
    flops = measure.floor(core, trees, training=True) * batch / len(trees)
    return each_step(found), tokens, {"flops": flops, "rate": rate}


def histories(folder: Path) -> list[dict]:
    found = []
    for history in HISTORIES:
        seconds, tokens, floor = dpo_seconds(folder / f"history{history}", history, 4)
        found.append(row("Scaling: history", f"{history} items, {tokens} tokens", "s per step of 4", seconds, **floor))
    return found


def live(folder: Path) -> list[dict]:
    """A step that reads its image tokens, and one that runs the vision tower for its distinct images."""
    found = []
    for side in LIVE_SIDES:
        work, core = workload.make(folder / f"live{side}", SHAPE, side, rows=32)
        steps = {"ours": ours.Dpo(work, ours.trainable(core), 4)}
        live = copy.copy(work.tokens)
        live.paths, processor = work.paths, load_image_processor(work.folder, work.max_pixels)
        live.live = Path("/"), processor
        work = replace(work, tokens=live)
        steps["live"] = ours.Dpo(work, ours.trainable(workload.load(work.folder)), 4)
        (stored, run), _ = measure.alternating(*[partial(several, each.step) for each in steps.values()])
        ratio = f"{run['median'] / stored['median']:.2f} times the stored"
        found.append(row("Scaling: live images", f"{side} px, stored", "s per step of 4", each_step(stored)))
        found.append(row("Scaling: live images", f"{side} px, live: {ratio}", "s per step of 4", each_step(run)))
    return found


def several(step) -> None:
    for _ in range(STEPS):
        step()


def each_step(found: dict) -> dict:
    return measure.scaled(found, 1 / STEPS)


def batches(folder: Path) -> list[dict]:
    found = []
    for batch in BATCHES:
        seconds, _, floor = dpo_seconds(folder / f"batch{batch}", 5, batch)
        pairs, case = batch / seconds["median"], f"{batch} pair{'s' * (batch > 1)}"
        found.append(row("Scaling: batch", case, "s per step", seconds, pairs_per_second=pairs, **floor))
    return found


def processes(folder: Path) -> list[dict]:
    """Data-parallel training of 4 pairs a process, as accelerate launches it on a CPU."""
    found = []
    for count in PROCESSES:
        shared = folder / f"processes{count}"
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--multi_gpu", "--main_process_port", str(free_port())] if count > 1 else ["--cpu"]
        launch += ["--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", __file__, "--worker", str(shared)]
        environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if count > 1 else {})
        subprocess.run(launch, check=True, env=environment, capture_output=True)
        seconds = json.loads((shared / "seconds.json").read_text())
        pairs = 4 * count / seconds["median"]
        case = f"{count} process{'es' * (count > 1)}, {4 * count} pairs a step"
        found.append(row("Scaling: processes", case, "s per step", seconds, pairs_per_second=pairs))
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def worker(shared: Path) -> None:
    """One process's part; every process reads the references that the first one wrote."""
    folder = shared / os.environ.get("RANK", "0")
    work, core = workload.make(folder, SHAPE, SIDE, rows=32)
    work.folder = shared
    steps = ours.Dpo(work, ours.trainable(core), 4)
    (found,), _ = measure.alternating(partial(several, steps.step))
    if steps.accelerator.is_main_process:
        (shared / "seconds.json").write_text(json.dumps(each_step(found)))


def encoding(folder: Path) -> list[dict]:
    """Seconds per image, from the file to the stored tokens."""
    found = []
    for side in SIDES:
        work, core = workload.make(folder / f"encode{side}", SHAPE, side, rows=1)
        tools = core, load_tokenizer(work.folder), load_image_processor(work.folder, work.max_pixels)
        items = work.items.titles[:IMAGES], work.paths[:IMAGES]
        (seconds,), _ = measure.alternating(partial(encode_items, *tools, *items, work.folder))
        seconds, tokens = measure.scaled(seconds, 1 / IMAGES), work.tokens.lengths[0]
        found.append(row("Scaling: encoding", f"{side} x {side} px, {tokens} tokens", "s per image", seconds))
    return found


def neighbours(items: int, width: int) -> dict:
    """Seconds and peak memory of HaRS's neighbour profiles."""
    vectors = torch.randn(items, width, generator=torch.Generator().manual_seed(0))
    before = measure.reset_peak()
    seconds = measure.summary(
        measure.timed(lambda: hanorec_loss.neighbor_profiles(vectors)) for _ in range(measure.BLOCKS)
    )
    memory = (measure.peak() - before) / 2**20
    return row("Scaling: neighbours", f"{items:,} items of width {width:,}", "s", seconds, more_mib=memory)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, metavar="DIR", help="one process's part")
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options.worker)
    measure.cpu_only()
    rows = [neighbours(*NEIGHBOURS)]
    with tempfile.TemporaryDirectory() as name:
        for part in (histories, batches, processes, encoding, live):
            rows += part(Path(name))
    return measure.save(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
