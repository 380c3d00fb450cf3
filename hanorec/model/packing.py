"""Prompt trees (prompts.py) scored by a multimodal LLM: packed into rows, or one plain forward for each answer.

A prompt is computed once for all its answers: history, question and answers form a tree, laid end to end in one row, in
which a token attends to its own node and that node's ancestors only, and positions continue from the parent's end.

`PackedMLLM.forward` goes from a batch to the answers' log-probabilities; that module is what `accelerator.prepare`
wraps, because calling parts of it by hand would train every process for itself.
"""

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hanorec.model import attention, backbones, mllm
from hanorec.model.backbones import BackboneError
from hanorec.model.prompts import Node, Prompts, Row


def load_prompts(
    source: str | Path,
    catalogue: mllm.Catalogue,
    candidate_images: bool = False,
    trust: bool = False,
    kind: Callable[..., Prompts] = Prompts,
) -> Prompts:
    """The prompts of a catalogue, of this kind, as the backbone `source` (a hub name or a folder) reads them."""
    token, image_text = backbones.image_placeholder(mllm.load_config(source, trust))
    return kind(mllm.load_tokenizer(source, trust), token, catalogue, candidate_images, image_text)


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


def separate_paths(tree: list[Node]) -> list[list[Node]]:
    """For each scored node of a tree, in order, a tree of one node: the whole path from the root to it."""
    paths: list[Node] = []
    for node in tree:
        before = paths[node.parent] if node.parent is not None else Node(None, [])
        scored = [len(before.ids) + offset for offset in node.scored]
        paths.append(Node(None, before.ids + node.ids, before.images + node.images, scored))
    return [[path] for path in paths if path.scored]


def check_attention(attn: str, pack: bool) -> None:
    """BackboneError where this attention cannot take the trees' mask: flash_attention_2 takes none, flex_attention a
    form of its own, and `eager` reads a boolean one wrongly."""
    if pack and attn not in ("sdpa", attention.NAME):
        raise BackboneError(f"--attn {attn} cannot take the mask of packed prompts: give --no-pack too, or sdpa")


@dataclass
class Batch:
    """Prompt trees as tensors, laid end to end in rows (see `PackedMLLM.collate`).

    rows: (tokens of its root, tokens in all) of each row, T in all. input_ids, node, depth [T] and visible [nodes,
    nodes]: see attention.Forest; position_ids [P, 1, T]. image_tokens [all, d] and grids [images, 3] of the images in
    order; images: how many each row has. Where images are encoded live, pixels are those of the distinct images in
    place of image_tokens, sizes their (item, tokens) as prepared, and seen says which of them each image is. Of each
    scored token: predicted_from (the token before it), target, answer (its answer's number). answers [A]: scored tokens
    of each.
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
    seen: list[int] = field(default_factory=list)

    def to(self, device) -> "Batch":
        def move(values: dict) -> dict:
            return {n: value.to(device, non_blocking=True) for n, value in values.items() if torch.is_tensor(value)}

        pixels = self.pixels and self.pixels | move(self.pixels)
        return replace(self, **move(vars(self)), pixels=pixels)


class PackedMLLM(nn.Module):
    """A batch of prompt trees in, the log-probabilities of their answers out.

    model: an image-text model of transformers (or its PeftModel); its vision tower runs for live images alone.
    pack: False runs the model's own forward once for each answer, slower, with the same numbers. Packing needs `sdpa`
    attention, and BackboneError says so. Whether it holds for a model is for `check` to say.
    """

    def __init__(self, model, pack: bool = True):
        super().__init__()
        self.model, self.pack = model, pack
        check_attention(self.core.config.get_text_config()._attn_implementation, pack)
        if pack:
            backbones.check_layers(self.core.config)
            attention.install(self.core)

    @property
    def core(self):
        """The image-text model itself, without PEFT's wrapper; LoRA layers are inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def set_dropout(self, probability: float) -> None:
        """Dropout of the embeddings and of what each attention and MLP block adds, while training."""
        if not probability:
            return
        decoder = self.core.get_decoder()
        hook_embeddings(decoder, lambda embeds: F.dropout(embeds, probability, decoder.training))
        for name, module in decoder.named_modules():
            if name.endswith(("self_attn.o_proj", "mlp.down_proj")):
                module.register_forward_hook(lambda layer, _, out: F.dropout(out, probability, layer.training))

    def enable_checkpointing(self, reentrant: bool = False) -> None:
        """Recompute activations in backward; training mode only."""
        decoder = self.core.get_decoder()
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        # Reentrant checkpointing drops gradients of a block without an input that has one
        hook_embeddings(decoder, lambda embeds: embeds.requires_grad_(True) if torch.is_grad_enabled() else embeds)

    def collate(self, trees: Iterable[list], catalogue: mllm.Catalogue) -> Batch:
        """Lay trees end to end (neighbours with the same root share it); without packing, a row for each answer."""
        if not self.pack:
            trees = [path for tree in trees for path in separate_paths(tree)]
        rows, images, ids, positions = [], [], [], []
        nodes: list[tuple[int, int, int]] = []  # tokens, tokens before it on its path, the node that it continues
        scored: list[tuple[int, int, int]] = []  # predicted_from, target, answer
        for tree, numbers in merge_trees(trees):
            first, row, ends, nexts, numbers = len(nodes), len(ids), [], [], iter(numbers)
            for index, node in enumerate(tree):
                start, parent = len(ids), node.parent if index else None
                local = self._positions(node, catalogue) + (nexts[parent] if index else 0)
                nexts.append(int(local.max()) + 1)
                positions.append(local)
                depth = sum(nodes[first + parent][:2]) if index else 0
                nodes.append((len(node.ids), depth, first + parent if index else len(nodes)))
                answer = next(numbers) if node.scored else None
                before = ends[parent] - 1 if index else -1
                scored += [(start + t - 1 if t else before, node.ids[t], answer) for t in node.scored]
                ids += node.ids
                ends.append(len(ids))
            rows.append((len(tree[0].ids), len(ids) - row))
            images.append([item for node in tree for item in node.images])
        lengths, depths, parents = torch.tensor(nodes).T
        visible = torch.eye(len(nodes), dtype=torch.bool)
        for number, parent in enumerate(parents.tolist()):
            visible[number] |= visible[parent]
        starts = (lengths.cumsum(0) - lengths - depths).repeat_interleave(lengths)
        predicted_from, target, answer = torch.tensor(scored).reshape(-1, 3).T
        items = [item for row in images for item in row]
        distinct = list(dict.fromkeys(items)) if catalogue.live else []
        tokens = [] if catalogue.live else [catalogue.image_tokens(item) for item in items]
        grids = [catalogue.grid(item) for item in items]
        return Batch(
            rows=rows,
            images=[len(row) for row in images],
            input_ids=torch.tensor(ids),
            node=torch.arange(len(nodes)).repeat_interleave(lengths),
            depth=torch.arange(len(ids)) - starts,
            visible=visible,
            position_ids=torch.cat(positions, dim=1)[:, None],
            image_tokens=torch.cat(tokens) if tokens else torch.zeros(0, 0),
            grids=torch.stack(grids) if grids else torch.zeros(0, 3),
            predicted_from=predicted_from,
            target=target,
            answer=answer,
            answers=answer.bincount(),
            pixels=catalogue.pixels(distinct) if distinct else None,
            sizes=catalogue.sizes(distinct),
            seen=[distinct.index(item) for item in items] if distinct else [],
        )

    def _positions(self, node: Node, catalogue) -> torch.Tensor:
        """[P, len(node.ids)]; also refuses a node whose placeholders are not as many as its image tokens."""
        expected = sum(catalogue.image_length(item) for item in node.images)
        if node.ids.count(self.core.config.image_token_id) != expected:
            names = [catalogue.ids[item] for item in node.images]
            raise BackboneError(f"image placeholders and image tokens disagree in a prompt with items {names}")
        if not self.pack:  # the model finds its own
            return torch.arange(len(node.ids))[None]
        return backbones.positions(self.core, node.ids, [catalogue.grid(item) for item in node.images])

    def train(self, mode: bool = True) -> "PackedMLLM":
        """Only the language model ever trains: the vision tower stays as it is at evaluation."""
        super().train(False)
        self.core.get_decoder().train(mode)
        self.training = mode
        return self

    def forward(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities of the batch's answers, summed over their tokens: [A], float32."""
        if batch.pixels:
            with torch.no_grad(), torch.autocast(batch.input_ids.device.type, enabled=False):
                images = backbones.image_tokens(self.core, batch.pixels)
            mllm.check_sizes(batch.sizes, images)
            batch = replace(batch, image_tokens=torch.cat([images[number] for number in batch.seen]))
        logits = (self._packed_logits(batch) if self.pack else self._plain_logits(batch)).float()
        logps = -F.cross_entropy(logits, batch.target, reduction="none")
        return logps.new_zeros(len(batch.answers)).index_add(0, batch.answer, logps)

    def _packed_logits(self, batch: Batch) -> torch.Tensor:
        """[scored tokens, V], the head applied only where an answer is predicted, never over the prompt."""
        core, ids, tokens = self.core, batch.input_ids[None], batch.image_tokens
        is_image = ids == core.config.image_token_id
        embeds, deep = core.get_input_embeddings()(ids.masked_fill(is_image, 0)), {}  # some ids are beyond the table
        if len(tokens):
            tokens, width = tokens.to(embeds.dtype), embeds.shape[-1]
            embeds = embeds.masked_scatter(is_image[..., None], tokens[:, :width])
            deep = backbones.deep_features(tokens, width, is_image)
        wanted, scored = batch.predicted_from.unique(return_inverse=True)
        images = backbones.image_numbers(core.config, batch.input_ids)
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

    def _plain_logits(self, batch: Batch) -> torch.Tensor:
        """[scored tokens, V], by the model's own forward over each row."""
        found, start, lengths = [], 0, [length for _, length in batch.rows]
        image_tokens = (batch.input_ids == self.core.config.image_token_id).split(lengths)
        tokens = batch.image_tokens.split([int(row.sum()) for row in image_tokens])
        for length, tokens_, grids in zip(lengths, tokens, batch.grids.split(batch.images), strict=True):
            ids = batch.input_ids[start : start + length]
            wanted = batch.predicted_from[(batch.predicted_from >= start) & (batch.predicted_from < start + length)]
            wanted = wanted - start - length  # from the end, so that it does not matter how many were kept
            images = backbones.encoder_outputs(self.core, tokens_, grids)
            logits = backbones.own_logits(self.core, ids[None], images, -int(wanted.min()))[0]
            found.append(logits[wanted])
            start += length
        return torch.cat(found)


def hook_embeddings(decoder, change) -> None:
    """Have `change` applied to the embeddings that enter the language model, whoever calls it."""

    def hook(_, args, kwargs):
        return args, kwargs | {"inputs_embeds": change(kwargs["inputs_embeds"])}

    decoder.register_forward_pre_hook(hook, with_kwargs=True)


# ---------------------------------------------------------------------------------------------------------------------
# The check of a model that is loaded


TITLE, ANSWERS = "A film", ("Another film", "Yes")
TOLERANCE = 1e-3  # of an answer's log-probability in float32: some hundred times what the order of sums makes
LOW_TOLERANCE = 5e-2  # in half precision, of its size: a logit is kept to 1/256, and errors add up over tokens


def load_packed(model, data, pack: bool, device) -> PackedMLLM:
    """`model` in a PackedMLLM on `device`, checked. data: the evaluate.Data whose backbone it is."""
    packed = PackedMLLM(model, pack).to(device)
    if data.catalogue.live:
        backbones.match_tiles(packed.core, data.catalogue.live[1])
    check(packed, data.source, data.encoding["max_pixels"], data.backbone, data.trust)
    return packed


@torch.no_grad()  # not inference mode: what a model keeps from its first forward must serve training too
def check(packed: PackedMLLM, source: str | Path, max_pixels: int, name: str, trust: bool = False) -> None:
    """BackboneError, naming the model, unless it scores two answers behind a prompt with an image as its own forward
    does with the image's pixels. Cheap: a few dozen tokens, one image of 112 x 112 pixels. So short a prompt says
    nothing of a long sliding window, which the mask has from the config, and both ways read the same text around the
    image, whatever the model's processor would write. In half precision small mistakes pass; float32 shows them."""
    training = packed.training
    packed.eval()
    try:
        found, expected = score_both_ways(packed, source, max_pixels, trust)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if hasattr(error, "exit_code"):
            raise
        raise BackboneError(disagreement(packed, name, f"{type(error).__name__}: {error}")) from error
    finally:
        packed.train(training)
    allowed = TOLERANCE if packed.core.dtype == torch.float32 else LOW_TOLERANCE * expected.abs().clamp_min(1)
    worst = (found - expected).abs()
    if not (worst <= allowed).all():
        raise BackboneError(disagreement(packed, name, f"log-probabilities differ by {float(worst.max()):.2g}"))


def disagreement(packed: PackedMLLM, name: str, reason: str) -> str:
    if packed.pack:
        return f"packing does not hold for {name} ({reason}); --no-pack runs its own forward, which is slower"
    return f"{name} cannot be run on stored image tokens ({reason}); choose another backbone"


def score_both_ways(
    packed: PackedMLLM, source: str | Path, max_pixels: int, trust: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[2] log-probabilities of two answers behind one prompt: by `packed`, and by the model's own forward."""
    from PIL import Image

    core, processor = packed.core, mllm.load_image_processor(source, max_pixels, trust)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"  # a gradient: tokens in a wrong order would not show in one colour
        Image.linear_gradient("L").resize((112, 112)).convert("RGB").save(path)
        mllm.encode_items(core, mllm.load_tokenizer(source, trust), processor, [TITLE], [path], Path(folder))
        catalogue = mllm.Catalogue([{"item": TITLE, "title": TITLE}], Path(folder))
        prompts = load_prompts(source, catalogue, trust=trust)
        tree = prompts.yesno_questions(Row("", [0], 0, [0], 0), [0])
        tree += [prompts.answer(text, 1) for text in ANSWERS]
        batch = packed.collate([tree], catalogue).to(core.device)
        inputs = backbones.image_inputs(processor, [mllm.open_image(path)], core.device)
    expected = [own_logp(core, path, inputs) for (path,) in separate_paths(tree)]
    return packed(batch), torch.stack(expected)


def own_logp(core, path: Node, images: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of a path's scored tokens by the model's own forward, pixels and all."""
    ids, scored = torch.tensor([path.ids], device=core.device), list(path.scored)
    logps = backbones.own_logits(core, ids, images)[0].float().log_softmax(-1)
    return logps[[offset - 1 for offset in scored], ids[0, scored]].sum()
