"""Attention over prompt trees laid end to end, as an attention function of transformers.

The rows of a batch stand behind one another in one sequence, so that nothing is padding. The tokens of a row's root
attend to what comes before them in it, which needs no mask (and has fused kernels); the questions and answers behind it
attend to it and to their own branch, by a mask of their own. In the last layer, only of the tokens that predict
something the queries, the output and the MLP are computed.
"""

from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "prompt_trees"


@dataclass
class Forest:
    """What the tokens of a batch, T of them in rows end to end, may attend to.

    rows: (tokens of its root, tokens in all) of each row. node, depth [T]: the node a token is of, numbered over all
    rows, and how many tokens come before it on its path; visible [nodes, nodes]: True where a node's ancestor-or-self.
    wanted: the tokens whose last hidden states are used. image [T]: the number of a token's image, 0 where it is none,
    where images are attended in both directions (else None).
    """

    rows: list[tuple[int, int]]
    node: torch.Tensor
    depth: torch.Tensor
    visible: torch.Tensor
    wanted: torch.Tensor
    image: torch.Tensor | None = None
    _pieces: dict = field(default_factory=dict)

    def pieces(self, window: int | None) -> list[tuple[slice, slice, torch.Tensor | None]]:
        """(queries, keys, mask), in the order of the tokens; without a mask, a key attends to those before it. window:
        how many tokens back a layer looks, the token itself counted."""
        if window not in self._pieces:  # the layers share it
            self._pieces[window] = list(self._cut(window))
        return self._pieces[window]

    def _cut(self, window: int | None):
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
    """Attend by the forest, an argument that the language model passes on, or as `sdpa` where there is none."""
    if forest is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    found = []
    for queries, keys, mask in forest.pieces(sliding_window):
        qkv = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        found.append(sdpa_attention_forward(module, *qkv, mask, dropout, scaling, **kwargs | {"is_causal": True})[0])
    return torch.cat(found, dim=1), None  # [1, T, heads, d]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for the model's own forward


def install(core) -> None:
    """Have the language model of `core` attend by `attend`, and its last layer compute only what is wanted."""
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
