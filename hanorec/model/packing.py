"""Prompt trees scored by a multimodal LLM: packed into rows, or one plain forward for each answer.

A prompt is computed once for all its answers. History, question and answers form a tree, laid end to end in one row. A
token attends to its own node and that node's ancestors only, and positions continue from the parent's end.

`PackedMLLM.forward` goes from a batch to the answers' log-probabilities. That module is what `accelerator.prepare`
wraps, because calling parts of it by hand would train every process for itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from hanorec.model import attention, families
from hanorec.model.images import ImageTokens, check_sizes
from hanorec.model.trees import Node, merge_trees, separate_paths
from hanorec.run.files import UserError


def check_attention(attn: str, pack: bool) -> None:
    """UserError if this attention cannot take the trees' mask: flash_attention_2 takes none, flex_attention a form of
    its own, and `eager` reads a boolean mask wrongly."""
    if pack and attn not in ("sdpa", attention.NAME):
        raise UserError(f"--attn {attn} cannot take the mask of packed prompts: give --no-pack too, or sdpa")


@dataclass
class Batch:
    """Prompt trees as tensors, laid end to end in rows (see `PackedMLLM.collate`). T tokens in all.

    Args:
        rows: (tokens of its root, tokens in all) of each row.
        images: how many images each row has.
        input_ids, node, depth: [T]; visible: [nodes, nodes]; see attention.Forest.
        position_ids: [P, 1, T].
        image_tokens: [all, d]; grids: [images, 3]; of the images in order.
        predicted_from, target, answer: for each scored token, the token before it, its id, its answer's number.
        answers: [A], the number of scored tokens of each answer.
        pixels: with live images, the vision tower's inputs for the distinct images, instead of image_tokens.
        sizes: with live images, (item id, tokens) of the distinct images as they were prepared.
        distinct: with live images, for each image its number among the distinct ones.
    """

    rows: list[tuple[int, int]]
    images: list[int]
    input_ids: torch.Tensor
    node: torch.Tensor
    depth: torch.Tensor
    visible: torch.Tensor
    position_ids: torch.Tensor
    image_tokens: torch.Tensor
    grids: torch.Tensor
    predicted_from: torch.Tensor
    target: torch.Tensor
    answer: torch.Tensor
    answers: torch.Tensor
    pixels: dict | None = None
    sizes: list[tuple[str, int]] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)

    def to(self, device) -> "Batch":
        def move(values: dict) -> dict:
            return {n: value.to(device, non_blocking=True) for n, value in values.items() if torch.is_tensor(value)}

        pixels = self.pixels and self.pixels | move(self.pixels)
        return replace(self, **move(vars(self)), pixels=pixels)


@dataclass
class Placed:
    """Where a node lies in a batch.

    Args:
        start: its first token. length: its tokens. depth: tokens before it on its path.
        position: the position of the first token behind it.
        parent: number of the node that it continues, over all rows; its own for a root.
    """

    start: int
    length: int
    depth: int
    position: int
    parent: int


class PackedMLLM(nn.Module):
    """A batch of prompt trees in, the log-probabilities of their answers out.

    Args:
        model: an image-text model of transformers, or its PeftModel. Its vision tower runs for live images only.
        pack: False runs the model's own forward once for each answer: slower, with the same numbers. Packing needs
            `sdpa` attention. Whether it holds for a model is for check.py to say.
    """

    def __init__(self, model, pack: bool = True):
        super().__init__()
        self.model, self.pack = model, pack
        check_attention(self.core.config.get_text_config()._attn_implementation, pack)
        if pack:
            families.check_layers(self.core.config)
            attention.install(self.core)

    @property
    def core(self):
        """The image-text model itself, without PEFT's wrapper. LoRA layers are inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def set_dropout(self, probability: float) -> None:
        """In training, apply dropout to the embeddings and to the output of each attention and MLP block."""
        if not probability:
            return
        decoder = self.core.get_decoder()
        hook_embeddings(decoder, lambda embeds: F.dropout(embeds, probability, decoder.training))
        for name, module in decoder.named_modules():
            if name.endswith(("self_attn.o_proj", "mlp.down_proj")):
                module.register_forward_hook(lambda layer, _, out: F.dropout(out, probability, layer.training))

    def enable_checkpointing(self, reentrant: bool = False) -> None:
        """In training, recompute activations in backward."""
        decoder = self.core.get_decoder()
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        # Reentrant checkpointing drops gradients of a block without an input that has one
        hook_embeddings(decoder, lambda embeds: embeds.requires_grad_(True) if torch.is_grad_enabled() else embeds)

    def train(self, mode: bool = True) -> "PackedMLLM":
        """Only the language model ever trains: the vision tower stays as it is at evaluation."""
        super().train(False)
        self.core.get_decoder().train(mode)
        self.training = mode
        return self

    # From trees to a batch

    def collate(self, trees: Iterable[list[Node]], tokens: ImageTokens) -> Batch:
        """Lay trees end to end; neighbours with equal roots share them. Without packing, a row for each answer."""
        if not self.pack:
            trees = [path for tree in trees for path in separate_paths(tree)]
        rows, images, ids, positions = [], [], [], []
        nodes: list[Placed] = []  # of all rows
        scored: list[tuple[int, int, int]] = []  # predicted_from, target, answer
        for tree, numbers in merge_trees(trees):
            first, row_start, numbers = len(nodes), len(ids), iter(numbers)
            for node in tree:
                parent = None if node.parent is None else nodes[first + node.parent]
                local = self.positions(node, tokens) + (parent.position if parent else 0)
                positions.append(local)
                nodes.append(
                    Placed(
                        start=len(ids),
                        length=len(node.ids),
                        depth=parent.depth + parent.length if parent else 0,
                        position=int(local.max()) + 1,
                        parent=first + node.parent if parent else first,
                    )
                )
                if node.scored:
                    answer, before = next(numbers), parent.start + parent.length - 1 if parent else -1
                    for offset in node.scored:
                        previous = len(ids) + offset - 1 if offset else before
                        scored.append((previous, node.ids[offset], answer))
                ids += node.ids
            rows.append((len(tree[0].ids), len(ids) - row_start))
            images.append([item for node in tree for item in node.images])
        return make_batch(rows, images, ids, positions, nodes, scored, tokens)

    def positions(self, node: Node, tokens: ImageTokens) -> torch.Tensor:
        """[P, len(node.ids)]. UserError if a node has not as many placeholders as image tokens."""
        expected = sum(tokens.length(item) for item in node.images)
        if node.ids.count(self.core.config.image_token_id) != expected:
            names = [tokens.ids[item] for item in node.images]
            raise UserError(f"image placeholders and image tokens disagree in a prompt with items {names}")
        if not self.pack:  # the model computes its own
            return torch.arange(len(node.ids))[None]
        return families.positions(self.core, node.ids, [tokens.grid(item) for item in node.images])

    # From a batch to log-probabilities

    def forward(self, batch: Batch) -> torch.Tensor:
        """[A], float32: the log-probability of each answer, summed over its tokens."""
        if batch.pixels:
            with torch.no_grad(), torch.autocast(batch.input_ids.device.type, enabled=False):
                images = families.image_tokens(self.core, batch.pixels)
            check_sizes(batch.sizes, images)
            batch = replace(batch, image_tokens=torch.cat([images[number] for number in batch.distinct]))
        logits = (self.packed_logits(batch) if self.pack else self.plain_logits(batch)).float()
        logps = -F.cross_entropy(logits, batch.target, reduction="none")
        return logps.new_zeros(len(batch.answers)).index_add(0, batch.answer, logps)

    def packed_logits(self, batch: Batch) -> torch.Tensor:
        """[scored tokens, V]. The head is applied only where an answer is predicted, never over the prompt."""
        core, ids, tokens = self.core, batch.input_ids[None], batch.image_tokens
        is_image = ids == core.config.image_token_id
        embeds, deep = core.get_input_embeddings()(ids.masked_fill(is_image, 0)), {}  # some ids are beyond the table
        if len(tokens):
            tokens, width = tokens.to(embeds.dtype), embeds.shape[-1]
            embeds = embeds.masked_scatter(is_image[..., None], tokens[:, :width])
            deep = families.deep_features(tokens, width, is_image)
        wanted, scored = batch.predicted_from.unique(return_inverse=True)
        images = families.image_numbers(core.config, batch.input_ids)
        forest = attention.Forest(batch.rows, batch.node, batch.depth, batch.visible, wanted, images)
        positions = batch.position_ids
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # else the language model makes a mask
        hidden = core.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=unread,
            position_ids=positions[0] if len(positions) == 1 else positions,
            use_cache=False,
            forest=forest,
            **deep,
        ).last_hidden_state
        return core.get_output_embeddings()(hidden[0, wanted])[scored]

    def plain_logits(self, batch: Batch) -> torch.Tensor:
        """[scored tokens, V], by the model's own forward over each row."""
        found, start, lengths = [], 0, [length for _, length in batch.rows]
        counts = [int(row.sum()) for row in (batch.input_ids == self.core.config.image_token_id).split(lengths)]
        rows = zip(lengths, batch.image_tokens.split(counts), batch.grids.split(batch.images), strict=True)
        for length, tokens, grids in rows:
            ids = batch.input_ids[start : start + length]
            wanted = batch.predicted_from[(batch.predicted_from >= start) & (batch.predicted_from < start + length)]
            from_end = wanted - start - length  # negative: the model may return the last logits alone
            images = families.encoder_outputs(self.core, tokens, grids)
            logits = families.own_logits(self.core, ids[None], images, -int(from_end.min()))[0]
            found.append(logits[from_end])
            start += length
        return torch.cat(found)


def make_batch(rows, images, ids, positions, nodes: list[Placed], scored: list, tokens: ImageTokens) -> Batch:
    """The tensors of a batch. images: item indices of each row's images; the others: see `PackedMLLM.collate`."""
    lengths, starts, depths = torch.tensor([(node.length, node.start, node.depth) for node in nodes]).T
    visible = torch.eye(len(nodes), dtype=torch.bool)
    for number, node in enumerate(nodes):
        visible[number] |= visible[node.parent]
    predicted_from, target, answer = torch.tensor(scored).reshape(-1, 3).T
    items = [item for row in images for item in row]
    distinct = list(dict.fromkeys(items)) if tokens.live else []
    stored = [] if tokens.live else [tokens.of(item) for item in items]
    grids = [tokens.grid(item) for item in items]
    return Batch(
        rows=rows,
        images=[len(row) for row in images],
        input_ids=torch.tensor(ids),
        node=torch.arange(len(nodes)).repeat_interleave(lengths),
        depth=torch.arange(len(ids)) - (starts - depths).repeat_interleave(lengths),
        visible=visible,
        position_ids=torch.cat(positions, dim=1)[:, None],
        image_tokens=torch.cat(stored) if stored else torch.zeros(0, 0),
        grids=torch.stack(grids) if grids else torch.zeros(0, 3),
        predicted_from=predicted_from,
        target=target,
        answer=answer,
        answers=answer.bincount(),
        pixels=tokens.pixels(distinct) if distinct else None,
        sizes=tokens.sizes(distinct),
        distinct=[distinct.index(item) for item in items] if distinct else [],
    )


def hook_embeddings(decoder, change) -> None:
    """Apply `change` to the embeddings that enter the language model, whoever calls it."""

    def hook(_, args, kwargs):
        return args, kwargs | {"inputs_embeds": change(kwargs["inputs_embeds"])}

    decoder.register_forward_pre_hook(hook, with_kwargs=True)
