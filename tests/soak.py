"""Kill real runs at random moments, start them again until they end, and compare what they leave with a run that was
never stopped, byte by byte.

    python tests/soak.py 24        # so many kills in all, shared out over the cases; about half a minute each
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

SMALL = "--eval-limit 20 --batch-size 4 --grad-accum 2 --save-every 7 --epochs 99 --lr 1e-3".split()
WARM = "--warmup-steps 30 --warmup-items 8 --dropout 0.1 --max-steps 90".split()
TWO = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --main_process_port 0".split()
CASES = {  # what each writes is compared
    "prepare": "prepare_data.py --dataset movielens --source {raw} --out {out} --max-pixels 3136".split(),
    "full": ["sft.py", "--data", "{data}", "--out", "{out}", *SMALL, *WARM],
    "lora": ["sft.py", "--data", "{data}", "--out", "{out}", *SMALL, *"--tune lora --max-steps 90".split()],
    "dpo": ["dpo_hano.py", "--sft", "{sft}", "--out", "{out}", *SMALL, *"--max-steps 60 --responsiveness ema".split()],
    "two": [
        *TWO,
        "dpo_hano.py",
        "--sft",
        "{sft}",
        "--out",
        "{out}",
        *SMALL,
        *"--max-steps 60 --noise absolute".split(),
    ],
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def start(words: list[str], log) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL, also to what a launcher started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.kill()
    process.wait()


def left(folder: Path) -> dict[str, bytes]:
    """What a script left: every file's bytes, without what tells the time or the folder's name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in (".lock", "config.json"):
            found[name] = path.read_bytes()
    if "metrics.jsonl" in found:
        lines = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == sorted(set(steps)), f"doubled or disordered steps: {steps}"
        lines = [{n: v for n, v in line.items() if not n.endswith("_per_second")} for line in lines]
        found["metrics.jsonl"] = json.dumps(lines).encode()
    return {name: text.replace(str(folder).encode(), b"OUT") for name, text in found.items()}


def position(out: Path) -> str:
    steps = sorted(int(p.name[5:]) for p in out.glob("checkpoints/step-*"))
    metrics = out / "metrics.jsonl"
    lines = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    partial = [str(p.relative_to(out)) for p in out.rglob("*.partial")] if out.exists() else []
    return f"checkpoints {steps}, {lines} metric lines" + f", half-written: {', '.join(partial)}" * bool(partial)


def case(name: str, kills: int, places: dict, folder: Path, draw: random.Random) -> int:
    """Run a case without and with kills, and compare. Returns how often it was killed."""
    log, out = open(folder / f"{name}.log", "w"), folder / name / "cut"
    words = {
        kind: [word.format(out=folder / name / kind, **places) for word in CASES[name]] for kind in ("whole", "cut")
    }
    began, done = time.monotonic(), 0
    assert start(words["whole"], log).wait() == 0, f"see {log.name}"
    lasted = time.monotonic() - began
    print(f"{name}: the run that is never stopped took {lasted:.1f} s", flush=True)
    while done < kills:  # a run that ends before it was killed often enough is compared, and made again
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(places["sft"] / "reference", ignore_errors=True)
        code = None
        while code is None:
            process, wait = start(words["cut"], log), draw.uniform(0.3 * lasted, lasted) if done < kills else None
            try:
                code = process.wait(wait)
            except subprocess.TimeoutExpired:
                kill(process)
                done += 1
                print(f"{name}: kill {done} after {wait:.2f} s: {position(out)}", flush=True)
        assert code == 0, f"exit code {code}, see {log.name}"
        whole, cut = left(folder / name / "whole"), left(out)
        wrong = [file for file in whole.keys() | cut.keys() if whole.get(file) != cut.get(file)]
        assert not wrong, f"{name}: these differ: {wrong}"
        size = sum(map(len, whole.values()))
        print(f"{name}: after {done} kills all {len(whole)} files are the same, {size:,} bytes", flush=True)
    return done


def main() -> None:
    kills, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 24, int(time.time())
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {folder}, random moments from seed {seed}", flush=True)
    movielens(folder / "raw", users=60)
    draw_posters(folder / "raw" / "posters")
    places = {"raw": folder / "raw", "data": folder / "prepare/whole", "sft": folder / "full/whole"}
    draw, names = random.Random(seed), list(CASES)
    done = sum(case(name, len(range(kills)[i :: len(names)]), places, folder, draw) for i, name in enumerate(names))
    print(f"{done} kills in all; every run ended with the bytes of the run that was never stopped")


if __name__ == "__main__":
    main()
