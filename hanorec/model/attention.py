"""Attention over prompt trees laid end to end, as an attention function of transformers.

The rows of a batch stand behind one another in one sequence, so that nothing is padding. The tokens of a row's root
attend to the tokens before them, which needs no mask (and has fused kernels). The questions and answers behind the root
attend to it and to their own branch, with a mask. In the last layer, queries, output and MLP are computed only for the
tokens that predict something.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "prompt_trees"


@dataclass
class Forest:
    """What the T tokens of a batch may attend to.

    Args:
        rows: (tokens of its root, tokens in all) of each row.
        node: [T], the node of each token, numbered over all rows.
        depth: [T], how many tokens come before each token on its path.
        visible: [nodes, nodes], True for a node's ancestors and the node itself.
        wanted: the tokens whose last hidden states are used.
        image: [T], the number of each token's image, 0 for text; None if images are attended to like text.
    """

    rows: list[tuple[int, int]]
    node: torch.Tensor
    depth: torch.Tensor
    visible: torch.Tensor
    wanted: torch.Tensor
    image: torch.Tensor | None = None
    _pieces: dict = field(default_factory=dict)

    def pieces(self, window: int | None) -> list[tuple[slice, slice, torch.Tensor | None]]:
        """The attention in pieces, in the order of the tokens: (queries, keys, mask). No mask means causal.

        Args:
            window: how many tokens back a layer looks, the token itself counted; None for no limit.
        """
        if window not in self._pieces:  # the layers share them
            self._pieces[window] = list(self._cut(window))
        return self._pieces[window]

    def _cut(self, window: int | None) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
        start = 0
        for root, length in self.rows:
            row = slice(start, start + length)
            near = window is None or length <= window
            plain = root if near and self.image is None else 0  # tokens that need no mask
            if plain:
                yield slice(start, start + plain), slice(start, start + plain), None
            if plain < length:
                rest = slice(start + plain, start + length)
                yield rest, row, self._mask(rest, row, None if near else window)
            start += length

    def _mask(self, queries: slice, keys: slice, window: int | None) -> torch.Tensor:
        """[1, 1, queries, keys], True where a query attends to a key."""
        mask = self.visible[self.node[queries]][:, self.node[keys]].tril(queries.start - keys.start)
        if self.image is not None:
            one, other = self.image[queries, None], self.image[None, keys]
            mask = mask | ((one == other) & (one > 0))
        if window is not None:
            mask = mask & (self.depth[queries, None] - self.depth[None, keys] < window)
        return mask[None, None]


def attend(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, forest=None, **kwargs
):
    """An attention function of transformers: by the forest that the language model passes on, or `sdpa` without one."""
    if forest is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    outputs = []
    for queries, keys, mask in forest.pieces(sliding_window):
        qkv = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        outputs.append(sdpa_attention_forward(module, *qkv, mask, dropout, scaling, **kwargs | {"is_causal": True})[0])
    return torch.cat(outputs, dim=1), None  # [1, T, heads, d]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for the model's own forward


def install(core) -> None:
    """Let the language model of `core` attend by `attend`, and its last layer compute only the wanted tokens."""
    core.config.get_text_config()._attn_implementation = NAME
    layer = getattr(core.get_decoder(), "layers", [None])[-1]
    if layer is None or hasattr(layer, "forest"):  # installed before
        return
    layer.forest = None

    def take_forest(_, args, kwargs):
        layer.forest = kwargs.get("forest")

    def shorten(_, args):
        return args if layer.forest is None else (args[0][:, layer.forest.wanted], *args[1:])

    def lengthen(_, args, out):
        if layer.forest is None:
            return out
        zeros = out.new_zeros(1, len(layer.forest.node), out.shape[-1])
        return zeros.index_copy(1, layer.forest.wanted, out)

    layer.self_attn.register_forward_pre_hook(take_forest, with_kwargs=True)  # checkpointing may call a layer's forward
    for name, part in layer.named_modules():
        if name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
            part.register_forward_pre_hook(shorten)
            part.register_forward_hook(lengthen)
