"""How it is measured: clock, medians, the machine and its matrix rate, peak memory, and the floor of operations."""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import workload

from hanorec.run import checkpoints
from hanorec.run.files import write_json

BLOCKS = 5  # runs of each system; their median counts


def cpu_only() -> None:
    """Hide GPUs from this process, and use all its cores."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used
    threads()


def threads() -> int:
    """As many as start_accelerator sets: the cores that this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return torch.get_num_threads()


def now(device="cpu") -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable, device="cpu") -> float:
    began = now(device)
    work()
    return now(device) - began


def summary(values: Iterable[float]) -> dict:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def scaled(found: dict, factor: float) -> dict:
    """A summary of values `factor` times as large."""
    return {name: value if name == "runs" else value * factor for name, value in found.items()}


def alternating(*works: Callable, device="cpu", dtype=None) -> tuple[list[dict], dict]:
    """A B A B ...: the summary of each one's seconds over BLOCKS turns, after one turn that does not count; and the
    matrix rate, measured once a turn."""
    product, rates, found = Product(device, dtype), [], []
    for _ in range(BLOCKS + 1):
        found.append([timed(work, device) for work in works])
        rates.append(product.rate())
    return [summary(values) for values in zip(*found[1:], strict=True)], summary(rates[1:])


class Turns:
    """A trainer's own loop, our steps and a matrix product in turns: `size` of its steps, `size` of ours, and so on.
    Its steps are timed from the end of the one before, so that its loader is included. `on_begin` and `on_step_end` are
    for a callback. The first turn does not count."""

    def __init__(self, step: Callable, size: int, device="cpu", dtype=None):
        self.step, self.size, self.device = step, size, device
        self.count, self.steps = 0, size * (BLOCKS + 1)
        self.theirs, self.ours, self.rates, self.product = [], [], [], Product(device, dtype)
        self.cuda = torch.device(device).type == "cuda"
        self.grown: dict[str, list[float]] = {"ours": [], "TRL": []}

    def on_begin(self) -> None:
        self.restart()

    def restart(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        self.mark = now(self.device)

    def grow(self, name: str) -> None:
        if self.cuda:
            self.grown[name].append((torch.cuda.max_memory_allocated() - self.held) / 2**30)

    def on_step_end(self) -> None:
        self.count += 1
        if self.count % self.size:
            return
        self.theirs.append((now(self.device) - self.mark) / self.size)
        self.grow("TRL")
        self.restart()
        for _ in range(self.size):
            self.step()
        self.ours.append((now(self.device) - self.mark) / self.size)
        self.grow("ours")
        self.rates.append(self.product.rate())
        self.restart()

    def run(self, trainer=None) -> None:
        """Turns with this trainer of TRL, which has `trl_side.between(self)` among its callbacks, or without one."""
        if trainer:
            trainer.train()
            return
        self.on_begin()
        for _ in range(self.steps):
            self.on_step_end()

    def summaries(self) -> tuple[dict, dict, dict]:
        """(ours, theirs, the matrix rate)"""
        return summary(self.ours[1:]), summary(self.theirs[1:]), summary(self.rates[1:])

    def memory(self, core, systems: Iterable[str]) -> dict | None:
        """On a GPU: GiB of the frozen weights, and of what each system's steps took more at their peak."""
        return (
            {"weights": held(core)} | {name: summary(self.grown[name][1:]) for name in systems} if self.cuda else None
        )


def held(core) -> float:
    """GiB of the frozen weights."""
    return sum(p.numel() * p.element_size() for p in core.parameters() if not p.requires_grad) / 2**30


def peaks(works: dict[str, Callable], core, device) -> dict | None:
    """On a GPU: GiB of the frozen weights, and of what each of these took more at its peak."""
    if torch.device(device).type != "cuda":
        return None
    found = {"weights": held(core)}
    for name, work in works.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        found[name] = summary([(torch.cuda.max_memory_allocated() - before) / 2**30])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The floor


class Product:
    """A large square matrix product by torch.mm, whose rate is called the machine's. It is measured beside what it is
    compared with, since the machine's speed drifts."""

    def __init__(self, device="cpu", dtype=None):
        self.device, self.size = device, 8192 if torch.device(device).type == "cuda" else 2048
        self.a, self.b = torch.randn(2, self.size, self.size, device=device, dtype=dtype or torch.float32)
        self()

    def __call__(self) -> None:
        torch.mm(self.a, self.b)

    def rate(self) -> float:
        """Floating-point operations per second."""
        return 2 * self.size**3 / timed(self, self.device)


def linears(part) -> list[tuple[str, torch.nn.Linear]]:
    """The linear layers of a module by name, without LoRA."""
    found = ((name.removesuffix(".base_layer"), module) for name, module in part.named_modules())
    return [(name, m) for name, m in found if isinstance(m, torch.nn.Linear) and "lora" not in name]


def weights(core) -> dict[str, int]:
    """Numbers of weights: the language model's linear layers (N, without LoRA), the head, the vision tower."""
    linear = [module for _, module in linears(core.get_decoder())]
    tower = sum(p.numel() for p in core.model.visual.parameters())
    return {
        "language model": sum(m.weight.numel() for m in linear),
        "head": core.get_output_embeddings().weight.numel(),
        "vision tower": tower,
    }


def floor(core, trees: Iterable[list], training: bool) -> float:
    """Floating-point operations that scoring these trees must take, each prompt once, no vision tower, no reference.

    2 N forward for each token, 2 N more backward to the activations (the weights are frozen; LoRA's own are left out),
    nothing computed twice; attention over the pairs of tokens that may see each other: two products forward, four
    backward. Behind the keys and values of the last layer, and in the head, only what predicts a scored token.
    """
    text, count = core.config.get_text_config(), weights(core)
    width, layers = text.hidden_size, core.get_decoder().layers  # heads x width of a head
    last = sum(m.weight.numel() for name, m in linears(layers[-1]) if not name.endswith(("k_proj", "v_proj")))
    linear = attention = 0
    for tree in trees:
        before: list[int] = []  # tokens from the root to each node's end
        for node in tree:
            above, length = before[node.parent] if node.parent is not None else 0, len(node.ids)
            before.append(above + length)
            linear += 2 * (count["language model"] - last) * length + 2 * (last + count["head"]) * len(node.scored)
            pairs = (len(layers) - 1) * (above * length + length * (length + 1) / 2)
            attention += 4 * width * (pairs + sum(above + place for place in node.scored))
    return 2 * linear + 3 * attention if training else linear + attention


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def reset_peak() -> int:
    """Have the kernel count this process's peak memory anew; returns what it holds now [bytes]. Linux and glibc alone;
    what glibc keeps of freed memory is given back first, since it would hide as much of the growth."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Results


def result(table: str, case: str, unit: str, ours: dict, others: dict[str, dict], **further) -> dict:
    """A row of RESULTS.md. others: summaries by system; ratios: how many times ours goes into each. With the operations
    that must be done (flops) and the matrix rate, also each system's percentage of it (floor)."""
    ratios = {name: other["median"] / ours["median"] for name, other in others.items()}
    if "flops" in further:
        further["floor"] = percents(further["flops"], {"ours": ours, **others}, further["rate"])
    return {"table": table, "case": case, "unit": unit, "ours": ours, "others": others, "ratios": ratios, **further}


def script(argv: list[str] | None, doc: str, rows: Callable[[Path], list[dict]]) -> None:
    """Main function of one table's script: compute its rows in a temporary folder, write them to --json."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    cpu_only()
    with tempfile.TemporaryDirectory() as folder:
        save(options.json, {"rows": rows(Path(folder))})


def percents(flops: float, summaries: dict[str, dict], rate: dict) -> dict[str, float]:
    """Of each system: the floor's operations over its time, in percent of the matrix rate."""
    return {name: 100 * flops / found["median"] / rate["median"] for name, found in summaries.items()}


def machine(device="cpu") -> dict:
    names = ("torch", "transformers", "peft", "accelerate", "trl", "datasets", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cpu = checkpoints.machine(torch.device("cpu"))["CPU"]
    facts = {"cpu": cpu, "threads": threads(), "system": platform.platform()}
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=workload.ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {"machine": facts, "versions": versions, "commit": commit}


def save(path: Path | None, found: dict) -> None:
    """Write results as JSON, or print them."""
    if path:
        write_json(path, found)
    else:
        print(json.dumps(found, indent=2))
