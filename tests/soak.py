"""Kill real runs at random moments and start them again until they end.

Their files must equal those of a run that was never stopped, byte by byte.

    python tests/soak.py 24        # 24 kills in all, about half a minute each; the cases share them
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from conftest import ROOT, draw_posters, movielens

SMALL = "--overwrite --eval-limit 20 --batch-size 4 --grad-accum 2 --save-every 7 --epochs 99 --lr 1e-3".split()
WARM = "--warmup-steps 30 --warmup-items 8 --dropout 0.1 --max-steps 90".split()
TWO = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --main_process_port 0".split()
ABSOLUTE = "--max-steps 60 --noise absolute".split()
CASES = {
    "prepare": "prepare_data.py --dataset movielens --source {raw} --out {out} --max-pixels 3136".split(),
    "full": ["sft.py", "--data", "{data}", "--out", "{out}", *SMALL, *WARM],
    "lora": ["sft.py", "--data", "{data}", "--out", "{out}", *SMALL, *"--tune lora --max-steps 90".split()],
    "dpo": ["dpo_hano.py", "--sft", "{sft}", "--out", "{out}", *SMALL, *"--max-steps 60 --responsiveness ema".split()],
    "two": [*TWO, "dpo_hano.py", "--sft", "{sft}", "--out", "{out}", *SMALL, *ABSOLUTE],
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def start(words: list[str], log) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


def kill(process: subprocess.Popen) -> None:
    """Send SIGKILL to a process and to its children."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


def left(folder: Path) -> dict[str, bytes]:
    """The bytes of every file that a script wrote to its folder, without times, speeds and the folder's name."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in (".lock", "config.json"):
            contents[name] = path.read_bytes()
    if "metrics.jsonl" in contents:
        lines = [json.loads(line) for line in contents["metrics.jsonl"].splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == sorted(set(steps)), f"repeated or disordered steps: {steps}"
        lines = [{n: v for n, v in line.items() if not n.endswith("_per_second")} for line in lines]
        contents["metrics.jsonl"] = json.dumps(lines).encode()
    return {name: content.replace(str(folder).encode(), b"OUT") for name, content in contents.items()}


def position(out: Path) -> str:
    """A line for the log: how far a run has come."""
    steps = sorted(int(p.name[5:]) for p in out.glob("checkpoints/step-*"))
    metrics = out / "metrics.jsonl"
    lines = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    partial = [str(p.relative_to(out)) for p in out.rglob("*.partial")] if out.exists() else []
    text = f"checkpoints {steps}, {lines} metric lines"
    return f"{text}, half-written: {', '.join(partial)}" if partial else text


def case(name: str, kills: int, paths: dict, folder: Path, rng: random.Random) -> int:
    """Run a case without kills and with kills, and compare the files. Returns the number of kills.

    Args:
        name: a key of CASES.
        kills: how often to kill, at least.
        paths: the values for the placeholders in CASES.
    """
    log, out = open(folder / f"{name}.log", "w"), folder / name / "cut"
    words = {
        kind: [word.format(out=folder / name / kind, **paths) for word in CASES[name]] for kind in ("whole", "cut")
    }
    began, killed = time.monotonic(), 0
    assert start(words["whole"], log).wait() == 0, f"see {log.name}"
    seconds = time.monotonic() - began
    print(f"{name}: the run that is never stopped took {seconds:.1f} s", flush=True)
    while killed < kills:  # a run that ends too early is compared, and then run again
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(paths["sft"] / "reference", ignore_errors=True)
        code = None
        while code is None:
            process = start(words["cut"], log)
            wait = rng.uniform(0.3 * seconds, seconds) if killed < kills else None
            try:
                code = process.wait(wait)
            except subprocess.TimeoutExpired:
                kill(process)
                killed += 1
                print(f"{name}: kill {killed} after {wait:.2f} s: {position(out)}", flush=True)
        assert code == 0, f"exit code {code}, see {log.name}"
        whole, cut = left(folder / name / "whole"), left(out)
        different = [file for file in whole.keys() | cut.keys() if whole.get(file) != cut.get(file)]
        assert not different, f"{name}: these files differ: {different}"
        size = sum(map(len, whole.values()))
        print(f"{name}: after {killed} kills all {len(whole)} files are the same, {size:,} bytes", flush=True)
    return killed


def main() -> None:
    kills, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 24, int(time.time())
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {folder}, random moments from seed {seed}", flush=True)
    movielens(folder / "raw", users=60)
    draw_posters(folder / "raw" / "posters")
    paths = {"raw": folder / "raw", "data": folder / "prepare/whole", "sft": folder / "full/whole"}
    rng, killed = random.Random(seed), 0
    for number, name in enumerate(CASES):
        share = len(range(number, kills, len(CASES)))
        killed += case(name, share, paths, folder, rng)
    print(f"{killed} kills in all; every run ended with the files of the run that was never stopped")


if __name__ == "__main__":
    main()
