"""A training run while it lasts: the metrics it logs, the best validation, checkpoints, and signals to stop."""

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import gather_object, tqdm

from hanorec.run import checkpoints
from hanorec.run.files import UserError, delete, locked, read_json, write_json
from hanorec.run.launch import launcher_command
from hanorec.run.runs import begin_run, json_options, weights_hash


class Log:
    """Writes metrics.jsonl, the screen, the trackers of --report-to and result.json, and saves checkpoints.

    A step's metrics stay tensors until the next step has started, so that a GPU never waits for them to be read.

    Args:
        steps: optimizer steps of the run.
        every: write the metrics of every so many steps, and of the first and the last.
        named: what the names of samples are, for errors: `users` or `items`.
    """

    def __init__(
        self, stage: str, accelerator, options: argparse.Namespace, steps: int, every: int = 1, named: str = "users"
    ):
        self.out, self.stage, self.accelerator, self.options = options.out, stage, accelerator, options
        self.steps, self.every, self.named = steps, every, named
        self.file = open(self.out / "metrics.jsonl", "a", encoding="utf-8") if accelerator.is_main_process else None
        self.best, self.shortened = {"select": -1.0}, set()
        self.bar, self.pending = tqdm(total=steps, desc=stage, unit="step"), None
        self.start_timing()
        self.signal = 0  # the signal that this process got
        self.any_signal = 0  # the largest signal that any process got
        self.command = shlex.join(launcher_command() or ["python", *sys.argv])  # the launcher may end before us
        if options.report_to:
            values = json_options(options).items()
            plain = {name: v if isinstance(v, (int, float, str, bool)) else str(v) for name, v in values}
            accelerator.init_trackers("hanorec", config=plain)

    def start_timing(self) -> None:
        self.began, self.samples = time.perf_counter(), 0

    def write(self, step: int, metrics: dict) -> None:
        """Write numbers or scalar tensors by name."""
        metrics = {name: float(f"{float(value):.6g}") for name, value in metrics.items()}
        if self.file:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        if self.options.report_to:
            self.accelerator.log(metrics, step=step)

    def step(self, step: int, metrics: dict, names: Sequence[str]) -> None:
        """Take the metrics of an optimizer step, over all processes.

        Args:
            metrics: scalars by name, `loss` and `grad_norm` among them.
            names: the user (or item) of each sample of this process, for the speed and for errors.
        """
        self.flush()
        self.samples += len(names) * self.accelerator.num_processes
        if step % self.every == 0 or step in (1, self.steps):
            unit = "pairs" if self.stage == "dpo_hano" else "samples"
            metrics = metrics | {f"{unit}_per_second": self.samples / (time.perf_counter() - self.began)}
            self.start_timing()
            due = True
        else:
            due = False
        signals = torch.tensor(float(self.signal), device=self.accelerator.device)
        self.pending = (step, metrics, names, due, self.accelerator.gather(signals).max())

    def flush(self) -> None:
        """Read and write the pending step. UserError if its loss or its gradient is not finite."""
        if self.pending is None:
            return
        (step, metrics, names, due, any_signal), self.pending = self.pending, None
        self.any_signal = int(any_signal)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise UserError(self.divergence(step, name, metrics, names))
        if due:
            self.write(step, metrics)
            self.bar.set_postfix({n: f"{float(metrics[n]):.3f}" for n in ("loss", "accuracy") if n in metrics})
        self.bar.update()

    def divergence(self, step: int, name: str, metrics: dict, names: Sequence[str]) -> str:
        """The message for a loss or a gradient that is not finite: the samples, the option to lower, what was kept."""
        option = "warmup_lr" if metrics.get("warmup") else "lr"
        lower = f"--{option.replace('_', '-')} {getattr(self.options, option)}"
        kept = f"the weights of step {self.best['step']} stay" if "step" in self.best else "none were kept yet"
        samples = f"{self.named} {', '.join(dict.fromkeys(names))}"
        return f"{name} is {float(metrics[name])} at step {step} ({samples}); lower {lower}; {kept}"

    def validation(self, step: int, epoch: float, metrics: dict) -> bool:
        """Log validation metrics. Return whether these are the weights to keep: the best `select` so far."""
        self.write(step, {f"val_{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.accelerator.print(f"\nepoch {epoch:.2f}: {shown}")
        better = metrics["select"] > self.best["select"]
        self.best = {"step": step, **metrics} if better else self.best
        self.start_timing()
        return better

    def resume(self, model, optimizer, shortened: set, **parts) -> int:
        """Continue from the run's last checkpoint, if it has one. Return the number of steps that are done.

        Args:
            model: the module with the trained weights.
            shortened: the (user, target) of examples whose prompts lost history items on this process.
            parts: `schedule`, and whatever else has a state; None for what has none.
        """
        self.shortened = shortened
        parts = {name: part for name, part in parts.items() if part is not None} | {"log": self}
        self.trained, done = (model, optimizer, parts), 0
        folder = checkpoints.newest(self.out)
        if folder:
            done = checkpoints.load(folder, *self.trained, self.accelerator)
            self.accelerator.print(f"{self.out} continues after step {done} ({folder})")
            self.compare_machines()
        self.bar.update(done)
        return done

    def compare_machines(self) -> None:
        """Print how the machine differs from the one that the run began on."""
        before = read_json(self.out / "config.json", {"machine": dict}, f"delete {self.out}")["machine"]
        now = checkpoints.machine(self.accelerator.device)
        changed = [
            f"{name}: {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value
        ]
        if changed:
            self.accelerator.print(f"it began on another machine, so last digits may differ ({'; '.join(changed)})")

    def end_step(self, step: int, validated: bool) -> None:
        """Save a checkpoint if one is due. SystemExit if a signal asked the run to stop."""
        number = self.signal if self.accelerator.num_processes == 1 else self.any_signal
        if not (validated or number or step % self.options.save_every == 0):
            return
        self.flush()
        saved = checkpoints.possible(self.accelerator)
        if saved:
            checkpoints.save(self.out, step, *self.trained, self.options.keep, self.accelerator)
        self.start_timing()
        if number:
            stopped = f"step {step} is saved. To continue" if saved else "DeepSpeed saves none. To begin anew"
            self.accelerator.print(f"\nstopped; {stopped}: {self.command}", flush=True)
            raise SystemExit(128 + number)

    def state_dict(self) -> dict:
        """The log's part of a checkpoint. All processes must call this."""
        state = {"best": self.best, "shortened": self.all_shortened()}
        if self.file:
            os.fsync(self.file.fileno())
            state["metrics_bytes"] = os.fstat(self.file.fileno()).st_size
        return state

    def load_state_dict(self, state: dict) -> None:
        """Go back to a checkpoint: later lines of metrics.jsonl are cut off."""
        self.best = state["best"]
        self.shortened.update(map(tuple, state["shortened"]))
        if self.file:
            if os.fstat(self.file.fileno()).st_size < state["metrics_bytes"]:
                raise UserError(f"{self.file.name} has lost lines that the checkpoint knows of; delete {self.out}")
            self.file.truncate(state["metrics_bytes"])

    def all_shortened(self) -> list:
        """The (user, target) of examples whose prompts lost history items on any process."""
        return sorted(set(gather_object(list(self.shortened))))

    def finish(self) -> None:
        """Write result.json, which declares the run finished."""
        shortened = len(self.all_shortened())
        if self.accelerator.is_main_process:
            result = {"stage": self.stage, "best": self.best, "shortened_rows": shortened}
            write_json(self.out / "result.json", result | {"weights": weights_hash(self.out)})
            delete(self.out / "checkpoints")
        self.accelerator.print(f"{self.out}: weights of step {self.best['step']}")
        if shortened:
            self.accelerator.print(f"{shortened} examples lost their oldest history items to --max-length")


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
def started(
    options: argparse.Namespace,
    stage: str,
    accelerator,
    steps: int,
    hashes: dict,
    every: int = 1,
    named: str = "users",
) -> Iterator[Log]:
    """Hold the run folder --out and begin the run there, unless a checkpoint continues one. Yield its log.

    Args:
        hashes: what config.json keeps of the data and of the run before.
        every, named: as Log has them.
    """
    with locked(options.out) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process and not checkpoints.newest(options.out):
            begin_run(options.out, stage, json_options(options), **checkpoints.facts(accelerator, **hashes))
        accelerator.wait_for_everyone()
        log = Log(stage, accelerator, options, steps, every, named)
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
