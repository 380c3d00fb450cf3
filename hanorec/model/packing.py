"""Score the answers of prompt trees with a multimodal LLM: packed, or in one forward for each answer.

A prompt is computed once for all its answers. History, questions and answers form a tree, whose nodes are laid end to
end in one segment of a sequence. A token attends to its own node and to that node's ancestors only. The positions of a
node continue from the end of its parent.

`PackedMLLM.forward` computes the answers' log-probabilities of a batch. `accelerator.prepare` must wrap this module:
with calls of its parts, every process would train for itself.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from hanorec.model import attention, families
from hanorec.model.batch import Batch, make_batch
from hanorec.model.head import float32_logits
from hanorec.model.images import ImageTokens, check_sizes
from hanorec.model.trees import Node, merge_trees, separate_paths
from hanorec.run.files import UserError


def check_attention(attn: str, pack: bool) -> None:
    """UserError if this attention cannot compute packed prompts.

    flash_attention_2 takes no mask. flex_attention takes another form of mask. eager reads a boolean mask wrongly.
    """
    if pack and attn not in ("sdpa", attention.NAME):
        raise UserError(f"--attn {attn} cannot take the mask of packed prompts: give --no-pack too, or --attn sdpa")


class PackedMLLM(nn.Module):
    """Computes the log-probabilities of the answers of a batch of prompt trees.

    Args:
        model: an image-text model of transformers, or its PeftModel. Its vision tower runs for live images only.
        pack: False runs the model's own forward once for each answer, which gives the same numbers and is slower.
            Packing needs `sdpa` attention. check.py finds out whether it works with a model.
    """

    def __init__(self, model, pack: bool = True):
        super().__init__()
        self.model, self.pack = model, pack
        check_attention(self.core.config.get_text_config()._attn_implementation, pack)
        if pack:
            attention.install(self.core)
            families.avoid_waits(self.core)

    @property
    def core(self):
        """The image-text model without PEFT's wrapper. LoRA layers are inside the model."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def set_dropout(self, probability: float) -> None:
        """In training, apply dropout to the embeddings and to the output of each attention and MLP block."""
        if not probability:
            return
        decoder = self.core.get_decoder()

        def drop_embeddings(_, args, kwargs):
            return args, kwargs | {"inputs_embeds": F.dropout(kwargs["inputs_embeds"], probability, decoder.training)}

        decoder.register_forward_pre_hook(drop_embeddings, with_kwargs=True)
        for name, module in decoder.named_modules():
            if name.endswith(("self_attn.o_proj", "mlp.down_proj")):
                module.register_forward_hook(lambda layer, _, out: F.dropout(out, probability, layer.training))

    def enable_checkpointing(self, reentrant: bool = False) -> None:
        """Recompute activations in backward instead of keeping them."""
        decoder = self.core.get_decoder()
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})

        def require_gradient(_, args, kwargs):  # else reentrant checkpointing gives no gradients to the first block
            if torch.is_grad_enabled():
                kwargs["inputs_embeds"].requires_grad_(True)

        decoder.register_forward_pre_hook(require_gradient, with_kwargs=True)

    def train(self, mode: bool = True) -> "PackedMLLM":
        """Set the language model to training or evaluation. The frozen vision tower is always in evaluation mode."""
        super().train(False)
        self.core.get_decoder().train(mode)
        self.training = mode
        return self

    # From trees to a batch

    def collate(self, trees: Iterable[list[Node]], tokens: ImageTokens) -> Batch:
        """Lay prompt trees end to end. Returns them as a Batch.

        With packing, neighbouring trees with equal roots become one tree. Without it, each path from a root to an
        answer becomes a tree of one node.
        """
        if not self.pack:
            trees = [path for tree in trees for path in separate_paths(tree)]
        segments, images, ids, positions, parents = [], [], [], [], []
        scored: list[tuple[int, int, int]] = []
        scored_counts: list[int] = []
        next_positions: list[int] = []  # of each node: the position of a token that follows it
        for tree, answers in merge_trees(trees):
            first, start, scored_before = len(parents), len(ids), len(scored)
            for node in tree:
                number, is_root = len(parents), node.parent is None
                if is_root and 0 in node.scored:
                    raise ValueError("the first token of a prompt cannot be scored: no token predicts it")
                parent = number if is_root else first + node.parent
                position = self.positions(node, tokens) + (0 if is_root else next_positions[parent])
                if node.scored:
                    answer = answers.pop(0)
                    scored += [(number, offset, answer) for offset in node.scored]
                ids += node.ids
                parents.append(parent)
                positions.append(position)
                next_positions.append(int(position.max()) + 1)
            segments.append((len(tree[0].ids), len(ids) - start))
            images.append([item for node in tree for item in node.images])
            scored_counts.append(len(scored) - scored_before)
        return make_batch(segments, images, ids, positions, parents, scored, scored_counts, tokens)

    def positions(self, node: Node, tokens: ImageTokens) -> torch.Tensor:
        """Return a node's positions [P, tokens], from 0. UserError if it has not a placeholder for each image token."""
        expected = sum(tokens.lengths[item] for item in node.images)
        if node.ids.count(self.core.config.image_token_id) != expected:
            names = [tokens.ids[item] for item in node.images]
            raise UserError(f"a prompt with the images of items {names} has not one placeholder for each image token")
        if not self.pack:  # the model's own forward computes positions; these are not used
            return torch.arange(len(node.ids))[None]
        return families.positions(self.core, node.ids, tokens.grids[node.images])

    # From a batch to log-probabilities

    def forward(self, batch: Batch, tokens: bool = False) -> torch.Tensor:
        """Return the log-probability of each answer, summed over its scored tokens: [A], float32.

        With `tokens`, return the log-probabilities of the whole vocabulary at each scored token: [S, V], float32.
        """
        if batch.pixels:
            with torch.no_grad(), torch.autocast(batch.input_ids.device.type, enabled=False):
                images = families.image_tokens(self.core, batch.pixels)
            check_sizes(batch.sizes, images)
            batch = replace(batch, image_tokens=torch.cat([images[number] for number in batch.distinct]))
        with float32_logits(self.core):
            logits = self.packed_logits(batch) if self.pack else self.separate_logits(batch)
        if tokens:
            return logits.float().log_softmax(dim=-1)
        logps = -F.cross_entropy(logits.float(), batch.target, reduction="none")
        return answer_sums(batch, logps)

    def packed_logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits [S, V] that predict the scored tokens, by one packed forward.

        The head is applied only to the tokens that predict a scored token, not to the whole prompt.
        """
        core, ids = self.core, batch.input_ids[None]
        is_image = ids == core.config.image_token_id
        embeds = core.get_input_embeddings()(ids.masked_fill(is_image, 0))  # an image token's id may exceed the table
        deep = {}
        if len(batch.image_tokens):
            tokens, width = batch.image_tokens.to(embeds.dtype), embeds.shape[-1]
            embeds = embeds.masked_scatter(is_image[..., None], tokens[:, :width])
            deep = families.deep_features(tokens, width, is_image)
        images = families.image_numbers(core.config, batch.input_ids)
        forest = attention.Forest(batch.segments, batch.node, batch.depth, batch.visible, batch.predicting, images)
        positions = batch.position_ids[0] if len(batch.position_ids) == 1 else batch.position_ids
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)  # not read; without it the model makes one
        output = core.get_decoder()(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, forest=forest, **deep
        )
        return core.get_output_embeddings()(output.last_hidden_state[0, batch.predicting])[batch.predicted_by]

    def separate_logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits [S, V] that predict the scored tokens, by the model's own forward over each segment."""
        lengths = [length for _, length in batch.segments]
        ids, grids = batch.input_ids.split(lengths), batch.grids.split([count for count, _ in batch.images])
        tokens = batch.image_tokens.split([count for _, count in batch.images])
        predicted_from = batch.predicting[batch.predicted_by].split([count for count, _ in batch.scored])
        logits, end = [], 0
        for number, length in enumerate(lengths):
            end += length
            images = families.encoder_outputs(self.core, tokens[number], grids[number])
            own = families.own_logits(self.core, ids[number][None], images, keep=batch.scored[number][1])
            logits.append(own[0, predicted_from[number] - end])  # from the end: it may be the last logits
        return torch.cat(logits)


def answer_sums(batch: Batch, logps: torch.Tensor) -> torch.Tensor:
    """Sum the log-probabilities of the scored tokens, [S], over each answer: [A]."""
    return logps.new_zeros(len(batch.answers)).index_add(0, batch.answer, logps)
