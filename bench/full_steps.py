"""Steps of both systems on fake tensors of the CPU, for operations.py: this project's own, and TRL's own losses."""

import contextlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import fakes
import torch
from rehearse_cuda import OPTIONS, Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dpo_hano
from hanorec.model.hars import Responsiveness
from hanorec.model.lora import lora_targets
from hanorec.model.packing import PackedMLLM
from hanorec.model.pairs import Pairs, pools
from hanorec.model.supervised import supervised_step
from hanorec.model.trees import separate_paths
from hanorec.run import training


class LocalAccelerator(Accelerator):
    """An Accelerator for fake tensors of the CPU, where autograd's own engine runs."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class FourBitProduct(torch.autograd.Function):
    """x W.T with W in 4 bits, which becomes bf16 for the product alone, as bitsandbytes computes it."""

    @staticmethod
    def forward(ctx, x, packed, scales, bias, shape):
        ctx.save_for_backward(packed, scales)
        ctx.shape = shape
        return nn.functional.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ grad.new_empty(ctx.shape), None, None, None, None


class FourBit(nn.Module):
    """Stands for bitsandbytes' Linear4bit (NF4, a float32 scale for 64 weights) in place of a linear layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        count, self.in_features, self.out_features = layer.weight.numel(), layer.in_features, layer.out_features
        self.weight = nn.Parameter(torch.empty(count // 2, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(count // 64), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        shape = (self.out_features, self.in_features)
        return FourBitProduct.apply(x, self.weight, self.scales, self.bias, shape)


def quantize(packed: PackedMLLM, mode: FakeTensorMode) -> None:
    """Replace the linear layers below LoRA by layers of 4 bits."""
    for module in packed.modules():
        if hasattr(module, "base_layer"):
            with torch.device("meta"):
                module.base_layer = fakes.to_fake(FourBit(module.base_layer), mode, "cpu")


class Case:
    """A backbone with its data, of fake tensors on the CPU."""

    def __init__(self, backbone: fakes.Backbone, folder: Path):
        self.backbone, self.folder = backbone, folder
        self.config, self.prompts, self.examples, self.tokens = fakes.make_data(folder, self.backbone)
        self.mode, self.accelerator = FakeTensorMode(allow_non_fake_inputs=True), LocalAccelerator("cpu")

    def fake(self, *shape, dtype=torch.bfloat16):
        return FakeTensor(self.mode, torch.empty(shape, dtype=dtype, device="meta"), device=torch.device("cpu"))

    def count(self, model, work, trues: dict[int, int] | None = None) -> dict:
        """Run work(). Returns its operations [TFLOP], and the peak of the memory beyond the model's weights [GiB]."""
        counting = fakes.Counting()
        counting.hold([*model.parameters(), *model.buffers()])
        weights = counting.live
        with fakes.Watch("cpu", trues), counting:
            work()
        model.zero_grad()
        return {"tflop": counting.flops / 1e12, "gib": (counting.peak - weights) / 2**30}

    def ours(self, checkpointing: bool, four_bit=False, pack=True, frozen=False) -> PackedMLLM:
        packed = fakes.packed_model(self.config, self.mode, "cpu", checkpointing, frozen=frozen)
        packed.pack = pack
        if four_bit:
            quantize(packed, self.mode)
        return packed

    def optimizer(self, packed):
        optimizer = torch.optim.AdamW(training.trained_weights(packed).values(), lr=1e-5, fused=True)
        return optimizer, training.cosine(optimizer, 100)

    def dpo(
        self, batch=1, checkpointing=True, rejected=1, four_bit=False, kinds=("rank",), history_first=False
    ) -> dict:
        """A step of dpo_hano.py over the pairs of `batch` examples, after an SFT with LoRA."""
        packed = self.ours(checkpointing, four_bit, frozen=True)
        self.prompts.history_first = history_first
        pairs = Pairs(self.prompts, self.examples, kinds, 100_000, pools(self.examples, rejected, "data"))
        hardness = torch.ones(len(pairs), rejected)
        reference = torch.zeros(len(pairs), 1 + rejected)
        pair_batch = pairs.batch(range(batch * len(kinds)), packed, self.tokens, reference, hardness)
        options, parts = SimpleNamespace(**OPTIONS), self.optimizer(packed)
        model = (packed, packed, *parts, Responsiveness("batch"), options, self.accelerator)
        return self.count(packed, lambda: dpo_hano.take_step(1, [pair_batch], *model))

    def sft(self, checkpointing=True, history_first=False) -> dict:
        """A step of sft.py over the ranking and the Yes/No answers of an example."""
        packed = self.ours(checkpointing)
        self.prompts.history_first = history_first
        trees = [self.prompts.sft_tree(self.examples[0], task) for task in ("rank", "yesno")]
        batch, parts = packed.collate(trees, self.tokens), self.optimizer(packed)
        weights = list(training.trained_weights(packed).values())
        return self.count(packed, lambda: supervised_step(packed, [batch], weights, *parts, self.accelerator))

    def evaluation(self, pack=True) -> dict:
        """The scores of an example's ten candidates: their titles, and Yes and No. Without packing, with the tower."""
        packed = self.ours(False, pack=pack).eval()
        trees = [self.prompts.evaluation_tree(self.examples[0], task) for task in ("rank", "yesno")]
        if pack:
            batch = packed.collate(trees, self.tokens)
            with torch.no_grad():
                return self.count(packed, lambda: packed(batch))
        (path,) = separate_paths(trees[0])[0]
        inputs = self.model_inputs([path.ids])
        with torch.no_grad():
            one = self.count(packed, lambda: packed.core(**inputs, use_cache=False, logits_to_keep=12))
        answers = sum(len(separate_paths(tree)) for tree in trees)  # their prompts have about the same length
        return one | {"tflop": one["tflop"] * answers}

    # TRL

    def model_inputs(self, rows: list[list[int]]) -> dict:
        """The arguments of the model's own forward, with the pixels of 5 images in each row."""
        length, images = max(map(len, rows)), 5 * len(rows)
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        valid = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": valid}
        if not any(self.backbone.grid):  # LLaVA-NeXT: the whole image and two tiles
            inputs |= {"pixel_values": self.fake(images, 3, 3, 336, 336), "image_sizes": torch.full((images, 2), 512)}
            return inputs
        _, height, width = self.backbone.grid
        patch = 3 * 2 * (self.backbone.vision.get("patch_size") or 14) ** 2
        inputs |= {"pixel_values": self.fake(images * height * width, patch)}
        inputs |= {"image_grid_thw": torch.tensor([self.backbone.grid] * images)}
        return inputs | {"mm_token_type_ids": (ids == self.config.image_token_id).int()}

    def trl_model(self, checkpointing: bool, outputs: tuple[str, ...]):
        """A policy as TRL's trainers make it: PEFT's LoRA in float32 on the model in bf16, with TRL's own head."""
        from peft import LoraConfig, get_peft_model
        from trl.trainer.utils import add_fused_lm_head

        with torch.device("meta"):
            core = fakes.meta_model(self.config)
            settings = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=lora_targets(core))
            add_fused_lm_head(core, outputs=outputs)
            model = get_peft_model(core, settings)
        fakes.to_fake(model, self.mode, "cpu")
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model.train()

    def trl_step(self, model, loss_of, rows: list[list[int]], firsts: list[int]) -> dict:
        """Count forward, backward and AdamW of TRL. firsts: where each row's answer begins."""
        inputs = self.model_inputs(rows)
        scored = torch.zeros_like(inputs["input_ids"])
        for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            scored[number, first : len(row)] = 1
        halves = [scored, *scored.chunk(2)]
        trues = {part[:, 1:].numel(): int(part[:, 1:].sum()) for part in halves}
        trues[scored.numel()] = int((inputs["input_ids"] == self.config.image_token_id).sum())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

        def work():
            with torch.autocast("cpu", dtype=torch.bfloat16), trl_head_of_a_gpu():
                loss = loss_of(model, inputs | {"completion_mask": scored})
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()

        return self.count(model, work, trues)

    def trl_dpo(self, checkpointing=True, kinds=("rank",)) -> dict:
        """A step of TRL's DPOTrainer: its own `_compute_loss`, which runs policy and reference over pixels.

        The pairs of an example are one batch, padded to the longest.
        """
        model = self.trl_model(checkpointing, ("log_probs", "entropy", "mean_logits", "is_top1"))
        trees = [self.prompts.pair_tree(self.examples[0], kind) for kind in kinds]
        paths = [[path for (path,) in separate_paths(tree)] for tree in trees]
        ordered = [path for number in (0, 1) for path in (pair[number] for pair in paths)]
        rows, firsts = [path.ids for path in ordered], [path.scored[0] for path in ordered]
        return self.trl_step(model, trl_dpo_loss, rows, firsts)

    def trl_sft(self, checkpointing=True) -> dict:
        """A step of TRL's SFTTrainer over the three answers of an example, a row each, with its loss."""
        model = self.trl_model(checkpointing, ("log_probs", "entropy", "is_top1"))
        trees = [self.prompts.sft_tree(self.examples[0], task) for task in ("rank", "yesno")]
        paths = [path for tree in trees for (path,) in separate_paths(tree)]
        return self.trl_step(model, trl_sft_loss, [path.ids for path in paths], [path.scored[0] for path in paths])


@contextlib.contextmanager
def trl_head_of_a_gpu():
    """Let TRL compute its head for the answers alone, as on a GPU; on a CPU it computes every position."""
    from trl.trainer import utils

    before, utils._use_triton = utils._use_triton, lambda device: True
    try:
        yield
    finally:
        utils._use_triton = before


def trl_dpo_loss(model, inputs: dict):
    from trl import DPOTrainer

    same = lambda values: values  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), unwrap_model=same, gather=same, gather_for_metrics=same)
    trainer = SimpleNamespace(model=model, ref_model=None, accelerator=accelerator, args=SimpleNamespace())
    trainer.args.gradient_checkpointing_kwargs = None
    settings = {"aux_loss_enabled": False, "ld_alpha": None, "precompute_ref_logps": False, "use_weighting": False}
    settings |= {"f_divergence_type": "reverse_kl", "loss_types": ["sigmoid"], "loss_weights": [1.0], "beta": 0.1}
    settings |= {"_total_train_tokens": 0, "_tp_size": 1, "_metrics": defaultdict(lambda: defaultdict(list))}
    vars(trainer).update(settings)
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


def trl_sft_loss(model, inputs: dict):
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    kept = {name: value for name, value in inputs.items() if name != "completion_mask"}
    outputs = model(**kept, labels=labels, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()
