"""Run both stages and an evaluation with 1, 2 and 4 processes, and with 2 processes and sharded weights.

A micro-batch has 4 samples in all, shared by the processes. Weights are sharded by torch's fully_shard. The processes
are forked, so that the libraries are loaded once.
"""

import os
import shutil
import sys
import traceback
from pathlib import Path

import peft  # noqa: F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
from accelerate import Accelerator
from forked import free_port, rank_variables
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import dpo_hano
import evaluate
import sft
from hanorec import recommend
from hanorec.model import packing  # noqa: F401

data, start, out = (Path(word) for word in sys.argv[1:])


def prepare(accelerator, model, optimizer):
    """Replace Accelerator.prepare: shard the weights with torch itself, because accelerate runs no FSDP2 on CPUs."""
    names = {p: name for name, p in model.named_parameters()}
    for layer in model.core.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [shards[names[p]] for p in group["params"]]
    return model, optimizer


def get_state_dict(accelerator, model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def clip_grad_norm(*args, clip=Accelerator.clip_grad_norm_):
    return clip(*args).full_tensor()


def train(folder: Path, world: int) -> None:
    """Train both stages, DPO with and without noise, and evaluate, as one of `world` processes."""
    common = f"--batch-size {4 // world} --grad-accum 2 --max-steps 20 --epochs 99 --eval-limit 11 --lr 1e-3".split()
    common += ["--lora-dropout", "0"]
    full = ["--out", str(folder / "sft"), *"--warmup-steps 0 --dropout 0 --max-length 170".split()]
    sft.main(["--data", str(data), *common, *full])
    for name, sigma in (("clean", "0"), ("noisy", "0.1")):
        dpo_hano.main(["--sft", str(folder / "start"), "--out", str(folder / name), *common, "--sigma", sigma])
    evaluate.main(["--run", str(folder / "start"), "--limit", "7", "--batch-size", "2"])
    everybody = ["--users", "all", "--out", str(folder / "recommendations.jsonl")]
    recommend.main(["--run", str(folder / "start"), *everybody])


def process(rank: int, world: int, port: int, folder: Path, sharded: bool) -> None:
    os.environ |= rank_variables(rank, world, port)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # one thread everywhere: more threads round differently
    if sharded:
        Accelerator.prepare, Accelerator.get_state_dict = prepare, get_state_dict
        Accelerator.clip_grad_norm_ = clip_grad_norm
    train(folder, world)


for world, sharded in ((1, False), (2, False), (4, False), (2, True)):
    folder = out / (f"{world}_sharded" if sharded else f"{world}")
    shutil.copytree(start, folder / "start", ignore=shutil.ignore_patterns("reference"))
    port, children = free_port(), []
    for rank in range(world):
        if not (child := os.fork()):
            try:
                process(rank, world, port, folder, sharded)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world, (world, sharded)
