"""Functions that all training loops use: number of steps, order of samples, optimizer, schedule, prefetching."""

import argparse
import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from accelerate import DistributedType
from torch.distributed.fsdp import FSDPModule

from hanorec.run.files import UserError


def plan_steps(
    examples: int, kinds: int, options: argparse.Namespace, accelerator
) -> tuple[Iterator[list[list[int]]], int, int]:
    """Compute the optimizer steps, and print the arithmetic.

    Args:
        examples, kinds: as in `micro_batches`.

    Returns (this process's micro-batches in each step, steps of the run, steps of an epoch).
    """
    world, samples = accelerator.num_processes, examples * kinds
    per_step = options.batch_size * options.grad_accum * world
    if samples < per_step:
        raise UserError(f"{samples} samples do not fill a step of {per_step}: lower --batch-size or --grad-accum")
    per_epoch = samples // per_step
    steps = min(options.epochs * per_epoch, options.max_steps or 10**9)
    accelerator.print(
        f"step = {options.batch_size} samples x {options.grad_accum} micro-batches x {world} processes = {per_step}; "
        f"{steps} steps = {steps / per_epoch:.2f} epochs of {samples} samples"
    )
    size, accum, rank = options.batch_size, options.grad_accum, accelerator.process_index
    batches = micro_batches(examples, kinds, size, accum, world, rank, options.seed)
    return itertools.islice(batches, steps), steps, per_epoch


def micro_batches(
    examples: int, kinds: int, batch: int, accum: int, processes: int, rank: int, seed: int
) -> Iterator[list[list[int]]]:
    """Yield the samples of each optimizer step, without end: `accum` micro-batches of `batch` sample numbers.

    Every epoch is a new permutation of the examples, drawn from (seed, epoch). The samples of an example stay side by
    side, so that packing can share their prompts. An incomplete last step of an epoch is dropped.

    Args:
        examples: number of examples.
        kinds: samples of each example. Sample n is kind n % kinds of example n // kinds.
        processes: number of processes that share each step.
        rank: number of this process.
    """
    per_step = batch * accum * processes
    if examples * kinds < per_step:
        raise ValueError(f"{examples * kinds} samples do not fill a step of {per_step}")
    for epoch in itertools.count():
        shuffled = np.random.default_rng([seed, epoch]).permutation(examples)
        order = (shuffled[:, None] * kinds + np.arange(kinds)).ravel().tolist()
        for start in range(0, len(order) - per_step + 1, per_step):
            firsts = [start + (i * processes + rank) * batch for i in range(accum)]
            yield [order[first : first + batch] for first in firsts]


def trained_weights(model) -> dict[str, torch.nn.Parameter]:
    """Return the trained weights by name. Call this again after accelerator.prepare, which may shard them."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def reshard(model) -> None:
    """Let a model that fully_shard has sharded keep its own part of the weights alone. Others are left as they are.

    Call it after a forward without gradients. There the outer group of weights stays gathered until the next backward.
    Until then named_parameters gives other tensors than the optimizer has, and changes of the weights have no effect.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cosine(optimizer, steps: int, warmup_steps: int = 0, warmup_peak: float = 1.0):
    """Return a schedule over optimizer steps: a warm-up, then a cosine that falls to 0 over `steps` steps.

    The warm-up rises to its own peak over 5% of its steps, then falls to 0 by a cosine too. The schedule counts
    optimizer steps, so do not pass it to accelerator.prepare.

    Args:
        warmup_peak: the warm-up's peak, as a multiple of the optimizer's learning rate.
    """
    rise = warmup_steps // 20

    def scale(step: int) -> float:
        if step < rise:
            return warmup_peak * (step + 1) / rise
        if step < warmup_steps:
            peak, done, length = warmup_peak, step - rise, warmup_steps - rise
        else:
            peak, done, length = 1.0, step - warmup_steps, steps
        return peak * (0.5 * (1 + math.cos(math.pi * min(done / length, 1))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def loaded(load: Callable, batches: Iterable, done: int, device, depth: int = 2) -> Iterator:
    """Yield (step, sample numbers, load(step, sample numbers)) for each step after step `done`.

    On a GPU, a thread loads up to `depth` steps ahead; with depth 0 each step is loaded when the one before has ended.
    On a CPU there is no second thread: both would use OpenMP, and then the main thread's OpenMP threads sleep after
    each matrix product.
    """
    numbered = itertools.islice(enumerate(batches, 1), done, None)
    values = ((step, numbers, load(step, numbers)) for step, numbers in numbered)
    if device.type == "cpu" or not depth:
        yield from values
        return
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, values, end) for _ in range(depth))
        while (value := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, values, end))
            yield value


@contextlib.contextmanager
def micro_step(model, accelerator, last: bool) -> Iterator[None]:
    """Run forward and backward of a micro-batch inside this block. The last one averages gradients over processes."""
    accelerator.sync_gradients = last  # if True, DeepSpeed's backward makes the optimizer step
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def first_device(model, accelerator):
    """Return the device for a model before accelerator.prepare. A model to be sharded stays where it was loaded."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return model.device if sharded else accelerator.device
