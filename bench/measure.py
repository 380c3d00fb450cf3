"""Clock, medians, the machine and its matrix rate, the floor of operations, peak memory, and result rows."""

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

BLOCKS = 5  # turns of each system; results are medians over the turns


def cpu_only() -> None:
    """Hide GPUs from this process, and use all its cores."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used
    threads()


def threads() -> int:
    """Use all cores that this process may run on, as start_accelerator does. Returns their number."""
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return torch.get_num_threads()


def now(device="cpu") -> float:
    """The time in seconds, once a GPU has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable, device="cpu") -> float:
    """The seconds that work() takes."""
    began = now(device)
    work()
    return now(device) - began


def summary(values: Iterable[float]) -> dict:
    """Median, smallest, largest and number of the values."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def scaled(values: dict, factor: float) -> dict:
    """The summary of values that are `factor` times as large."""
    return {name: value if name == "runs" else value * factor for name, value in values.items()}


def alternating(*works: Callable, device="cpu", dtype=None) -> tuple[list[dict], dict]:
    """Time the works in BLOCKS turns: A B A B ... One turn before them does not count.

    Returns (the summary of each work's seconds, the summary of the matrix rate, which is measured once a turn).
    """
    product, rates, turns = Product(device, dtype), [], []
    for _ in range(BLOCKS + 1):
        turns.append([timed(work, device) for work in works])
        rates.append(product.rate())
    return [summary(seconds) for seconds in zip(*turns[1:], strict=True)], summary(rates[1:])


class Turns:
    """Time the steps of a TRL trainer and this project's steps in turns.

    A turn is `size` steps of TRL's own training loop, then `size` steps of this project, then a matrix product. TRL's
    steps are timed from the end of the step before, so that the time includes TRL's loader. The first turn does not
    count. TRL's loop calls `on_begin` and `on_step_end` (see trl_side.between).

    Args:
        step: a function that takes one step of this project.
    """

    def __init__(self, step: Callable, size: int, device="cpu", dtype=None):
        self.step, self.size, self.device = step, size, device
        self.count, self.steps = 0, size * (BLOCKS + 1)
        self.theirs, self.ours, self.rates, self.product = [], [], [], Product(device, dtype)
        self.cuda = torch.device(device).type == "cuda"
        self.growth: dict[str, list[float]] = {"ours": [], "TRL": []}

    def on_begin(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start the clock and the count of peak memory anew."""
        if self.cuda:
            gc.collect()  # what the last step of the other system left, if nobody holds it
            torch.cuda.reset_peak_memory_stats()
            self.memory_before = torch.cuda.memory_allocated()
        self.began = now(self.device)

    def record_growth(self, name: str) -> None:
        """Append the GiB by which memory has grown at its peak since `restart`."""
        if self.cuda:
            self.growth[name].append((torch.cuda.max_memory_allocated() - self.memory_before) / 2**30)

    def on_step_end(self) -> None:
        """Count a step of TRL. After `size` of them, end the turn with this project's steps and a matrix product."""
        self.count += 1
        if self.count % self.size:
            return
        self.theirs.append((now(self.device) - self.began) / self.size)
        self.record_growth("TRL")
        self.restart()
        for _ in range(self.size):
            self.step()
        self.ours.append((now(self.device) - self.began) / self.size)
        self.record_growth("ours")
        self.rates.append(self.product.rate())
        self.restart()

    def run(self, trainer=None) -> None:
        """Take all turns, with a TRL trainer or without.

        Args:
            trainer: a trainer that has trl_side.between(self) among its callbacks, or None.
        """
        if trainer:
            trainer.train()
            return
        self.on_begin()
        for _ in range(self.steps):
            self.on_step_end()

    def summaries(self) -> tuple[dict, dict, dict]:
        """Summaries of (seconds of this project's steps, seconds of TRL's steps, the matrix rate)."""
        return summary(self.ours[1:]), summary(self.theirs[1:]), summary(self.rates[1:])

    def memory(self, core, systems: Iterable[str]) -> dict | None:
        """On a GPU: GiB of the frozen weights, and the GiB that each system's steps took beyond them at the peak."""
        if not self.cuda:
            return None
        return {"weights": frozen_memory(core)} | {name: summary(self.growth[name][1:]) for name in systems}


def frozen_memory(core) -> float:
    """GiB of the frozen weights."""
    return sum(p.numel() * p.element_size() for p in core.parameters() if not p.requires_grad) / 2**30


def peaks(works: dict[str, Callable], core, device) -> dict | None:
    """On a GPU: GiB of the frozen weights, and the GiB that each work took beyond them at its peak."""
    if torch.device(device).type != "cuda":
        return None
    memory = {"weights": frozen_memory(core)}
    for name, work in works.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        memory[name] = summary([(torch.cuda.max_memory_allocated() - before) / 2**30])
    return memory


# ---------------------------------------------------------------------------------------------------------------------
# The floor


class Product:
    """A large square matrix product by torch.mm. Its rate is the machine's matrix rate.

    The rate is measured in the same turns as the systems, because the machine's speed drifts.
    """

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
    """(name, layer) of the linear layers of a module, without those of LoRA."""
    layers = []
    for name, module in part.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora" not in name:
            layers.append((name.removesuffix(".base_layer"), module))
    return layers


def weights(core) -> dict[str, int]:
    """Number of weights in the language model's linear layers (N, without LoRA), the head, and the vision tower."""
    return {
        "language model": sum(layer.weight.numel() for _, layer in linears(core.get_decoder())),
        "head": core.get_output_embeddings().weight.numel(),
        "vision tower": sum(p.numel() for p in core.model.visual.parameters()),
    }


def floor(core, trees: Iterable[list], training: bool) -> float:
    """The number of floating-point operations that scoring these trees cannot do without.

    - A token takes 2 N operations forward and, in training, 2 N backward to the activations. Frozen weights need no
      gradient.
    - Attention takes two products forward and four backward, over the pairs of tokens that may see each other.
    - In the last layer all but the keys and values, and in the head everything, counts only for the tokens that predict
      a scored token.
    - Each prompt counts once, and nothing is computed twice. The vision tower, the reference and LoRA do not count.
    """
    text, count = core.config.get_text_config(), weights(core)
    width, layers = text.hidden_size, core.get_decoder().layers  # width: heads x width of a head
    last = sum(m.weight.numel() for name, m in linears(layers[-1]) if not name.endswith(("k_proj", "v_proj")))
    linear = attention = 0
    for tree in trees:
        before: list[int] = []  # tokens from the root to each node's end
        for node in tree:
            above, length = before[node.parent] if node.parent is not None else 0, len(node.ids)
            before.append(above + length)
            linear += 2 * (count["language model"] - last) * length + 2 * (last + count["head"]) * len(node.scored)
            pairs = (len(layers) - 1) * (above * length + length * (length + 1) / 2)
            attention += 4 * width * (pairs + sum(above + offset for offset in node.scored))
    return 2 * linear + 3 * attention if training else linear + attention


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def reset_peak() -> int:
    """Let the kernel count this process's peak memory anew. Returns the memory that the process holds now, in bytes.

    Works on Linux with glibc. Memory that glibc keeps after it was freed is given back first, because it would hide
    growth of the same size.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The peak of this process's memory since `reset_peak`, in bytes."""
    return status("VmHWM")


def status(name: str) -> int:
    """A size that the kernel reports about this process, in bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Results


def result(table: str, case: str, unit: str, ours: dict, others: dict[str, dict], **further) -> dict:
    """A row of a table in RESULTS.md, as results.json holds it.

    Args:
        table: the table's title.
        ours: the summary of this project.
        others: the summaries of the systems that it is compared with, by name.
        further: more fields of the row. With `flops` (the floor's operations) and `rate` (a summary of the matrix
            rate), the row gets `floor`: each system's percentage of the matrix rate.
    """
    ratios = {name: other["median"] / ours["median"] for name, other in others.items()}
    if "flops" in further:
        further["floor"] = percents(further["flops"], {"ours": ours, **others}, further["rate"])
    return {"table": table, "case": case, "unit": unit, "ours": ours, "others": others, "ratios": ratios, **further}


def script(argv: list[str] | None, doc: str, rows: Callable[[Path], list[dict]]) -> None:
    """The main function of one table's script: compute the rows in a temporary folder and write them to --json."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    cpu_only()
    with tempfile.TemporaryDirectory() as folder:
        save(options.json, {"rows": rows(Path(folder))})


def percents(flops: float, summaries: dict[str, dict], rate: dict) -> dict[str, float]:
    """For each system, the floor's operations over its time, in percent of the matrix rate."""
    return {name: 100 * flops / seconds["median"] / rate["median"] for name, seconds in summaries.items()}


def machine(device="cpu") -> dict:
    """Facts about the machine, the versions of the libraries, and the commit."""
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


def save(path: Path | None, results: dict) -> None:
    """Write the results to a JSON file, or print them if `path` is None."""
    if path:
        write_json(path, results)
    else:
        print(json.dumps(results, indent=2))
