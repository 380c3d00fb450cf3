"""Launched with some number of processes: both stages and an evaluation, 4 samples to a micro-batch over all."""

import os
import sys
from pathlib import Path

import dpo_hano
import evaluate
import sft

core = sorted(os.sched_getaffinity(0))[int(os.environ.get("RANK", 0)) % len(os.sched_getaffinity(0))]
os.sched_setaffinity(0, {core})  # one thread in a single process too: another number rounds otherwise
data, folder, clean, noisy = (Path(word) for word in sys.argv[1:])  # the last two: copies of an SFT run to start from
common = f"--batch-size {4 // int(os.environ.get('WORLD_SIZE', 1))} --grad-accum 2 --max-steps 20 --epochs 99".split()
common += "--eval-limit 11 --lr 1e-3 --lora-dropout 0".split()
full = [*common, *"--warmup-steps 0 --dropout 0 --max-length 170".split()]
sft.main(["--data", str(data), "--out", str(folder / "full"), *full])
for start, sigma in ((clean, "0"), (noisy, "0.1")):
    dpo_hano.main(["--sft", str(start), "--out", str(folder / start.name), *common, "--sigma", sigma])
evaluate.main(["--run", str(clean), "--limit", "7", "--batch-size", "2"])
