"""Kill real runs at random moments, start them again until they end, and compare what they leave with a run that was
never stopped, byte by byte.

    python tests/soak.py 24        # so many kills in all, shared out over the cases; about half a minute each
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, draw_posters, movielens

SMALL = "--eval-limit 20 --batch-size 4 --grad-accum 2 --save-every 7 --epochs 99 --lr 1e-3".split()
WARM = "--warmup-steps 30 --warmup-items 8 --dropout 0.1 --max-steps 90".split()
CASES = {  # what each writes is compared
    "prepare": "prepare_data.py --dataset movielens --source {raw} --out {out} --max-pixels 3136".split(),
    "full": ["sft.py", "--data", "{data}", "--out", "{out}", *SMALL, *WARM],
    "lora": ["sft.py", "--data", "{data}", "--out", "{out}", *SMALL, *"--tune lora --max-steps 90".split()],
    "dpo": ["dpo_hano.py", "--sft", "{sft}", "--out", "{out}", *SMALL, *"--max-steps 60 --responsiveness ema".split()],
}


def start(words: list[str], log) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


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
    log = open(folder / f"{name}.log", "w")
    words = {
        kind: [word.format(out=folder / name / kind, **places) for word in CASES[name]] for kind in ("whole", "cut")
    }
    began = time.monotonic()
    assert start(words["whole"], log).wait() == 0, f"see {log.name}"
    lasted = time.monotonic() - began
    print(f"{name}: the run that is never stopped took {lasted:.1f} s", flush=True)
    done = 0
    while True:
        began, process = time.monotonic(), start(words["cut"], log)
        try:
            wait = draw.uniform(0.3 * lasted, lasted) if done < kills else None
            code = process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            print(f"{name}: kill {done} after {wait:.2f} s: {position(folder / name / 'cut')}", flush=True)
            continue
        assert code == 0, f"exit code {code}, see {log.name}"
        if done >= kills or name == "prepare" or (folder / name / "cut" / "result.json").exists():
            break
    whole, cut = left(folder / name / "whole"), left(folder / name / "cut")
    wrong = [file for file in whole.keys() | cut.keys() if whole.get(file) != cut.get(file)]
    assert not wrong, f"{name}: these differ: {wrong}"
    print(
        f"{name}: {done} kills; all {len(whole)} files are the same, {sum(map(len, whole.values())):,} bytes",
        flush=True,
    )
    return done


def main() -> None:
    kills, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 24, int(time.time())
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {folder}, random moments from seed {seed}", flush=True)
    movielens(folder / "raw", users=60)
    draw_posters(folder / "raw" / "posters")
    places = {"raw": folder / "raw", "data": folder / "prepare/whole", "sft": folder / "full/whole"}
    done, draw = 0, random.Random(seed)
    while done < kills:
        for name in CASES:
            share = max(1, kills // len(CASES)) if name != "prepare" else max(1, kills // len(CASES) // 2)
            done += case(name, share, places, folder, draw)
        for name in ("prepare", "full", "lora", "dpo"):
            if done < kills:
                shutil.rmtree(folder / name / "cut")
    print(f"{done} kills in all; every run ended with the bytes of the run that was never stopped")


if __name__ == "__main__":
    main()
