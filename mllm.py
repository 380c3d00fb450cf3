"""The multimodal LLM as the stages share it: load, encode items, pack prompt trees (prompts.py), score answers.

Two ideas carry the speed. (1) A prompt is computed once for all its answers: history, question and answers form a tree,
laid end to end in one row, in which a token attends to its own node and that node's ancestors only, and positions
continue from the parent's end. (2) The vision tower is frozen, so each image is encoded once, by `encode_items`, and
read back from a memory map as image tokens.

`PackedMLLM.forward` goes from a batch to the answers' log-probabilities; that module is what `accelerator.prepare`
wraps, because calling parts of it by hand would train every process for itself.
"""

import json
import struct
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TINY = "tiny"
TINY_MAX_PIXELS = 6272  # eight image tokens of 28 x 28 pixels: the tiny backbone is for laptops
MAX_PIXELS = 262144  # the paper's image_max_pixels


class BackboneError(ValueError):
    """A backbone, an encoding or an image that cannot be used; the message says what, where and what to do."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------------------------------
# The model


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava_next")  # whose packed forward is tested against their own


def load_model(name: str | Path, dtype: torch.dtype | None = None):
    """The pretrained image-text model `name` (a hub name or a folder) in `dtype` (float32), everything frozen."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving; the scripts' own bars stay
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's
    family = load_config(name).model_type
    if family not in FAMILIES:
        raise BackboneError(f"backbone '{name}' is a {family}; packing is tested for {', '.join(FAMILIES)} alone")
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype or torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(f"backbone '{name}' cannot be loaded as an image-text model: {reason}") from error
    return model.requires_grad_(False).eval()


def pick_dtype(name: str, accelerator) -> torch.dtype:
    """--dtype as a torch dtype; auto is bf16 on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "bfloat16" if accelerator.device.type == "cuda" else "float32"
    return getattr(torch, name)


def load_config(name: str | Path):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackboneError(f"backbone '{name}' cannot be loaded: {reason}") from error


def load_tokenizer(name: str | Path):
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BackboneError(f"'{name}' has no usable tokenizer: {str(error).strip().splitlines()[0]}") from error
    if not tokenizer.chat_template:  # older repositories keep it with the processor alone
        path = cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        tokenizer.chat_template = json.loads(Path(path).read_text())["chat_template"] if path else None
    return tokenizer


def load_image_processor(name: str | Path, max_pixels: int):
    """The image processor of `name`, set so that it keeps every image within max_pixels pixels."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it at the top

    try:
        images = AutoImageProcessor.from_pretrained(name, backend="pil")  # torchvision has no CPU build
    except (OSError, ValueError) as error:
        raise BackboneError(f"'{name}' has no usable image processor: {str(error).strip().splitlines()[0]}") from error
    pinpoints = getattr(images, "image_grid_pinpoints", None)
    if pinpoints:  # LLaVA-NeXT counts in whole tiles: those that fit, or the smallest
        fitting = [p for p in pinpoints if p[0] * p[1] <= max_pixels]
        images.image_grid_pinpoints = fitting or [min(pinpoints, key=lambda p: p[0] * p[1])]
    else:
        images.size = {"shortest_edge": min(56 * 56, max_pixels), "longest_edge": max_pixels}
    return images


def lora_targets(model) -> str:
    """A regular expression over the language model's linear layers. Suffix lists, and peft's `all-linear`, also hit the
    vision tower."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".language_model." in f".{n}"]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    return rf".*\blanguage_model\..*\.({'|'.join(leaves)})"


def add_lora(model, rank: int, alpha: int, dropout: float, seed: int):
    """`model` with a fresh, trainable LoRA on every linear layer of its language model; the draw depends on seed."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=lora_targets(model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def load_adapter(model, folder: str | Path, merge: bool = True):
    """`model` with the LoRA adapter of `folder`, merged into its weights (in the dtype they have) or beside them."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, str(folder)).requires_grad_(False).eval()
    return model.merge_and_unload() if merge else model


# ---------------------------------------------------------------------------------------------------------------------
# Items: titles, and image tokens encoded once


class Catalogue:
    """The items of a data folder: ids, titles, and their encoded images by row. Rows are line numbers of items.jsonl.

    items: the lines of items.jsonl. encoded: a folder written by `encode_items`, or None for texts alone.
    blank_images: every image is replaced by one neutral grey image.
    """

    def __init__(self, items: list[dict], encoded: Path | None = None, blank_images: bool = False):
        self.ids = [item["item"] for item in items]
        self.titles = [item["title"] for item in items]
        self.row_of = {item: row for row, item in enumerate(self.ids)}
        self.blank_images = blank_images
        if encoded is not None:
            from safetensors.torch import load_file

            self.vectors = load_file(encoded / "items.safetensors")  # text, image, offsets, grid, neutral, ...
            self.tokens = load_file(encoded / "image_tokens.safetensors")["image_tokens"]  # [sum n_i, d], memory map
            self.offsets = self.vectors["offsets"].tolist()

    def has_image(self, row: int) -> bool:
        return self.offsets[row + 1] > self.offsets[row]

    def image_length(self, row: int) -> int:
        """Image tokens of the item's image, 0 without one."""
        if self.has_image(row) and self.blank_images:
            return len(self.vectors["neutral"])
        return self.offsets[row + 1] - self.offsets[row]

    def image_tokens(self, row: int) -> torch.Tensor:
        """[n, d] of an item that has an image."""
        return self.vectors["neutral"] if self.blank_images else self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def image_means(self) -> torch.Tensor:
        """[N, d] float32: the mean image token of each item, zeros without an image."""
        means = self.vectors["image"]
        if not self.blank_images:
            return means
        return (means.abs().sum(-1, keepdim=True) > 0) * self.vectors["neutral"].float().mean(0)

    def grid(self, row: int) -> torch.Tensor:
        """[3], time, height and width in patches; zeros where the backbone's positions need none."""
        return self.vectors["neutral_grid"] if self.blank_images else self.vectors["grid"][row]


def open_image(path: Path):
    """The RGB image at `path`, upright; BackboneError if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if max(image.size) > 150 * min(image.size):
                raise ValueError(f"{image.width} x {image.height} is too narrow")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BackboneError(
            f"image {path} cannot be read ({error}); mend it, or delete it: then its item has none"
        ) from error


@torch.inference_mode()
def encode_images(model, image_processor, images: list) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Image tokens of PIL images: a list of [n_i, d], and the grids [len(images), 3] (zeros where none are needed)."""
    pinpoints = getattr(image_processor, "image_grid_pinpoints", None)
    if pinpoints:
        model.config.image_grid_pinpoints = pinpoints  # the model derives the tiles anew and must agree
    inputs = image_processor(images=images, return_tensors="pt").to(model.device)
    tokens = model.get_image_features(**inputs, return_dict=True).pooler_output
    grids = inputs.get("image_grid_thw", torch.zeros(len(images), 3, dtype=torch.long))
    return [t.detach().cpu() for t in tokens], grids.cpu()


def mean_embeddings(model, tokenizer, titles: list[str]) -> torch.Tensor:
    """[N, d] float32: the mean of the input-embedding rows of each title's tokens (zeros for an empty title)."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    ids = [tokenizer.encode(t, add_special_tokens=False, split_special_tokens=True) for t in titles]
    return torch.stack([table[i].mean(0) if i else table.new_zeros(table.shape[1]) for i in ids])


def encode_items(
    model, tokenizer, image_processor, titles, paths: list[Path | None], folder: Path, progress=iter
) -> None:
    """Encode every item once into `folder`: items.safetensors (text and image [N, d], offsets [N + 1], grid [N, 3], the
    neutral image) and image_tokens.safetensors ([sum n_i, d], in the model's dtype, written as it is computed).

    progress: wraps the iterable of batches. Raises BackboneError on an unreadable image.
    """
    from PIL import Image
    from safetensors.torch import save_file

    rows = [row for row, path in enumerate(paths) if path is not None]
    width = model.get_input_embeddings().weight.shape[1]
    lengths, image_means = torch.zeros(len(paths), dtype=torch.long), torch.zeros(len(paths), width)
    grid = torch.zeros(len(paths), 3, dtype=torch.long)
    with open(folder / "image_tokens.safetensors", "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for batch in progress([rows[i : i + 16] for i in range(0, len(rows), 16)]):
            tokens, grids = encode_images(model, image_processor, [open_image(paths[row]) for row in batch])
            for row, item_tokens, item_grid in zip(batch, tokens, grids, strict=True):
                lengths[row], grid[row], image_means[row] = len(item_tokens), item_grid, item_tokens.float().mean(0)
                file.write(item_tokens.contiguous().view(torch.uint8).numpy().tobytes())
        file.seek(0)
        file.write(safetensors_header("image_tokens", model.dtype, [int(lengths.sum()), width]))
    neutral, neutral_grid = encode_images(model, image_processor, [Image.new("RGB", (112, 112), (128, 128, 128))])
    tensors = {"text": mean_embeddings(model, tokenizer, titles), "image": image_means, "grid": grid}
    tensors |= {"offsets": F.pad(lengths.cumsum(0), (1, 0)), "neutral": neutral[0], "neutral_grid": neutral_grid[0]}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "items.safetensors")


HEADER_BYTES = 256  # reserved at the file's head, so that tokens are streamed to disk before their number is known


def safetensors_header(name: str, dtype: torch.dtype, shape: list[int]) -> bytes:
    """The head of a safetensors file of one tensor, padded with spaces (as the format allows) to HEADER_BYTES."""
    code = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    entry = {"dtype": code, "shape": shape, "data_offsets": [0, shape[0] * shape[1] * dtype.itemsize]}
    return struct.pack("<Q", HEADER_BYTES - 8) + json.dumps({name: entry}).encode().ljust(HEADER_BYTES - 8)


# ---------------------------------------------------------------------------------------------------------------------
# Packing and scoring


def merge_trees(trees: Iterable[list]) -> list[tuple[list, list[int]]]:
    """Join neighbouring trees with the same root, so that their history is computed once. Returns (tree, the numbers of
    the answers in it), answers numbered over all trees in order."""
    merged, number = [], 0
    for tree in trees:
        answers = [i for i, node in enumerate(tree) if node.scored]
        numbers = list(range(number, number + len(answers)))
        number += len(answers)
        root = merged[-1][0][0] if merged else None
        if root and (root.ids, root.images) == (tree[0].ids, tree[0].images) and not tree[0].scored:
            shift = len(merged[-1][0]) - 1
            moved = [replace(node, parent=node.parent + shift if node.parent else 0) for node in tree[1:]]
            merged[-1] = (merged[-1][0] + moved, merged[-1][1] + numbers)
        else:
            merged.append((list(tree), numbers))
    return merged


class PackedMLLM(nn.Module):
    """A batch of prompt trees in, the log-probabilities of their answers out.

    model: an image-text model of transformers (or its PeftModel), with `sdpa` attention; the vision tower is not used.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.checkpointing, self.dropout = False, 0.0
        config = self.core.config
        if config.get_text_config()._attn_implementation != "sdpa":
            raise BackboneError("packing needs attn_implementation='sdpa': others read the tree's mask wrongly")
        text = config.get_text_config()
        self.window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None

    def set_dropout(self, probability: float) -> None:
        """Dropout of the embeddings and of what each attention and MLP block adds, while training."""
        self.dropout = probability
        for name, module in self.core.model.language_model.named_modules():
            if probability and name.endswith(("self_attn.o_proj", "mlp.down_proj")):
                module.register_forward_hook(lambda layer, _, out: F.dropout(out, probability, layer.training))

    def enable_checkpointing(self, reentrant: bool = False) -> None:
        """Recompute activations in backward; training mode only."""
        self.checkpointing = True
        model = self.core.model.language_model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})

    @property
    def core(self):
        """The image-text model itself, without PEFT's wrapper; LoRA layers are inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def positions(self, ids: list[int], grids: list[torch.Tensor]) -> torch.Tensor:
        """[P, len(ids)] positions from 0; P = 3 where the backbone has multimodal positions, else 1."""
        if not hasattr(self.core.model, "get_rope_index"):
            return torch.arange(len(ids))[None]
        if not grids:
            return torch.arange(len(ids)).expand(3, -1)
        ids = torch.tensor([ids])
        kinds = (ids == self.core.config.image_token_id).int()
        return self.core.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=torch.stack(grids))[0][:, 0]

    def collate(self, trees: Iterable[list], catalogue: Catalogue) -> dict[str, torch.Tensor]:
        """Pack trees (neighbours with the same root share it) into one right-padded batch of tensors.

        input_ids, node [B, L]; visible [B, nodes, nodes], True where a node's ancestor-or-self; position_ids [P, B, L];
        image_tokens [all, d]; of each scored token: predicted_from (flat index of the token before it), target,
        answer (its answer's number); answers [A], tokens per answer.
        """
        merged = merge_trees(trees)
        length = max(sum(len(node.ids) for node in tree) for tree, _ in merged)
        nodes = max(len(tree) for tree, _ in merged) + 1  # the last one is padding
        input_ids = torch.zeros(len(merged), length, dtype=torch.long)
        node_of = torch.full((len(merged), length), nodes - 1)
        visible = torch.eye(nodes, dtype=torch.bool).repeat(len(merged), 1, 1)
        positions, images, counts = None, [], []
        scored: list[tuple[int, int, int]] = []  # predicted_from, target, answer
        for row, (tree, numbers) in enumerate(merged):
            starts, nexts, start, numbers = [], [], 0, iter(numbers)
            for index, node in enumerate(tree):
                end = start + len(node.ids)
                grids = [catalogue.grid(item) for item in node.images]
                local = self.positions(node.ids, grids) + (nexts[node.parent] if index else 0)
                positions = local.new_zeros(len(local), len(merged), length) if positions is None else positions
                positions[:, row, start:end] = local
                input_ids[row, start:end] = torch.tensor(node.ids)
                node_of[row, start:end] = index
                if index:
                    visible[row, index] |= visible[row, node.parent]
                before = starts[node.parent] + len(tree[node.parent].ids) - 1 if index else -1
                answer = next(numbers) if node.scored else None
                scored += [(row * length + (start + t - 1 if t else before), node.ids[t], answer) for t in node.scored]
                counts += [(answer, len(node.scored))] if node.scored else []
                tokens = [catalogue.image_tokens(item) for item in node.images]
                if node.ids.count(self.core.config.image_token_id) != sum(map(len, tokens)):
                    names = [catalogue.ids[item] for item in node.images]
                    raise BackboneError(f"image placeholders and image tokens disagree in a prompt with items {names}")
                images += tokens
                if self.window and int(local.max()) >= self.window:
                    raise BackboneError(
                        f"a prompt is longer than the backbone's sliding window of {self.window} tokens"
                    )
                starts.append(start)
                nexts.append(int(local.max()) + 1)
                start = end
        predicted_from, target, answer = torch.tensor(scored).reshape(-1, 3).T
        batch = {"input_ids": input_ids, "node": node_of, "visible": visible, "position_ids": positions}
        batch |= {"predicted_from": predicted_from, "target": target, "answer": answer}
        batch["answers"] = torch.tensor([count for _, count in sorted(counts)])
        batch["image_tokens"] = torch.cat(images) if images else torch.zeros(0, 0)
        return batch

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the batch's answers, summed over their tokens: [A], float32. See `collate`."""
        core, ids, node = self.core, batch["input_ids"], batch["node"]
        embeds = core.get_input_embeddings()(ids)
        if batch["image_tokens"].numel():
            place = (ids == core.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(place, batch["image_tokens"].to(embeds.dtype))
        embeds = F.dropout(embeds, self.dropout, self.training)
        if self.checkpointing and torch.is_grad_enabled():
            embeds.requires_grad_(True)  # reentrant checkpointing drops gradients of a block without such an input
        rows = torch.arange(len(ids), device=ids.device)[:, None, None]
        mask = batch["visible"][rows, node[:, :, None], node[:, None, :]].tril()[:, None]  # [B, 1, L, L], True: attends
        positions = batch["position_ids"]
        hidden = core.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions[0] if len(positions) == 1 else positions,
            use_cache=False,
        ).last_hidden_state
        # The head only where an answer is predicted, never over the prompt
        logits = core.lm_head(hidden.flatten(0, 1)[batch["predicted_from"]]).float()
        logps = -F.cross_entropy(logits, batch["target"], reduction="none")
        return logps.new_zeros(len(batch["answers"])).index_add(0, batch["answer"], logps)
