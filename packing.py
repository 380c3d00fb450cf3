"""Prompt trees (prompts.py) scored by a multimodal LLM: packed into rows, or one plain forward for each answer.

A prompt is computed once for all its answers: history, question and answers form a tree, laid end to end in one row, in
which a token attends to its own node and that node's ancestors only, and positions continue from the parent's end.

`PackedMLLM.forward` goes from a batch to the answers' log-probabilities; that module is what `accelerator.prepare`
wraps, because calling parts of it by hand would train every process for itself.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import mllm
from backbones import BackboneError
from prompts import Node, Prompts, Row


def load_prompts(source: str | Path, catalogue: mllm.Catalogue, candidate_images: bool = False) -> Prompts:
    """The prompts of a catalogue, as the backbone `source` (a hub name or a folder) reads them."""
    token, image_text = backbones.image_placeholder(mllm.load_config(source))
    return Prompts(mllm.load_tokenizer(source), token, catalogue, candidate_images, image_text)


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
    """BackboneError where this attention cannot take the tree's mask: flash_attention_2 takes none, flex_attention a
    form of its own, and `eager` reads a boolean one wrongly."""
    if pack and attn != "sdpa":
        raise BackboneError(f"--attn {attn} cannot take the mask of packed prompts: give --no-pack too, or sdpa")


class PackedMLLM(nn.Module):
    """A batch of prompt trees in, the log-probabilities of their answers out.

    model: an image-text model of transformers (or its PeftModel); the vision tower is not used.
    pack: False runs the model's own forward once for each answer, slower, with the same numbers. Packing needs `sdpa`
    attention, and BackboneError says so. Whether it holds for a model is for `check` to say.
    """

    def __init__(self, model, pack: bool = True):
        super().__init__()
        self.model, self.pack = model, pack
        check_attention(self.core.config.get_text_config()._attn_implementation, pack)

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

    def collate(self, trees: Iterable[list], catalogue: mllm.Catalogue) -> dict[str, torch.Tensor]:
        """Pack trees (neighbours with the same root share it) into one right-padded batch of tensors; without packing,
        a row for each answer.

        input_ids, node, depth [B, L]: depth counts the tokens before it on its path; visible [B, nodes, nodes], True
        where a node's ancestor-or-self; position_ids [P, B, L]; image_tokens [all, d], grids [images, 3], images [B],
        how many in each row; of each scored token: predicted_from (flat index of the token before it), target, answer
        (its answer's number); answers [A], tokens per answer.
        """
        if not self.pack:
            trees = [path for tree in trees for path in separate_paths(tree)]
        merged = merge_trees(trees)
        length = max(sum(len(node.ids) for node in tree) for tree, _ in merged)
        nodes = max(len(tree) for tree, _ in merged) + 1  # the last one is padding
        input_ids, depth = torch.zeros(2, len(merged), length, dtype=torch.long)
        node_of = torch.full((len(merged), length), nodes - 1)
        visible = torch.eye(nodes, dtype=torch.bool).repeat(len(merged), 1, 1)
        positions, images, counts = None, [], []
        scored: list[tuple[int, int, int]] = []  # predicted_from, target, answer
        for row, (tree, numbers) in enumerate(merged):
            starts, nexts, depths, start, numbers = [], [], [], 0, iter(numbers)
            for index, node in enumerate(tree):
                end, parent = start + len(node.ids), node.parent if index else None
                local = self._positions(node, catalogue) + (nexts[parent] if index else 0)
                positions = local.new_zeros(len(local), len(merged), length) if positions is None else positions
                positions[:, row, start:end] = local
                input_ids[row, start:end] = torch.tensor(node.ids)
                node_of[row, start:end] = index
                starts.append(start)
                nexts.append(int(local.max()) + 1)
                depths.append((depths[parent] if index else 0) + len(node.ids))
                depth[row, start:end] = torch.arange(depths[-1] - len(node.ids), depths[-1])
                if index:
                    visible[row, index] |= visible[row, parent]
                before = starts[parent] + len(tree[parent].ids) - 1 if index else -1
                answer = next(numbers) if node.scored else None
                scored += [(row * length + (start + t - 1 if t else before), node.ids[t], answer) for t in node.scored]
                counts += [(answer, len(node.scored))] if node.scored else []
                images += [(row, item) for item in node.images]
                start = end
        predicted_from, target, answer = torch.tensor(scored).reshape(-1, 3).T
        batch = {"input_ids": input_ids, "node": node_of, "depth": depth, "visible": visible, "position_ids": positions}
        batch |= {"predicted_from": predicted_from, "target": target, "answer": answer}
        batch["answers"] = torch.tensor([count for _, count in sorted(counts)])
        return batch | self._images(images, len(merged), catalogue)

    def _positions(self, node: Node, catalogue) -> torch.Tensor:
        """[P, len(node.ids)]; also refuses a node whose placeholders are not as many as its image tokens."""
        expected = sum(catalogue.image_length(item) for item in node.images)
        if node.ids.count(self.core.config.image_token_id) != expected:
            names = [catalogue.ids[item] for item in node.images]
            raise BackboneError(f"image placeholders and image tokens disagree in a prompt with items {names}")
        if not self.pack:  # the model finds its own
            return torch.arange(len(node.ids))[None]
        return backbones.positions(self.core, node.ids, [catalogue.grid(item) for item in node.images])

    def _images(self, images: list[tuple[int, int]], rows: int, catalogue) -> dict[str, torch.Tensor]:
        """image_tokens, grids and images (see `collate`) of (row of the batch, item) in order."""
        tokens = [catalogue.image_tokens(item) for _, item in images]
        return {
            "image_tokens": torch.cat(tokens) if images else torch.zeros(0, 0),
            "grids": torch.stack([catalogue.grid(item) for _, item in images]) if images else torch.zeros(0, 3),
            "images": torch.tensor([row for row, _ in images], dtype=torch.long).bincount(minlength=rows),
        }

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of the batch's answers, summed over their tokens: [A], float32. See `collate`."""
        logits = (self._packed_logits(batch) if self.pack else self._plain_logits(batch)).float()
        logps = -F.cross_entropy(logits, batch["target"], reduction="none")
        return logps.new_zeros(len(batch["answers"])).index_add(0, batch["answer"], logps)

    def _packed_logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[scored tokens, V], the head applied only where an answer is predicted, never over the prompt."""
        core, ids, node, tokens = self.core, batch["input_ids"], batch["node"], batch["image_tokens"]
        is_image = ids == core.config.image_token_id
        embeds, deep = core.get_input_embeddings()(ids.masked_fill(is_image, 0)), {}  # some ids are beyond the table
        if len(tokens):
            tokens, width = tokens.to(embeds.dtype), embeds.shape[-1]
            embeds = embeds.masked_scatter(is_image[..., None], tokens[:, :width])
            deep = backbones.deep_features(tokens, width, is_image)
        rows = torch.arange(len(ids), device=ids.device)[:, None, None]
        visible = batch["visible"][rows, node[:, :, None], node[:, None, :]].tril()  # [B, L, L]
        positions = batch["position_ids"]
        hidden = core.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=backbones.attention_masks(core.config, visible, batch["depth"], is_image),
            position_ids=positions[0] if len(positions) == 1 else positions,
            use_cache=False,
            **deep,
        ).last_hidden_state
        return core.get_output_embeddings()(hidden.flatten(0, 1)[batch["predicted_from"]])

    def _plain_logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[scored tokens, V], by the model's own forward over each row."""
        length, found = batch["input_ids"].shape[1], []
        counts = batch["images"].tolist()
        lengths = (batch["input_ids"] == self.core.config.image_token_id).sum(1).tolist()
        tokens = batch["image_tokens"].split(lengths) if sum(lengths) else [batch["image_tokens"]] * len(lengths)
        for row, (tokens_, grids) in enumerate(zip(tokens, batch["grids"].split(counts), strict=True)):
            ids = batch["input_ids"][row][batch["node"][row] == 0]  # without the padding
            wanted = batch["predicted_from"][batch["predicted_from"] // length == row] % length
            with backbones.stored_images(self.core, tokens_, grids) as images:
                keep = len(ids) - int(wanted.min())
                logits = backbones.own_logits(self.core, ids[None], images, keep)[0]
            found.append(logits[wanted - len(ids)])  # from the end, so that it does not matter how many were kept
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
    check(packed, data.source, data.encoding["max_pixels"], data.backbone)
    return packed


@torch.no_grad()  # not inference mode: what a model keeps from its first forward must serve training too
def check(packed: PackedMLLM, source: str | Path, max_pixels: int, name: str) -> None:
    """BackboneError, naming the model, unless it scores two answers behind a prompt with an image as its own forward
    does with the image's pixels. Cheap: a few dozen tokens, one image of 112 x 112 pixels. So short a prompt says
    nothing of a long sliding window, which the mask has from the config, and both ways read the same text around the
    image, whatever the model's processor would write. In half precision small mistakes pass; float32 shows them."""
    training = packed.training
    packed.eval()
    try:
        found, expected = score_both_ways(packed, source, max_pixels)
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


def score_both_ways(packed: PackedMLLM, source: str | Path, max_pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[2] log-probabilities of two answers behind one prompt: by `packed`, and by the model's own forward."""
    from PIL import Image

    core, processor = packed.core, mllm.load_image_processor(source, max_pixels)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"  # a gradient: tokens in a wrong order would not show in one colour
        Image.linear_gradient("L").resize((112, 112)).convert("RGB").save(path)
        mllm.encode_items(core, mllm.load_tokenizer(source), processor, [TITLE], [path], Path(folder))
        catalogue = mllm.Catalogue([{"item": TITLE, "title": TITLE}], Path(folder))
        prompts = load_prompts(source, catalogue)
        tree = prompts.yesno_questions(Row("", [0], 0, [0], 0), [0])
        tree += [prompts.answer(text, 1) for text in ANSWERS]
        batch = {key: value.to(core.device) for key, value in packed.collate([tree], catalogue).items()}
        inputs = backbones.image_inputs(processor, [mllm.open_image(path)], core.device)
    expected = [own_logp(core, path, inputs) for (path,) in separate_paths(tree)]
    return packed(batch), torch.stack(expected)


def own_logp(core, path: Node, images: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of a path's scored tokens by the model's own forward, pixels and all."""
    ids, scored = torch.tensor([path.ids], device=core.device), list(path.scored)
    logps = backbones.own_logits(core, ids, images)[0].float().log_softmax(-1)
    return logps[[offset - 1 for offset in scored], ids[0, scored]].sum()
