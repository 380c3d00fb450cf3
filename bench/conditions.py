"""Show on what the ratio of a DPO step to TRL's depends: python bench/conditions.py [--json FILE]

Measures two cases of dpo_step.py under several conditions, each condition in a process of its own.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dpo_step
import measure

NARROW = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_TOP_PAD_": str(2**28)}
FRESH = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # glibc's default, which no longer grows once it is set
STREAM = (
    "import numpy as n\na = n.ones(2**25)\nb = a.copy()\nwhile True:\n    n.copyto(b, a)"  # 2 x 256 MiB, without end
)


@dataclass
class Condition:
    """How the process is run.

    Args:
        cores: the number of cores that it may use; None: all.
        environment: further variables of its environment.
        disturbed: another program copies memory on the next core meanwhile.
    """

    cores: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    disturbed: bool = False


CONDITIONS = {
    "all cores": Condition(),
    "one core": Condition(1),
    "one core, another program copies memory": Condition(1, disturbed=True),
    "all cores, vectors of 256 bits": Condition(environment=NARROW),
    "all cores, glibc keeps freed memory": Condition(environment=KEPT),
    "all cores, each large tensor in fresh memory": Condition(environment=FRESH),
}


@contextlib.contextmanager
def disturbance(core: int | None) -> Iterator[None]:
    """Copy memory on this core, in a process of its own, inside the `with` block. None: do nothing."""
    if core is None:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", STREAM])
    os.sched_setaffinity(process.pid, {core})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def child(name: str) -> list[dict]:
    """Measure the cases in this process. Returns their result rows."""
    condition, cores, rows = CONDITIONS[name], sorted(os.sched_getaffinity(0)), []
    with tempfile.TemporaryDirectory() as folder, disturbance(cores[1] if condition.disturbed else None):
        if condition.cores:
            os.sched_setaffinity(0, cores[: condition.cores])
        measure.cpu_only()
        for order in ("", ", --history-first"):
            row = dpo_step.compare(Path(folder), "scaled", 112, "all kinds of pairs" + order)
            rows.append(row | {"table": "Conditions", "case": name + order, "matrix_rate": row["rate"]["median"] / 1e9})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--condition", choices=CONDITIONS, help="measure under this one alone, in this process")
    options = parser.parse_args(argv)
    if options.condition:
        print(json.dumps(child(options.condition)))
        return
    rows = []
    for name, condition in CONDITIONS.items():
        if condition.disturbed and measure.threads() == 1:
            print(f"not measured, because this machine has one core: {name}")
            continue
        command, environment = [sys.executable, __file__, "--condition", name], os.environ | condition.environment
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        rows += json.loads(output.splitlines()[-1])
    measure.save(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
