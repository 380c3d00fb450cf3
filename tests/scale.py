"""Measure the time and the memory of prepare_data.py: python tests/scale.py 1000000 10000000

The arguments are numbers of interactions. For each number, writes a table in MicroLens's layout, with 1 user for 50
interactions and 1 item for 100. Prepares it without encoding. Then opens the training examples, as each process of a
training stage does. Prints seconds, seconds of the processor and peak memory. Each measurement runs in a process of its
own.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def write_table(folder: Path, count: int) -> None:
    """Write `count` random interactions and the items' titles."""
    rng = np.random.default_rng(0)
    with open(folder / "Made_pairs.csv", "w") as file:
        file.write("user,item,timestamp\n")
        for start in range(0, count, 500_000):
            size = min(500_000, count - start)
            items = (rng.random(size) ** 2 * (count // 100)).astype(int)
            columns = rng.integers(count // 50, size=size), items, rng.integers(10**9, size=size)
            file.writelines(f"{u},{i},{t}\n" for u, i, t in zip(*map(np.ndarray.tolist, columns), strict=True))
    titles = (f"{item},Title of item {item}\n" for item in range(count // 100))
    (folder / "Made_titles.csv").write_text("item,title\n" + "".join(titles))


def clocks() -> np.ndarray:
    """The time now, and this process's time of the processor, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def report(subject: str, began: np.ndarray) -> None:
    """Print the seconds since `began`, and the peak memory of this process."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = "{:.0f} s ({:.0f} s of the processor)".format(*(clocks() - began))
    print(f"{subject}: {seconds}, {memory:.2f} GiB at the peak", flush=True)


def open_examples(folder: Path) -> None:
    """Open the training examples in this process."""
    from hanorec.data.folder import DataFolder

    began = clocks()
    examples = DataFolder(folder).examples("train")
    report(f"{len(examples):,} training examples", began)


def measure(count: int) -> None:
    """Prepare `count` interactions in this process, and open their training examples in another."""
    import prepare_data

    prepare_data.encode = lambda options: None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder, count)
        began = clocks()
        prepare_data.main(["--dataset", "microlens", "--source", str(folder), "--out", str(folder / "data")])
        report(f"{count:,} interactions", began)
        subprocess.run([sys.executable, __file__, str(folder / "data")], check=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        measure(int(sys.argv[1]))
    elif len(sys.argv) == 2:
        open_examples(Path(sys.argv[1]))
    else:
        for size in sys.argv[1:]:
            subprocess.run([sys.executable, __file__, size], check=True)
