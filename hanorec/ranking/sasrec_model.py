"""The model of SASRec, and its loss on windows of sequences."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

NO_TARGET = -100  # stands for the target at a padded position, which has no loss


class SASRec(nn.Module):
    """SASRec with one table of item vectors for input and output.

    Args:
        items: the number of items N.
    """

    def __init__(self, items: int, width: int, blocks: int, heads: int, length: int, dropout: float):
        super().__init__()
        self.items, self.positions = nn.Embedding(items, width), nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(
                nn.TransformerEncoderLayer(width, heads, width, dropout, batch_first=True, norm_first=True)
            )
            self.blocks[-1].self_attn.dropout = 0.0  # dropout of attention weights is slow on a CPU
        self.norm = nn.LayerNorm(width)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Return the state [B, L, d] that predicts the item after each position. sequences: [B, L] item indices.

        The score of an item is the product of its vector and the state. A sequence is padded at its end, where no
        position of the sequence sees the padding.
        """
        length = sequences.shape[1]
        states = self.dropout(self.items(sequences) + self.positions.weight[:length])
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=sequences.device)
        for block in self.blocks:
            states = block(states, src_mask=causal, is_causal=True)
        return self.norm(states)


def padded(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return the sequences as a tensor [B, L], each filled up with `value` at its end."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def next_item_loss(model: SASRec, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the mean cross-entropy, over all items, of each next item of the windows.

    Args:
        windows: item indices, oldest first; each has two items or more.
    """
    device = model.items.weight.device
    states = model(padded([window[:-1] for window in windows], 0).to(device))
    targets = padded([window[1:] for window in windows], NO_TARGET).to(device)
    there = targets != NO_TARGET
    logits = states[there] @ model.items.weight.T  # [positions, N]
    return functional.cross_entropy(logits, targets[there])
