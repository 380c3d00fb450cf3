"""TRL on the same backbone, rows, images and LoRA: its trainers, its collators, its loop.

The data is TRL's "standard" format, plain texts with a placeholder for each image: its own processor makes of them the
very tokens that ours are (`same_tokens`), and it is spared the chat template.
"""

import importlib.util
import time
from pathlib import Path

import ours
import workload  # noqa: F401

from hanorec.model.load import load_image_processor, load_tokenizer
from hanorec.model.lora import lora_targets
from hanorec.model.trees import separate_paths


def installed() -> bool:
    return importlib.util.find_spec("trl") is not None


def attention(device) -> str:
    """The fastest that TRL's model can have here: on a GPU flash attention, where its package is installed."""
    flash = importlib.util.find_spec("flash_attn") is not None and str(device).startswith("cuda")
    return "flash_attention_2" if flash else "sdpa"


def processor(work):
    """Qwen2.5-VL's processor for images alone: its video part needs torchvision, which has no CPU build."""
    from transformers import Qwen2_5_VLProcessor

    class ImagesOnly(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name, argument):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    tokenizer = load_tokenizer(work.folder)
    images = load_image_processor(work.folder, work.max_pixels)
    return ImagesOnly(images, tokenizer, None, chat_template=tokenizer.chat_template)


def prompt_text(work, ids: list[int]) -> str:
    """The text whose tokens are `ids`, with one placeholder for each image."""
    image, kept = work.prompts.template.image_token, []
    for token in ids:
        if token != image or not kept or kept[-1] != image:
            kept.append(token)
    return work.prompts.tokenizer.decode(kept)


def texts(work, tree) -> tuple[str, list[str], list[str]]:
    """(prompt, answers, files of its images) of a tree with one question."""
    question = [node for node in tree if node.parent is None or not node.scored]
    prompt = prompt_text(work, [token for node in question for token in node.ids])
    answers = [work.prompts.tokenizer.decode(node.ids) for node in tree if node not in question]
    return prompt, answers, [str(work.paths[item]) for node in question for item in node.images]


def dataset(examples: list[dict]):
    """A `datasets.Dataset` that opens the image files when an example is read, as one with many images must."""
    from datasets import Dataset, Features, Image, List, Value

    kinds = {name: Value("string") for name in examples[0] if name != "images"}
    features = Features(kinds | {"images": List(Image())})
    return Dataset.from_list(examples, features=features)


def settings(kind, folder, batch: int, steps: int, device, **further):
    """TRL's config of `kind`, all that costs time and is not needed switched off."""
    import torch

    on_gpu = torch.device(device).type == "cuda"
    return kind(
        output_dir=str(folder / "trl"), per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-4,
        lr_scheduler_type="cosine", max_grad_norm=1.0, max_length=None, gradient_checkpointing=False,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, seed=0, train_sampling_strategy="sequential",
        **{"bf16": False, **further},
    )  # fmt: skip


def in_batches(rows: int, kinds: int, batch: int) -> list[int]:
    """TRL's order of samples (row r's kind k is r * kinds + k): each batch of one kind, so that it pads next to
    nothing, and the kinds in turn."""
    blocks = [range(start, min(start + batch, rows)) for start in range(0, rows, batch)]
    return [row * kinds + kind for block in blocks for kind in range(kinds) for row in block]


class HeadClock:
    """Seconds that TRL spends in its head (`trl.trainer.utils._ChunkedLogProbFunction`): on a CPU it computes that for
    every position of a sequence, on a GPU for those of the answers alone."""

    def __init__(self):
        from trl.trainer import utils

        self.seconds, function = 0.0, utils._ChunkedLogProbFunction
        for name in ("forward", "backward"):
            setattr(function, name, staticmethod(self.timed(getattr(function, name))))

    def timed(self, part):
        def run(*args):
            began = time.perf_counter()
            found = part(*args)
            self.seconds += time.perf_counter() - began
            return found

        return run


def between(turns):
    """A callback of TRL's trainer that hands its step ends to a measure.Turns."""
    from transformers import TrainerCallback

    class Between(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.on_begin()

        def on_step_end(self, *args, **kwargs):
            turns.on_step_end()

    return Between()


def dpo_examples(work, kinds, batch: int) -> list[dict]:
    """The rows' pairs of these kinds, in the order of `in_batches`."""
    pairs = work.pairs(kinds)
    found = [texts(work, pairs.tree(number)) for number in in_batches(len(work.examples), len(kinds), batch)]
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": images}
        for prompt, (chosen, rejected), images in found
    ]


def sft_examples(work, tasks, batch: int) -> list[dict]:
    """A sample for each answer of the rows' trees, the title, and with `yesno` Yes and No, each behind its question; in
    the order of `in_batches`."""
    found = []
    for row in work.examples:
        for path, *_ in (path for task in tasks for path in separate_paths(work.prompts.sft_tree(row, task))):
            ids, first = path.ids, path.scored[0]
            images = [str(work.paths[item]) for item in path.images]
            answer = work.prompts.tokenizer.decode(ids[first:])
            found.append({"prompt": prompt_text(work, ids[:first]), "completion": answer, "images": images})
    return [found[number] for number in in_batches(len(work.examples), len(found) // len(work.examples), batch)]


def lora(core):
    from peft import LoraConfig

    return LoraConfig(r=ours.RANK, lora_alpha=ours.ALPHA, lora_dropout=0.0, target_modules=lora_targets(core))


def dpo_trainer(work, core, batch: int, steps: int, kinds=("rank",), device="cpu", **further):
    """DPO; the reference is the policy with its LoRA switched off, computed in every step."""
    from trl import DPOConfig, DPOTrainer

    args = settings(DPOConfig, work.folder, batch, steps, device, beta=ours.BETA, **further)
    data = dataset(dpo_examples(work, kinds, batch))
    return DPOTrainer(core, args=args, train_dataset=data, processing_class=processor(work), peft_config=lora(core))


def sft_trainer(work, core, batch: int, steps: int, tasks=("rank",), device="cpu", **further):
    """SFT, the loss on the completion alone (TRL's default for prompts with completions)."""
    from trl import SFTConfig, SFTTrainer

    args = settings(SFTConfig, work.folder, batch, steps, device, **further)
    data = dataset(sft_examples(work, tasks, batch))
    return SFTTrainer(core, args=args, train_dataset=data, processing_class=processor(work), peft_config=lora(core))


def refusal(work, core) -> str:
    """What TRL answers when asked to compute the reference once, and where."""
    try:
        dpo_trainer(work, core, 4, 1, precompute_ref_log_probs=True)
    except ValueError as error:
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        return (
            f"trl/trainer/{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}: {str(error).split('. ')[0]}"
        )
    return "accepted"


def same_tokens(batch: dict, trees: list[list], pairs: bool = False) -> bool:
    """Whether a collated batch of TRL has the tokens of these trees (their separate paths), row by row; of pairs, first
    the chosen answers, then the rejected."""
    paths = [[path for (path,) in separate_paths(tree)] for tree in trees]
    order = [path for part in (zip(*paths, strict=True) if pairs else paths) for path in part]
    kept = [row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return kept == [path.ids for path in order]
