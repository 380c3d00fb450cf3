"""Rehearse training, evaluation and generation on CUDA without a GPU: python bench/rehearse_cuda.py

Takes a PyTorch that is built for CUDA (on Linux the ordinary package of the registry) on any machine; minutes for each
backbone. The models have their published sizes, in bf16 with LoRA, and are made of fake tensors on `cuda`. Fake tensors
have no values and take no memory. Nothing is downloaded.

Reports for each backbone and part each operation that mixes tensors of the CPU and of the GPU, and each place where the
host waits for the GPU. In training the log alone may wait and read, once a step, for the metrics of the step before.
The exit status is 1 if there is a mix, a wait that ALLOWED does not name, a read outside the log, or if the log waits
more often than there are steps. With a PyTorch that is built for the CPU, the same runs on fake tensors of the CPU. It
then shows the waits for values, also for those that lie on the host in any case, and neither mixes nor copies.

Not rehearsed: loading a model with its check, the reference, and the item vectors of HaRS. They run once, before the
first step. A real GPU is still needed for: the kernels and their results, speed, and several processes.
"""

import argparse
import contextlib
import sys
import tempfile
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fakes
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

import dpo_hano
from hanorec.model.hars import Responsiveness
from hanorec.model.pairs import Pairs, pools
from hanorec.model.samples import Samples
from hanorec.model.supervised import supervised_step
from hanorec.ranking.scoring import score_examples
from hanorec.run import training
from hanorec.run.log import Log
from mllm_srec.writers import Local

OPTIONS = {"beta": 0.1, "sigma": 0.1, "noise": "relative", "objective": "dpo", "sft_weight": 0.0, "seed": 42}
OPTIONS |= {"report_to": None, "lr": 1e-5}
LOG = "hanorec/run/log.py"
# The places that may wait, (part, the place's beginning), and why
ALLOWED = {
    ("evaluation", "hanorec/ranking/scoring.py"): "the scores, after the last batch",
    ("generation", "transformers/"): "transformers' generate looks for the end of the texts after each token",
    ("generation", "hanorec/model/families.py"): "the prompts, once a batch",
    ("generation", "mllm_srec/writers.py"): "the prompts and the texts, once a batch",
}


def reason_to_wait(part: str, place: str) -> str:
    """Why a part may wait at this place; "" if it may not."""
    reasons = [reason for (name, start), reason in ALLOWED.items() if name == part and place.startswith(start)]
    return reasons[0] if reasons else ""


class Accelerator:
    """accelerate's Accelerator for one process, as far as the stages use it, on a device of fake tensors."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: str):
        self.device = torch.device(device)

    def backward(self, loss: torch.Tensor) -> None:
        fakes.backward(loss)

    def clip_grad_norm_(self, weights, norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(list(weights), norm)

    def gather(self, values):
        return values

    def reduce(self, values, reduction="sum"):
        return values

    def print(self, *args, **kwargs) -> None:
        pass

    no_sync = staticmethod(contextlib.nullcontext)
    autocast = staticmethod(contextlib.nullcontext)


class Event:
    """Stands for a torch.cuda.Event, which needs a GPU. Counts the waits for it.

    Args:
        watch: the Watch that counts.
    """

    def __init__(self, watch: fakes.Watch):
        self.watch = watch

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        self.watch.waits["an event", fakes.place()] += 1


class Generator(torch.Generator):
    """Stands for a torch.Generator on any device. It is on the CPU; operations on fake tensors draw no numbers."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.stated = torch.device(device)
        return generator

    @property
    def device(self) -> torch.device:
        return self.stated


@contextlib.contextmanager
def without_gpu(watch: fakes.Watch):
    """Replace what PyTorch refuses without a GPU: events, generators, dropout's seeds."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "Event", partial(Event, watch)))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext()))
        yield


class Rehearsal:
    """One backbone on a device of fake tensors, with SFT's frozen LoRA below the trained one, in all parts.

    Args:
        name: a key of fakes.BACKBONES.
    """

    def __init__(self, name: str, device: str, folder: Path):
        self.folder, self.device = folder, device
        self.config, self.prompts, self.examples, self.tokens = fakes.make_data(folder, fakes.BACKBONES[name])
        self.mode, self.accelerator = FakeTensorMode(allow_non_fake_inputs=True), Accelerator(device)
        self.packed = fakes.packed_model(self.config, self.mode, device, checkpointing=True, frozen=True)
        self.real_collate, self.packed.collate = self.packed.collate, self.collate
        self.weights = list(training.trained_weights(self.packed).values())
        self.images = None

    def collate(self, trees, tokens):
        """Collate on real tensors, as the loader's thread does. Returns a batch of fake tensors on the CPU."""
        with _disable_current_modes():
            batch = self.real_collate(trees, tokens)
        self.watch.trues[len(batch.input_ids)] = len(batch.image_tokens)
        return self.fake(batch)

    def fake(self, batch):
        """Return the batch with fake tensors in place of real ones."""
        return type(batch)(**tree_map_only(torch.Tensor, self.mode.from_tensor, dict(vars(batch))))

    def optimizer(self):
        optimizer = torch.optim.AdamW(self.weights, lr=1e-5, fused=self.device == "cuda")
        return optimizer, training.cosine(optimizer, 100)

    def dpo(self, kinds=("rank", "yes", "no"), rejected: int = 1, steps=(1, 2), eta: str = "batch", **changes) -> None:
        """Steps of dpo_hano.py with its log. eta: --responsiveness. changes: other options than OPTIONS."""
        with _disable_current_modes():
            pairs = Pairs(self.prompts, self.examples, kinds, 100_000, pools(self.examples, rejected, "data"))
            hardness = torch.ones(len(pairs), rejected)
            real = SimpleNamespace(collate=self.real_collate)
            batch = pairs.batch(range(3), real, self.tokens, torch.cat([hardness[:, :1], hardness], 1), hardness)
        self.watch.trues[len(batch.trees.input_ids)] = len(batch.trees.image_tokens)
        batch.trees = self.fake(batch.trees)
        batch, response = self.fake(batch), Responsiveness(eta)
        options, (optimizer, schedule) = SimpleNamespace(**OPTIONS | changes, out=self.folder), self.optimizer()
        model = (self.packed, self.packed, optimizer, schedule, response, options, self.accelerator)
        log = Log("dpo_hano", self.accelerator, options, max(steps))
        for step in steps:
            log.step(step, dpo_hano.take_step(step, [batch], *model), pairs.users[:3])
            self.watch.steps += 1
        log.flush()
        log.file.close()

    def s_dpo(self) -> None:
        """A step with nine rejected answers."""
        self.dpo(("rank",), 9, steps=(1,))

    def controls(self) -> None:
        """Steps without noise, with noise on the embeddings, and with other kinds of eta."""
        self.dpo(steps=(1,), eta="none", sigma=0.0, objective="softmax", sft_weight=0.1)
        self.dpo(rejected=9, steps=(1,), eta="ema", noise="embeddings")

    def noise_effect(self) -> None:
        """A step that measures what the noise does."""
        self.dpo(steps=(dpo_hano.NOISE_EFFECT_EVERY,))

    def sft(self) -> None:
        """Steps of sft.py with its log."""
        samples = Samples(self.prompts, self.prompts.sft_tree, self.examples, ["rank", "yesno"], 100_000)
        options, (optimizer, schedule) = SimpleNamespace(**OPTIONS, out=self.folder), self.optimizer()
        log = Log("sft", self.accelerator, options, 2)
        for step in (1, 2):
            self.packed.train()
            batch = self.collate([samples.tree(number) for number in range(2)], self.tokens)
            loss, norm = supervised_step(self.packed, [batch], self.weights, optimizer, schedule, self.accelerator)
            log.step(step, {"loss": loss, "grad_norm": norm, "lr": 1e-5}, samples.users[:2])
            self.watch.steps += 1
        log.flush()
        log.file.close()

    def evaluation(self) -> None:
        """Two batches of two examples with ten candidates, titles and Yes/No."""
        encoding = SimpleNamespace(tiny=False, tokens=self.tokens)
        options = {"tasks": ["rank", "yesno"], "max_length": 100_000}
        score_examples(self.packed, encoding, self.prompts, self.examples[:4], options, self.accelerator)

    def generation(self) -> None:
        """Two texts of four tokens from image tokens. Positions, which need real tokens, are replaced."""
        core = self.packed.core
        local = Local(core, self.prompts, self.tokens, 4, 2)
        if hasattr(core.model, "get_rope_index"):

            def positions(ids, *args, **kwargs):
                return ids.new_zeros(3, *ids.shape), ids.new_zeros(len(ids), 1)

            core.model.get_rope_index = positions
        local.generate([self.prompts.complete_prompt(["Describe this film.", 0]) for _ in range(2)])

    def part(self, name: str) -> tuple[fakes.Watch, str]:
        """Run a part. Returns (what was seen, why it stopped, or "")."""
        self.watch, stopped = fakes.Watch(self.device), ""
        mode = self.mode if self.device == "cuda" else contextlib.nullcontext()
        try:
            with without_gpu(self.watch), mode, self.watch:
                getattr(self, name)()
        except Exception as error:  # each part is reported, whatever another one raised
            last = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename][-1]
            stopped = f"{type(error).__name__} at {last.filename}:{last.lineno}: {str(error).splitlines()[0]}"
        self.packed.zero_grad()
        return self.watch, stopped


PARTS = ("dpo", "s_dpo", "controls", "noise_effect", "sft", "evaluation", "generation")


def report(backbone: str, part: str, watch: fakes.Watch, stopped: str) -> bool:
    """Print what a part showed. Returns whether it is as it should be."""
    log_waits = sum(count for (_, place), count in watch.waits.items() if place.startswith(LOG))
    good = not watch.mixed and not stopped and log_waits <= watch.steps
    print(f"{backbone}, {part}: {'stopped: ' + stopped if stopped else 'done'}")
    for (operation, place), count in watch.mixed.items():
        print(f"    mixed devices, {count} times: {operation} at {place}")
    if log_waits:
        mark = "WAITS: " if log_waits > watch.steps else ""
        print(f"    {mark}the log waits {log_waits} times in {watch.steps} steps")
    allowed = Counter()
    for (reason, place), count in watch.waits.items():
        if place.startswith(LOG):
            continue
        if why := reason_to_wait(part, place):
            allowed[why] += 1
        else:
            good = False
            print(f"    WAIT, {count} times: {reason} at {place}")
    for why, places in allowed.items():
        print(f"    allowed, at {places} places: {why}")
    for (reason, place), count in watch.reads.items():
        allowed_read = place.startswith(LOG)
        good &= allowed_read
        print(f"    {'' if allowed_read else 'READ, '}{count} times: {reason} at {place}")
    return good


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=fakes.BACKBONES, default=list(fakes.BACKBONES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(argv)
    device, good = "cuda" if torch.version.cuda else "cpu", True
    print(f"PyTorch {torch.__version__}, fake tensors on {device}")
    for name in options.backbones:
        with tempfile.TemporaryDirectory() as folder:
            rehearsal = Rehearsal(name, device, Path(folder))
            for part in options.parts:
                good &= report(name, part, *rehearsal.part(part))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
