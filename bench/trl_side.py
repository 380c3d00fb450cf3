"""TRL's trainers, collators and training loop, on the same backbone, examples, images and LoRA.

The data has TRL's "standard" format: plain texts with a placeholder for each image. TRL's own processor turns these
texts into the same tokens that this project uses (`same_tokens`). In this format TRL applies no chat template.
"""

import importlib.util
import itertools
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
    """The fastest attention that TRL's model can use: flash attention on a GPU where flash_attn is installed."""
    flash = importlib.util.find_spec("flash_attn") is not None and str(device).startswith("cuda")
    return "flash_attention_2" if flash else "sdpa"


def processor(work):
    """Qwen2.5-VL's processor for images alone. Its video part needs torchvision, which has no CPU build."""
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
    """(prompt, answers, image files of the prompt) of a tree with one question."""
    question = [node for node in tree if node.parent is None or not node.scored]
    prompt = prompt_text(work, [token for node in question for token in node.ids])
    answers = [work.prompts.tokenizer.decode(node.ids) for node in tree if node not in question]
    return prompt, answers, [str(work.paths[item]) for node in question for item in node.images]


def dataset(examples: list[dict]):
    """A `datasets.Dataset` that opens the image files when an example is read, as a large dataset must."""
    from datasets import Dataset, Features, Image, List, Value

    kinds = {name: Value("string") for name in examples[0] if name != "images"}
    features = Features(kinds | {"images": List(Image())})
    return Dataset.from_list(examples, features=features)


def settings(kind, folder, batch: int, steps: int, device, **further):
    """A config of TRL, with everything switched off that costs time and is not needed.

    Args:
        kind: DPOConfig or SFTConfig.
        further: more settings of this config.
    """
    import torch

    on_gpu = torch.device(device).type == "cuda"
    return kind(
        output_dir=str(folder / "trl"), per_device_train_batch_size=batch, max_steps=steps, learning_rate=1e-4,
        lr_scheduler_type="cosine", max_grad_norm=1.0, max_length=None, gradient_checkpointing=False,
        logging_strategy="no", save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, seed=0, train_sampling_strategy="sequential",
        **{"bf16": False, **further},
    )  # fmt: skip


def in_batches(examples: int, kinds: int, batch: int) -> list[int]:
    """The order in which TRL gets the samples: batches of one kind each, so that TRL pads next to nothing.

    The kinds take turns. The sample of example e and kind k has the number e * kinds + k.
    """
    order = []
    for start in range(0, examples, batch):
        block = range(start, min(start + batch, examples))
        for kind in range(kinds):
            order += [example * kinds + kind for example in block]
    return order


class HeadClock:
    """Counts the seconds that TRL spends in its head (`trl.trainer.utils._ChunkedLogProbFunction`).

    On a CPU, TRL computes the head for every position of a sequence; on a GPU, for the answers alone.
    """

    def __init__(self):
        from trl.trainer import utils

        self.seconds, function = 0.0, utils._ChunkedLogProbFunction
        for name in ("forward", "backward"):
            setattr(function, name, staticmethod(self.timed(getattr(function, name))))

    def timed(self, part):
        def run(*args):
            began = time.perf_counter()
            result = part(*args)
            self.seconds += time.perf_counter() - began
            return result

        return run


def between(turns):
    """A callback for TRL's trainer that calls a measure.Turns at the end of each step."""
    from transformers import TrainerCallback

    class Between(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.on_begin()

        def on_step_end(self, *args, **kwargs):
            turns.on_step_end()

    return Between()


def dpo_examples(work, kinds, batch: int) -> list[dict]:
    """The examples' pairs of these kinds for TRL, in the order of `in_batches`."""
    pairs, samples = work.pairs(kinds), []
    for number in in_batches(len(work.examples), len(kinds), batch):
        prompt, (chosen, rejected), images = texts(work, pairs.tree(number))
        samples.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": images})
    return samples


def sft_examples(work, tasks, batch: int) -> list[dict]:
    """The examples' answers for TRL, in the order of `in_batches`: the target's title; with `yesno` also Yes and No.

    Each answer is a sample of its own, with its own prompt.
    """
    samples = []
    for example in work.examples:
        for task in tasks:
            for path, *_ in separate_paths(work.prompts.sft_tree(example, task)):
                ids, first = path.ids, path.scored[0]
                images = [str(work.paths[item]) for item in path.images]
                answer = work.prompts.tokenizer.decode(ids[first:])
                samples.append({"prompt": prompt_text(work, ids[:first]), "completion": answer, "images": images})
    kinds = len(samples) // len(work.examples)
    return [samples[number] for number in in_batches(len(work.examples), kinds, batch)]


def lora(core):
    from peft import LoraConfig

    return LoraConfig(r=ours.RANK, lora_alpha=ours.ALPHA, lora_dropout=0.0, target_modules=lora_targets(core))


def dpo_trainer(work, core, batch: int, steps: int, kinds=("rank",), device="cpu", **further):
    """TRL's DPOTrainer. Its reference is the policy with LoRA switched off, computed in every step."""
    from trl import DPOConfig, DPOTrainer

    args = settings(DPOConfig, work.folder, batch, steps, device, beta=ours.BETA, **further)
    data = dataset(dpo_examples(work, kinds, batch))
    return DPOTrainer(core, args=args, train_dataset=data, processing_class=processor(work), peft_config=lora(core))


def sft_trainer(work, core, batch: int, steps: int, tasks=("rank",), device="cpu", **further):
    """TRL's SFTTrainer. Its loss is over the completion alone, TRL's default for prompts with completions."""
    from trl import SFTConfig, SFTTrainer

    args = settings(SFTConfig, work.folder, batch, steps, device, **further)
    data = dataset(sft_examples(work, tasks, batch))
    return SFTTrainer(core, args=args, train_dataset=data, processing_class=processor(work), peft_config=lora(core))


def refusal(work, core) -> str:
    """TRL's error if it is told to compute the reference once, as "file:line: message"; "accepted" without an error."""
    try:
        dpo_trainer(work, core, 4, 1, precompute_ref_log_probs=True)
    except ValueError as error:
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        name, message = Path(frame.tb_frame.f_code.co_filename).name, str(error).split(". ")[0]
        return f"trl/trainer/{name}:{frame.tb_lineno}: {message}"
    return "accepted"


def same_tokens(batch: dict, trees: list[list], pairs: bool = False) -> bool:
    """Whether a collated batch of TRL has the same tokens as these trees, in the same order.

    Args:
        batch: `input_ids` and `attention_mask` have one row for each separate path of the trees.
        pairs: whether the batch has all chosen answers first, then all rejected answers.
    """
    paths = [[path.ids for (path,) in separate_paths(tree)] for tree in trees]
    parts = zip(*paths, strict=True) if pairs else paths
    expected = list(itertools.chain.from_iterable(parts))
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [row[mask == 1].tolist() for row, mask in rows] == expected
