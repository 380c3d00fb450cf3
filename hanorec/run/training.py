"""What the two training scripts share around their loops: options, order of samples, learning-rate schedule, and the
run while it lasts: metrics, validation, which weights to keep."""

import argparse
import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hanorec.run import checkpoints, runs
from hanorec.run.runs import UserError, non_negative_int, positive_float, positive_int, probability


def add_training_options(parser: argparse.ArgumentParser, batch_size: int, grad_accum: int) -> None:
    """The options that sft.py and dpo_hano.py share. None: inherited, or chosen for the backbone and printed."""
    lora = parser.add_argument_group("LoRA (the paper: rank 8, alpha 32, dropout 0.05)")
    lora.add_argument("--lora-rank", type=positive_int, help="rank of the LoRA matrices [8]")
    lora.add_argument("--lora-alpha", type=positive_int, help="LoRA's scale times its rank [32]")
    lora.add_argument("--lora-dropout", type=probability, help="dropout before LoRA [0.05]")
    lora.add_argument("--quantize", choices=["4bit"], help="the frozen base in 4 bits (needs bitsandbytes)")
    train = parser.add_argument_group("training")
    train.add_argument(
        "--lr", type=positive_float, help="peak learning rate of AdamW, cosine to 0 [1e-4; tiny SFT: 1e-3]"
    )
    train.add_argument("--epochs", type=positive_int, help="passes over the training rows [5; tiny: 3, DPO 1]")
    train.add_argument(
        "--max-steps", type=positive_int, help="at most so many optimizer steps, warm-up apart [tiny DPO: 120]"
    )
    train.add_argument(
        "--batch-size", type=positive_int, help=f"samples a micro-batch [{batch_size}; tiny: 16, DPO 24]"
    )
    train.add_argument("--grad-accum", type=positive_int, help=f"micro-batches per step [{grad_accum}; tiny: 1]")
    train.add_argument("--max-length", type=positive_int, help="most tokens a prompt with its answer may have [4096]")
    train.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    attentions = ["sdpa", "flash_attention_2", "flex_attention"]
    train.add_argument("--attn", choices=attentions, help="attention; others than sdpa need --no-pack [sdpa]")
    train.add_argument("--no-pack", action="store_true", default=None, help="one plain forward per answer, slower")
    where = "image tokens read from the data folder, or made by the vision tower in each step [stored, if they are]"
    train.add_argument("--images", choices=["stored", "live"], help=where)
    train.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on GPUs")
    train.add_argument("--eval-limit", type=non_negative_int, help="validation rows an epoch; 0: all [0; tiny: 200]")
    runs.add_trust_option(train)
    train.add_argument("--report-to", metavar="NAME", help="a tracker that accelerate knows: tensorboard, wandb, ...")
    train.add_argument("--seed", type=non_negative_int, default=42, help="of order, new weights, dropout, noise [42]")
    stop = parser.add_argument_group("stopping and going on (README: When a run is interrupted)")
    resume = (
        "auto: an unfinished run in --out continues, a finished one is trained anew; never: refuses an unfinished one"
    )
    stop.add_argument("--resume", choices=["auto", "never"], default="auto", help=f"{resume} [auto]")
    every = "optimizer steps between checkpoints; each validation and each signal to stop makes one too [500]"
    stop.add_argument("--save-every", type=positive_int, default=500, help=every)
    stop.add_argument("--keep", type=positive_int, default=2, help="checkpoints kept, the last ones [2]")


def plan_steps(samples: int, options: argparse.Namespace, accelerator) -> tuple[int, int]:
    """(optimizer steps in all, in an epoch) for so many samples, printed as the arithmetic they come from."""
    world = accelerator.num_processes
    per_step = options.batch_size * options.grad_accum * world
    if samples < per_step:
        raise UserError(f"{samples} samples do not fill a step of {per_step}: lower --batch-size or --grad-accum")
    per_epoch = samples // per_step
    steps = min(options.epochs * per_epoch, options.max_steps or 10**9)
    accelerator.print(
        f"step = {options.batch_size} samples x {options.grad_accum} micro-batches x {world} processes = {per_step}; "
        f"{steps} steps = {steps / per_epoch:.2f} epochs of {samples} samples"
    )
    return steps, per_epoch


def micro_batches(
    rows: int, per_row: int, batch: int, accum: int, processes: int, rank: int, seed: int
) -> Iterator[list[list[int]]]:
    """Steps without end, each a list of this process's `accum` micro-batches, each a list of `batch` sample numbers.

    Sample r * per_row + t is task t of training row r. Every epoch is a new permutation of the rows, drawn from
    (seed, epoch) alone; the samples of a row stay side by side, so that packing can share what they share. An
    incomplete last step is dropped: each step has batch * accum * processes samples.
    """
    per_step, epoch = batch * accum * processes, 0
    if rows * per_row < per_step:
        raise ValueError(f"{rows * per_row} samples do not fill a step of {per_step}")
    while True:
        shuffled = np.random.default_rng([seed, epoch]).permutation(rows)
        order = (shuffled[:, None] * per_row + np.arange(per_row)).ravel().tolist()
        for start in range(0, len(order) - per_step + 1, per_step):
            yield [order[start + (i * processes + rank) * batch :][:batch] for i in range(accum)]
        epoch += 1


def adamw(model, lr: float, weight_decay: float = 0.01):
    """AdamW over the trainable weights, updated by one kernel instead of several for each of them."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay, fused=True)


def cosine(optimizer, steps: int, before: int = 0, before_scale: float = 1.0):
    """Cosine decay from the peak to 0 over `steps` optimizer steps, after a warm-up of `before` steps: over 5% of them
    a rise to a peak `before_scale` times as high, then cosine decay. It counts optimizer steps, so it is not passed
    through accelerator.prepare."""
    import torch

    rise = before // 20

    def scale(step: int) -> float:
        if step < rise:
            return before_scale * (step + 1) / rise
        done, length = (step - rise, before - rise) if step < before else (step - before, steps)
        return (before_scale if step < before else 1.0) * 0.5 * (1 + math.cos(math.pi * min(done / length, 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def ahead(values: Iterable, device, depth: int = 2) -> Iterator:
    """The same values, made in a thread up to `depth` before they are asked for. On a CPU without one: OpenMP in a
    second thread, for a hundredth of a step's work, has those of the first sleep after each product."""
    if device.type == "cpu":
        yield from values
        return
    values, end = iter(values), object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, values, end) for _ in range(depth))
        while (value := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, values, end))
            yield value


def loaded(load: Callable, batches: Iterable, done: int, device) -> Iterator:
    """load(step, numbers) for each step after the first `done`, made ahead."""
    return ahead(itertools.starmap(load, itertools.islice(enumerate(batches, 1), done, None)), device)


@contextlib.contextmanager
def micro_step(model, accelerator, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: with the last of a step, gradients are averaged over processes."""
    accelerator.sync_gradients = last  # where DeepSpeed's backward steps
    with contextlib.nullcontext() if last else accelerator.no_sync(model):
        yield


def first_device(model, accelerator):
    """Where a model waits for accelerator.prepare: one that is to be sharded may fit no device whole."""
    from accelerate import DistributedType

    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return model.device if sharded else accelerator.device


def whole_weights(model, accelerator) -> dict:
    """The state dict of the PackedMLLM's model, as that names it, on the main process put together where it is sharded.
    A call for all processes."""
    weights = accelerator.get_state_dict(model)
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


class Log:
    """What a training run says: metrics.jsonl, the screen, the trackers of --report-to, result.json at the end; and its
    checkpoints, which keep what it has said.

    A step's metrics stay tensors until the next step has been started, so that a GPU never waits for them to be read.
    """

    def __init__(self, stage: str, accelerator, options: argparse.Namespace, steps: int):
        from accelerate.utils import tqdm

        self.out, self.stage, self.accelerator, self.options = options.out, stage, accelerator, options
        self.file = open(self.out / "metrics.jsonl", "a", encoding="utf-8") if accelerator.is_main_process else None
        self.best, self.shortened = {"select": -1.0}, set()
        self.bar, self.pending = tqdm(total=steps, desc=stage, unit="step"), None
        self.began, self.samples = time.perf_counter(), 0
        self.signal, self.stop = 0, 0  # what this process was told, and what all know of
        self.command = shlex.join(runs.launcher() or ["python", *sys.argv])  # a launcher may be gone before we are
        if options.report_to:
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in runs.plain(options).items()}
            accelerator.init_trackers("hanorec", config=flat)

    def write(self, step: int, values: dict) -> None:
        """values: numbers or scalar tensors."""
        values = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if self.file:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.options.report_to:
            self.accelerator.log(values, step=step)

    def step(self, step: int, values: dict, samples: int, rate: str, names: Callable, due: bool = True) -> None:
        """The metrics of an optimizer step, `loss` and `grad_norm` among them, over all processes. samples: how many of
        this process; rate: the option to lower where training diverges, and its value; names: says which samples these
        were; due: write them."""
        import torch

        self.flush()
        now, self.samples = time.perf_counter(), self.samples + samples * self.accelerator.num_processes
        unit = "pairs" if self.stage == "dpo_hano" else "samples"
        if due:
            values = values | {f"{unit}_per_second": self.samples / (now - self.began)}
            self.began, self.samples = now, 0
        told = torch.tensor(float(self.signal), device=self.accelerator.device)
        self.pending = (step, values, rate, names, due, self.accelerator.gather(told).max())

    def flush(self) -> None:
        """Read and write the step that is pending; UserError where its loss or gradient is no number any more."""
        if self.pending is None:
            return
        (step, values, rate, names, due, told), self.pending = self.pending, None
        self.stop = int(told)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := float(values[name])):
                kept = f"the weights of step {self.best['step']} stay" if "step" in self.best else "none were kept yet"
                raise UserError(f"{name} is {value} at step {step} ({names()}); lower {rate}; {kept}")
        if due:
            self.write(step, values)
            self.bar.set_postfix({n: f"{float(values[n]):.3f}" for n in ("loss", "accuracy") if n in values})
        self.bar.update()

    def validation(self, step: int, epoch: float, values: dict) -> bool:
        """Whether these are the weights to keep: the best `select` so far."""
        self.write(step, {f"val_{name}": value for name, value in values.items()})
        self.accelerator.print(f"\nepoch {epoch:.2f}: " + ", ".join(f"{n} {v:.4f}" for n, v in values.items()))
        better = values["select"] > self.best["select"]
        self.best = {"step": step, **values} if better else self.best
        self.began, self.samples = time.perf_counter(), 0
        return better

    def resume(self, model, optimizer, shortened: set, **parts) -> int:
        """Continue from the run's last checkpoint, where it has one. Returns the steps that are done.

        model: whose trainable weights the optimizer trains; parts: `schedule`, and what else has a state (None: has
        none); shortened: takes the rows whose prompts lost history items on this process, as they come.
        """
        self.shortened, parts = shortened, {name: part for name, part in parts.items() if part} | {"log": self}
        self.trained, done = (model, optimizer, parts), 0
        if folder := checkpoints.newest(self.out):
            done = checkpoints.load(folder, *self.trained, self.accelerator)
            self.accelerator.print(f"{self.out} continues after step {done} ({folder})")
            before = runs.read_json(self.out / "config.json", {"machine": dict}, f"delete {self.out}")["machine"]
            now = checkpoints.machine(self.accelerator.device)
            if other := [f"{n}: {before.get(n)}, now {v}" for n, v in now.items() if before.get(n) != v]:
                self.accelerator.print(f"it began on another machine, so last digits may differ ({'; '.join(other)})")
        self.bar.update(done)
        return done

    def end_step(self, step: int, save: bool) -> None:
        """Save a checkpoint where one is due; SystemExit where the run was told to stop."""
        alone = self.accelerator.num_processes == 1
        if not (save or step % self.options.save_every == 0 or (self.signal if alone else self.stop)):
            return
        self.flush()
        if saved := checkpoints.possible(self.accelerator):
            checkpoints.save(self.out, step, *self.trained, self.options.keep, self.accelerator)
        self.began, self.samples = time.perf_counter(), 0
        if told := self.signal if alone else self.stop:
            stopped = f"step {step} is saved. To continue" if saved else "DeepSpeed saves none. To begin anew"
            self.accelerator.print(f"\nstopped; {stopped}: {self.command}", flush=True)
            raise SystemExit(128 + told)

    def state_dict(self) -> dict:
        """For a checkpoint: what was said so far. A call for all processes."""
        state = {"best": self.best, "shortened": self.all_shortened()}
        if self.file:
            os.fsync(self.file.fileno())
            state["metrics_bytes"] = os.fstat(self.file.fileno()).st_size
        return state

    def load_state_dict(self, state: dict) -> None:
        """Take back what was said after that."""
        self.best = state["best"]
        self.shortened.update(map(tuple, state["shortened"]))
        if self.file:
            if os.fstat(self.file.fileno()).st_size < state["metrics_bytes"]:
                raise UserError(f"{self.file.name} has lost lines that the checkpoint knows of; delete {self.out}")
            self.file.truncate(state["metrics_bytes"])

    def all_shortened(self) -> list:
        """The rows whose prompts lost history items on any process."""
        from accelerate.utils import gather_object

        return sorted(set(gather_object(list(self.shortened))))

    def finish(self) -> None:
        """Declare the run whole."""
        lost = len(self.all_shortened())
        if self.accelerator.is_main_process:
            result = {"stage": self.stage, "best": self.best, "shortened_rows": lost}
            result["weights"] = runs.weights_hash(self.out)
            runs.write_json(self.out / "result.json", result)
            runs.remove(self.out / "checkpoints")
        self.accelerator.print(f"{self.out}: weights of step {self.best['step']}")
        if lost:
            self.accelerator.print(f"{lost} rows lost their oldest history items to --max-length")


@contextlib.contextmanager
def signals(log: Log) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C wait for the end of an optimizer step (of two, with several processes)."""

    def keep(number, frame):
        if not log.signal:
            os.write(2, b"\nstopping after this step; Ctrl-\\ stops at once, back to the last checkpoint\n")
        log.signal = number

    before = {number: signal.signal(number, keep) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def started(options: argparse.Namespace, stage: str, accelerator, steps: int, **hashes) -> Iterator[Log]:
    """A run folder in --out, held and begun: config.json is written, and what an earlier run left is dropped, unless it
    is unfinished and has a checkpoint to continue from."""
    with runs.locked(options.out) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process and not checkpoints.newest(options.out):
            runs.begin_run(options.out, stage, runs.plain(options), **checkpoints.facts(accelerator, **hashes))
        accelerator.wait_for_everyone()
        log = Log(stage, accelerator, options, steps)
        try:
            with signals(log):
                yield log
        finally:
            log.bar.close()
            if log.file:
                log.file.close()
        if options.report_to:
            accelerator.end_training()
    accelerator.wait_for_everyone()
