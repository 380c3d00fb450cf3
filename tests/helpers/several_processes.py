"""Both stages and an evaluation by 1, 2 and 4 processes, 4 samples to a micro-batch over all of them, and by 2 among
which torch's fully_shard has shared the weights out. Processes are forked, so that the libraries are loaded once."""

import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

import peft  # noqa: F401
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import dpo_hano
import evaluate
import sft
from hanorec.model import packing  # noqa: F401

data, start, out = (Path(word) for word in sys.argv[1:])


def prepare(accelerator, model, optimizer):
    """Stands in for accelerate's FSDP2, which it does not run on CPUs: the same sharding, by torch itself."""
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
    common = f"--batch-size {4 // world} --grad-accum 2 --max-steps 20 --epochs 99 --eval-limit 11 --lr 1e-3".split()
    common += ["--lora-dropout", "0"]
    full = ["--out", str(folder / "sft"), *"--warmup-steps 0 --dropout 0 --max-length 170".split()]
    sft.main(["--data", str(data), *common, *full])
    for name, sigma in (("clean", "0"), ("noisy", "0.1")):
        dpo_hano.main(["--sft", str(folder / "start"), "--out", str(folder / name), *common, "--sigma", sigma])
    evaluate.main(["--run", str(folder / "start"), "--limit", "7", "--batch-size", "2"])


def process(rank: int, world: int, port: int, folder: Path, sharded: bool) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # one thread in a single process too: more round otherwise
    if sharded:
        Accelerator.prepare, Accelerator.get_state_dict = prepare, get_state_dict
        Accelerator.clip_grad_norm_ = clip_grad_norm
    train(folder, world)


for world, sharded in ((1, False), (2, False), (4, False), (2, True)):
    folder = out / (f"{world}" + "_sharded" * sharded)
    shutil.copytree(start, folder / "start", ignore=shutil.ignore_patterns("reference"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
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
