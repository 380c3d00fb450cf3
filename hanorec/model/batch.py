"""A batch of prompt trees as tensors: laid end to end on the CPU, and moved to the device that scores it.

All that depends on the values of tensors is computed here. On a GPU the host would have to wait for such values.
"""

import itertools
from dataclasses import dataclass, field

import torch
from accelerate.utils import send_to_device

from hanorec.model.images import ImageTokens


@dataclass
class Batch:
    """Prompt trees as one sequence of T tokens, with A answers that have S scored tokens (see `PackedMLLM.collate`).

    Args:
        segments, node, depth, visible: see attention.Forest.
        images: (number of images, number of image tokens) of each segment.
        scored: (number of scored tokens, number of tokens from the first that predicts one to the end) of each segment.
        input_ids: [T].
        position_ids: [P, 1, T]; P is 3 for multimodal positions (Qwen), else 1.
        image_tokens: [n, width], the image tokens of all images in order; empty with live images.
        grids: [images, 3].
        predicting: [K], the indices of the tokens that predict a scored token, ascending. A token predicts the tokens
            that follow it on a path.
        predicted_by: [S], for each scored token the index in `predicting` of the token before it on its path.
        target: [S], the id of each scored token.
        answer: [S], the number of each scored token's answer.
        answers: [A], the number of scored tokens of each answer.
        pixels: with live images, the vision tower's inputs for the distinct images.
        sizes: with live images, (item id, number of tokens when the data was encoded) of each distinct image.
        distinct: with live images, for each image its number among the distinct images.
    """

    segments: list[tuple[int, int]]
    images: list[tuple[int, int]]
    scored: list[tuple[int, int]]
    input_ids: torch.Tensor
    node: torch.Tensor
    depth: torch.Tensor
    visible: torch.Tensor
    position_ids: torch.Tensor
    image_tokens: torch.Tensor
    grids: torch.Tensor
    predicting: torch.Tensor
    predicted_by: torch.Tensor
    target: torch.Tensor
    answer: torch.Tensor
    answers: torch.Tensor
    pixels: dict | None = None
    sizes: list[tuple[str, int]] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)

    def to(self, device) -> "Batch":
        """Return the batch with its tensors on `device`."""
        return Batch(**send_to_device(vars(self), device, non_blocking=True))

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory. The host need not wait while a GPU copies from there."""
        return Batch(**pinned(vars(self)))


def pinned(value):
    """Return the tensors of a dict or a tuple in pinned memory. Other values are returned as they are."""
    if isinstance(value, dict):
        return {name: pinned(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(pinned, value))
    return value.pin_memory() if torch.is_tensor(value) else value


def make_batch(segments, images, ids, positions, parents, scored, scored_counts, tokens: ImageTokens) -> Batch:
    """Return the Batch of trees that `PackedMLLM.collate` laid end to end.

    Args:
        images: the item indices of each segment's images.
        ids: the tokens. positions: [P, tokens] of each node.
        parents: number of each node's parent in the batch; a root's own number.
        scored: (number of the node, offset in it, answer) of each scored token.
        scored_counts: the number of scored tokens of each segment.
    """
    input_ids, lengths = torch.tensor(ids), torch.tensor([position.shape[1] for position in positions])
    visible = torch.eye(len(parents), dtype=torch.bool)
    for number, parent in enumerate(parents):
        visible[number] |= visible[parent]
    starts = lengths.cumsum(0) - lengths
    depths = (visible * lengths).sum(1) - lengths  # of each node: the number of tokens before it on its path
    index, predicted_from, answer = scored_tokens(scored, parents, starts, lengths)
    predicting, predicted_by = predicted_from.unique(return_inverse=True)
    ends = itertools.accumulate(length for _, length in segments)
    parts = predicted_from.split(scored_counts)
    to_end = [end - min(part.tolist(), default=end) for end, part in zip(ends, parts, strict=True)]
    batch = Batch(
        segments=segments,
        images=[(len(segment), sum(tokens.lengths[item] for item in segment)) for segment in images],
        scored=list(zip(scored_counts, to_end, strict=True)),
        input_ids=input_ids,
        node=torch.arange(len(parents)).repeat_interleave(lengths),
        depth=torch.arange(len(ids)) - (starts - depths).repeat_interleave(lengths),
        visible=visible,
        position_ids=torch.cat(positions, dim=1)[:, None],
        predicting=predicting,
        predicted_by=predicted_by,
        target=input_ids[index],
        answer=answer,
        answers=answer.bincount(),
        **image_parts([item for segment in images for item in segment], tokens),
    )
    return batch.pinned() if torch.cuda.is_available() else batch


def scored_tokens(scored: list, parents: list[int], starts: torch.Tensor, lengths: torch.Tensor):
    """Find the scored tokens in a batch.

    Args:
        scored, parents: see `make_batch`. starts, lengths: [nodes], the first token and the number of tokens of nodes.

    Returns (index of each scored token, index of the token that predicts it, number of its answer), each [S].
    """
    node, offset, answer = torch.tensor(scored).reshape(-1, 3).T
    index = starts[node] + offset
    end_of_parent = (starts + lengths)[torch.tensor(parents)[node]]
    return index, torch.where(offset > 0, index, end_of_parent) - 1, answer


def image_parts(items: list[int], tokens: ImageTokens) -> dict:
    """Return the parts of a Batch that hold images, by name. items: the item index of each image, in order."""
    distinct = list(dict.fromkeys(items)) if tokens.live else []
    pixels, sizes = tokens.pixels(distinct) if distinct else (None, [])
    stored = [] if tokens.live else [tokens.of(item) for item in items]
    return {
        "image_tokens": torch.cat(stored) if stored else torch.zeros(0, 0),
        "grids": tokens.grids[items],
        "pixels": pixels,
        "sizes": sizes,
        "distinct": [distinct.index(item) for item in items] if distinct else [],
    }
