"""Attention over packed prompt trees, as an attention function of transformers.

A batch is one sequence of prompt trees, laid end to end without padding. The tokens of one tree are a segment of the
sequence. A segment begins with the tree's root. A root token attends to itself and the root tokens before it. This
needs no mask, so fused kernels can compute it, except for images with attention in both directions and for a sliding
window shorter than the segment. A token of another node attends to itself and to earlier tokens of its own node and of
that node's ancestors. This needs a mask. In the last layer, queries, output and MLP are computed only for the tokens
whose last hidden states are used.
"""

from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hanorec.run.files import UserError

NAME = "prompt_trees"
# Queries, keys, and a mask [1, 1, queries, keys], True where a query attends to a key. Without a mask, the queries are
# the keys, and attention is causal
Piece = tuple[slice, slice, torch.Tensor | None]


@dataclass
class Forest:
    """What each of the T tokens of a batch attends to.

    Args:
        segments: (number of root tokens, number of all tokens) of each segment.
        node: [T], the number of each token's node. Nodes are numbered over the whole batch.
        depth: [T], the number of tokens before each token on its path.
        visible: [nodes, nodes], True at [a, b] if node b is node a or an ancestor of node a.
        predicting: [K], the indices of the K tokens whose last hidden states are used, ascending.
        image: [T], the number of each token's image, 0 for text. None if attention to images is causal like text.
    """

    segments: list[tuple[int, int]]
    node: torch.Tensor
    depth: torch.Tensor
    visible: torch.Tensor
    predicting: torch.Tensor
    image: torch.Tensor | None = None
    _pieces: dict[int | None, list[Piece]] = field(default_factory=dict)

    def pieces(self, window: int | None) -> list[Piece]:
        """Return the pieces of a layer's attention, in the order of their queries. All layers of a window share them.

        Args:
            window: the number of tokens that a token attends to on its path, itself included. None: no limit.
        """
        if window in self._pieces:
            return self._pieces[window]
        pieces, start = [], 0
        for root_length, length in self.segments:
            end = start + length
            short = window is None or length <= window  # then the window excludes nothing
            causal_end = start + root_length if short and self.image is None else start
            if causal_end > start:
                root = slice(start, causal_end)
                pieces.append((root, root, None))
            if causal_end < end:
                queries, keys = slice(causal_end, end), slice(start, end)
                mask = self.visible[self.node[queries]][:, self.node[keys]].tril(causal_end - start)
                if not short:
                    mask = mask & (self.depth[queries, None] - self.depth[None, keys] < window)
                if self.image is not None:  # inside an image, the window excludes nothing
                    query_image, key_image = self.image[queries, None], self.image[None, keys]
                    mask = mask | ((query_image == key_image) & (query_image > 0))
                pieces.append((queries, keys, mask[None, None]))
            start = end
        self._pieces[window] = pieces
        return pieces


def attend(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, forest=None, **kwargs
):
    """Compute attention: of packed trees if the language model was called with a Forest, else `sdpa`.

    Args:
        query, key, value: [1, heads, T, d].

    Returns (output [1, T, heads, d], None).
    """
    if forest is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    kwargs["is_causal"] = True  # it has an effect only where there is no mask
    outputs = []
    for queries, keys, mask in forest.pieces(sliding_window):
        qkv = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        outputs.append(sdpa_attention_forward(module, *qkv, mask, dropout, scaling, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for the model's own forward


def install(core) -> None:
    """Make the language model of `core` use `attend`, and its last layer compute only the `predicting` tokens.

    Raises:
        UserError: the model has layers whose attention is neither full nor within a sliding window.
    """
    config = core.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(f"packing has no mask for layers of {', '.join(sorted(unknown))}: give --no-pack")
    config._attn_implementation = NAME
    layers = getattr(core.get_decoder(), "layers", None)
    if layers is None or hasattr(layers[-1], "forest"):  # the second: hooks are there already
        return
    last = layers[-1]
    last.forest = None

    def keep_forest(_, args, kwargs):
        last.forest = kwargs.get("forest")

    def select_tokens(_, args):
        return args if last.forest is None else (args[0][:, last.forest.predicting], *args[1:])

    def restore_length(_, args, out):
        if last.forest is None:
            return out
        zeros = out.new_zeros(1, len(last.forest.node), out.shape[-1])
        return zeros.index_copy(1, last.forest.predicting, out)

    # The hook is on the attention: checkpointing may call the layer's forward without the layer's own hooks
    last.self_attn.register_forward_pre_hook(keep_forest, with_kwargs=True)
    for name, part in last.named_modules():
        if name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
            part.register_forward_pre_hook(select_tokens)
            part.register_forward_hook(restore_length)
