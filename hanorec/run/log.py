"""The log of a training run: metrics, the best validation, checkpoints, and signals that stop the run."""

import contextlib
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import gather_object

from hanorec.run import checkpoints
from hanorec.run.files import UserError, delete, locked, read_json, write_json
from hanorec.run.launch import launcher_command, python_command, start_tracker
from hanorec.run.progress import progress
from hanorec.run.runs import begin_run, json_options, next_command, weights_hash


class LaterValues:
    """Numbers and scalar tensors by name, which are read later. Until then the host need not wait for a GPU.

    The tensors are copied to the host at once, without a wait. The copy comes before the work that the GPU gets after
    it, so that `read` waits for no work that the GPU got since.
    """

    def __init__(self, values: dict):
        self.values, self.event = values, None
        tensors = [value for value in values.values() if torch.is_tensor(value)]
        if not tensors:
            return
        tensors = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in tensors]  # DTensors
        stacked = torch.stack([value.detach().float().to(tensors[0].device) for value in tensors])
        self.copy = stacked.to("cpu", non_blocking=stacked.is_cuda)
        if stacked.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> dict[str, float]:
        """Return the numbers by name."""
        if self.event:
            self.event.synchronize()
        names = [name for name, value in self.values.items() if torch.is_tensor(value)]
        return self.values | (dict(zip(names, self.copy.tolist(), strict=True)) if names else {})


class Log:
    """Logs metrics to metrics.jsonl, the screen and the tracker, saves checkpoints, and writes result.json.

    The metrics of a step are read when the next step has started, so that a GPU never waits until they are read.

    Args:
        steps: optimizer steps of the run.
        every: number of steps between two logged steps. The first and the last step are logged too.
        named: kind of the samples' names, for errors: `users` or `items`.
    """

    def __init__(self, stage: str, accelerator, options, steps: int, every: int = 1, named: str = "users"):
        self.out, self.stage, self.accelerator, self.options = options.out, stage, accelerator, options
        self.steps, self.every, self.named = steps, every, named
        self.file = open(self.out / "metrics.jsonl", "a", encoding="utf-8") if accelerator.is_main_process else None
        self.best = {"select": -1.0}
        self.shortened = set()
        self.bar = progress(total=steps, desc=stage, unit="step")
        self.pending = None
        self.began, self.samples = time.perf_counter(), 0  # of the measurement of the samples per second
        self.signal = 0  # the signal that this process received
        self.any_signal = 0  # the largest signal that any process received
        self.command = shlex.join(launcher_command() or python_command())  # read now: the launcher may end first
        if options.report_to:
            start_tracker(options, accelerator)

    def write(self, step: int, metrics: dict) -> None:
        """Write numbers by name. JSON has no NaN or infinity, so metrics.jsonl gets null for them."""
        metrics = {name: float(f"{float(value):.6g}") for name, value in metrics.items()}
        if self.file:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
            self.file.flush()
        if self.options.report_to:
            self.accelerator.log(metrics, step=step)

    def step(self, step: int, metrics: dict, names: Sequence[str]) -> None:
        """Keep the metrics of an optimizer step until `flush` writes them. Flush those of the step before.

        Args:
            metrics: scalars over all processes by name, with `loss` and `grad_norm`.
            names: the user (or item) of each sample of this process, for the speed and for errors.
        """
        self.flush()
        self.samples += len(names) * self.accelerator.num_processes
        logged = step % self.every == 0 or step in (1, self.steps)
        if logged:
            unit = "pairs" if self.stage == "dpo_hano" else "samples"
            metrics = metrics | {f"{unit}_per_second": self.samples / (time.perf_counter() - self.began)}
            self.began, self.samples = time.perf_counter(), 0
        signal_number = torch.full((), float(self.signal), device=self.accelerator.device)
        any_signal = self.accelerator.gather(signal_number).max()
        self.pending = (step, LaterValues(metrics | {"any_signal": any_signal}), names, logged)

    def flush(self) -> None:
        """Write the metrics of the pending step.

        Raises:
            UserError: its loss or its gradient is not finite. The message names the samples, the option to lower, and
                the weights that stay.
        """
        if self.pending is None:
            return
        step, values, names, logged = self.pending
        self.pending, metrics = None, values.read()
        self.any_signal = int(metrics.pop("any_signal"))
        for name in ("loss", "grad_norm"):
            if math.isfinite(metrics[name]):
                continue
            option = "warmup_lr" if metrics.get("warmup") else "lr"
            lower = f"--{option.replace('_', '-')} {getattr(self.options, option)}"
            kept = "no weights were saved yet"
            if "step" in self.best:
                kept = f"the weights of step {self.best['step']} stay"
            samples = f"{self.named} {', '.join(dict.fromkeys(names))}"
            raise UserError(f"{name} is {metrics[name]} at step {step} ({samples}); lower {lower}; {kept}")
        if step == getattr(self.options, "warmup_steps", 0) + 1 > 1:
            loss = f"the loss is now that of answers ({metrics['loss']:.3f}), no longer that of titles"
            self.accelerator.print(f"\nstep {step}: the warm-up is over; {loss}")
        if logged:
            self.write(step, metrics)
            self.bar.set_postfix({n: f"{metrics[n]:.3f}" for n in ("loss", "accuracy") if n in metrics})
        self.bar.update()

    def validation(self, step: int, epoch: float, metrics: dict) -> bool:
        """Log validation metrics. Return whether the weights are the best so far, by `select`; the caller saves them.

        `select` is NDCG@3, or AUC if the run is not trained to rank.
        """
        self.write(step, {f"val_{name}": value for name, value in metrics.items()})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.accelerator.print(f"\nepoch {epoch:.2f}: {shown}")
        better = metrics["select"] > self.best["select"]
        if better:
            self.best = {"step": step, **metrics}
        return better

    def resume(self, model, optimizer, shortened: set, **parts) -> int:
        """Load the run's last checkpoint, if there is one. Return its step, or 0.

        Print the hardware, threads and versions that have changed since the run began.

        Args:
            model: the module with the trained weights.
            shortened: the (user, target) of examples whose prompts lost history items on this process.
            parts: `schedule`, and other objects with a state. Those that are None are left out.
        """
        self.shortened = shortened
        parts = {name: part for name, part in parts.items() if part is not None} | {"log": self}
        self.trained = (model, optimizer, parts)
        folder = checkpoints.newest(self.out)
        if folder is None:
            return 0
        step = checkpoints.load(folder, *self.trained, self.accelerator)
        self.accelerator.print(f"{self.out} continues after step {step} ({folder})")
        before = read_json(self.out / "config.json", {"machine": dict}, f"delete {self.out}")["machine"]
        changed = []
        for name, value in checkpoints.machine(self.accelerator.device).items():
            if before.get(name) != value:
                changed.append(f"{name}: {before.get(name)}, now {value}")
        if changed:
            self.accelerator.print(f"the last digits may differ, because these have changed: {'; '.join(changed)}")
        self.bar.n = self.bar.initial = step
        return step

    def end_step(self, step: int, validated: bool) -> None:
        """Save a checkpoint every --save-every steps, after a validation, and after a signal.

        Raises:
            SystemExit: a signal told the run to stop.
        """
        number = self.signal if self.accelerator.num_processes == 1 else self.any_signal
        if not (validated or number or step % self.options.save_every == 0):
            return
        self.flush()
        saved = checkpoints.save(self.out, step, *self.trained, self.options.keep, self.accelerator)
        self.began, self.samples = time.perf_counter(), 0
        if number:
            state = f"step {step} is saved. To continue" if saved else "no step could be saved. To start again"
            self.accelerator.print(f"\nstopped; {state}: {self.command}", flush=True)
            raise SystemExit(128 + number)

    def state_dict(self) -> dict:
        """Return the log's part of a checkpoint. All processes must call this."""
        state = {"best": self.best, "shortened": sorted(set(gather_object(list(self.shortened))))}
        if self.file:
            os.fsync(self.file.fileno())
            state["metrics_bytes"] = os.fstat(self.file.fileno()).st_size
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore the log from a checkpoint, and delete later lines of metrics.jsonl."""
        self.best = state["best"]
        self.shortened.update(map(tuple, state["shortened"]))
        if self.file:
            if os.fstat(self.file.fileno()).st_size < state["metrics_bytes"]:
                raise UserError(f"{self.file.name} has fewer lines than its checkpoint expects; delete {self.out}")
            self.file.truncate(state["metrics_bytes"])

    def on_signal(self, number: int, frame) -> None:
        """Remember SIGTERM or Ctrl-C until the end of an optimizer step, so that the step can be saved.

        With several processes it is one or two steps later, because a step's signals are read in the step after it.
        """
        if not self.signal:
            last_step = "this step" if self.accelerator.num_processes == 1 else "the next step"
            os.write(2, f"\nstopping after {last_step}; Ctrl-\\ stops at once, without a new checkpoint\n".encode())
        self.signal = number

    def finish(self) -> None:
        """Write result.json, which marks the run as finished, and delete the checkpoints."""
        shortened = len(set(gather_object(list(self.shortened))))  # of all processes
        if self.accelerator.is_main_process:
            result = {"stage": self.stage, "best": self.best, "shortened_rows": shortened}
            write_json(self.out / "result.json", result | {"weights": weights_hash(self.out)})
            delete(self.out / "checkpoints")
        self.accelerator.print(f"{self.out}: weights of step {self.best['step']}")
        if shortened:
            self.accelerator.print(f"{shortened} examples lost their oldest history items to --max-length")
        self.accelerator.print(f"next: {next_command(self.stage, self.options)}")


@contextlib.contextmanager
def started(options, stage: str, accelerator, steps: int, hashes: dict, **settings) -> Iterator[Log]:
    """Lock the run folder --out, begin the run or prepare to continue it, and yield its log.

    Args:
        hashes: hashes of the data and of the run before, by field of config.json.
        settings: `every` and `named` of Log.
    """
    with locked(options.out) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process and not checkpoints.newest(options.out):
            machine = checkpoints.machine(accelerator.device)
            fields = hashes | {"processes": accelerator.num_processes, "machine": machine}
            begin_run(options.out, stage, json_options(options), **fields)
        accelerator.wait_for_everyone()
        log = Log(stage, accelerator, options, steps, **settings)
        handlers = {number: signal.signal(number, log.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield log
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            log.bar.close()
            if log.file:
                log.file.close()
        if options.report_to:
            accelerator.end_training()
    accelerator.wait_for_everyone()
