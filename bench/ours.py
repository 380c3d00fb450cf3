"""This project's training steps, as the loops of dpo_hano.py and sft.py take them."""

import time
from types import SimpleNamespace

import torch
import workload  # noqa: F401 (puts the project on the path)
from peft import LoraConfig, get_peft_model

import dpo_hano
from hanorec.model.lora import FROZEN, add_lora, lora_targets
from hanorec.model.packing import Batch, PackedMLLM
from hanorec.model.pairs import PairBatch
from hanorec.model.reference import reference_logps
from hanorec.model.samples import Samples
from hanorec.model.supervised import supervised_step
from hanorec.run import training
from hanorec.run.launch import start_accelerator

BETA, RANK, ALPHA = 0.1, 8, 32  # the paper's. LoRA's dropout is 0, so that both systems compute the same loss


def trainable(core, pack: bool = True, seed: int = 1) -> PackedMLLM:
    """The backbone with a fresh LoRA on its language model."""
    return PackedMLLM(add_lora(core, RANK, ALPHA, 0.0, seed), pack)


def with_sft_adapter(core):
    """The backbone with a frozen LoRA as SFT's, which `add_lora` leaves below DPO's. Returns the PeftModel."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=lora_targets(core))
    return get_peft_model(core, config, adapter_name=FROZEN)


def randomize(model, seed: int = 2, std: float = 0.05) -> None:
    """Draw LoRA's matrices anew, in the order of their names.

    In a fresh LoRA the matrix B is zero, and every DPO loss is log 2.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator).mul(std).to(weight)


class Steps:
    """The part that both stages share: batches in training order, optimizer, schedule.

    Args:
        work: a workload.Workload.
        packed: the PackedMLLM to train.
        batch: samples in a micro-batch.
        per_example: samples that an example gives.
    """

    def __init__(self, work, packed, batch: int, per_example: int, seed: int = 42):
        self.work, self.accelerator = work, start_accelerator()
        self.packed = packed.to(self.accelerator.device)
        self.parameters = [p for p in packed.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.schedule = training.cosine(optimizer, 10_000)
        self.model, self.optimizer = self.accelerator.prepare(packed, optimizer)
        shape = {"processes": self.accelerator.num_processes, "rank": self.accelerator.process_index, "seed": seed}
        batches = training.micro_batches(len(work.examples), per_example, batch, 1, **shape)
        self.loaded = training.loaded(self.load, batches, 0, self.accelerator.device)

    def collate(self, trees) -> Batch:
        return self.packed.collate(trees, self.work.tokens)


class Dpo(Steps):
    """Steps of dpo_hano.py.

    Args:
        kinds: the kinds of pairs, of rank, yes and no. rejected: rejected answers of a ranking pair.
        plain: take plain DPO steps as TRL does, without hardness, responsiveness and noise. Otherwise HaNoRec's.
    """

    def __init__(self, work, packed, batch: int, kinds=("rank",), plain: bool = False, rejected: int = 1):
        super().__init__(work, packed, batch, len(kinds))
        self.pairs = work.pairs(kinds, rejected)
        self.options = SimpleNamespace(beta=BETA, sigma=0.0 if plain else 0.05, noise="relative", seed=42)
        self.options.objective, self.options.sft_weight = "dpo", 0.0
        self.eta = dpo_hano.Responsiveness("none" if plain else "batch")
        self.hardness = torch.ones(len(self.pairs), rejected)
        numbers, began = list(range(len(self.pairs))), time.perf_counter()
        run = SimpleNamespace(sft=work.folder / f"reference{work.max_pixels}-{len(kinds)}-{rejected}", quantize=None)
        self.reference = reference_logps(self.packed, work, self.pairs, numbers, {}, run, self.accelerator)
        self.reference_seconds = (time.perf_counter() - began) / len(self.pairs)

    def micro(self, chosen: list[int]) -> PairBatch:
        """The micro-batch of the pairs with these numbers."""
        return self.pairs.batch(chosen, self.packed, self.work.tokens, self.reference, self.hardness)

    def load(self, step: int, numbers: list[list[int]]) -> list[PairBatch]:
        return [self.micro(chosen) for chosen in numbers]

    def step(self) -> torch.Tensor:
        step, _, micro = next(self.loaded)
        metrics = dpo_hano.take_step(
            step,
            micro,
            self.model,
            self.packed,
            self.optimizer,
            self.schedule,
            self.eta,
            self.options,
            self.accelerator,
        )
        return metrics["loss"]


class Sft(Steps):
    """Steps of sft.py."""

    def __init__(self, work, packed, batch: int, tasks=("rank", "yesno")):
        super().__init__(work, packed, batch, len(tasks))
        self.answers = Samples(work.prompts, work.prompts.sft_tree, work.examples, tasks, 100_000)

    def load(self, step: int, numbers: list[list[int]]) -> list[Batch]:
        return [self.collate([self.answers.tree(n) for n in chosen]) for chosen in numbers]

    def step(self) -> torch.Tensor:
        self.model.train()
        _, _, micro = next(self.loaded)
        return supervised_step(self.model, micro, self.parameters, self.optimizer, self.schedule, self.accelerator)[0]
