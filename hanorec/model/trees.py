"""Prompts as trees of tokens: a history, questions that continue it, and answers that continue a question.

A tree is a list of nodes, parents first; node 0 is the root. A path runs from the root to a node. It is one prompt, or
a prompt with one answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace


@dataclass
class Node:
    """A stretch of tokens in a tree.

    Args:
        parent: number of the node that this one continues; None for the root.
        images: item indices of the images whose tokens stand in it, in order.
        scored: offsets of the tokens whose log-probabilities are summed. A node with scored tokens is an answer.
    """

    parent: int | None
    ids: list[int]
    images: list[int] = field(default_factory=list)
    scored: Sequence[int] = ()


def tree_length(tree: list[Node]) -> int:
    """The number of tokens of the longest path: the most that the model sees at once."""
    ends: list[int] = []
    for node in tree:
        before = ends[node.parent] if node.parent is not None else 0
        ends.append(before + len(node.ids))
    return max(ends)


def merge_trees(trees: Iterable[list[Node]]) -> list[tuple[list[Node], list[int]]]:
    """Join neighbouring trees with equal roots, so that their history is computed once.

    Returns (tree, the numbers of its answers). Answers are numbered over all trees in order.
    """
    merged: list[tuple[list[Node], list[int]]] = []
    answers = 0
    for tree in trees:
        scored = sum(bool(node.scored) for node in tree)
        numbers = list(range(answers, answers + scored))
        answers += scored
        root = merged[-1][0][0] if merged else None
        if root and (root.ids, root.images) == (tree[0].ids, tree[0].images) and not tree[0].scored:
            joined, joined_numbers = merged[-1]
            shift = len(joined) - 1
            moved = [replace(node, parent=node.parent + shift if node.parent else 0) for node in tree[1:]]
            merged[-1] = (joined + moved, joined_numbers + numbers)
        else:
            merged.append((list(tree), numbers))
    return merged


def separate_paths(tree: list[Node]) -> list[list[Node]]:
    """For each answer of a tree, in order, a tree of one node: the whole path from the root to the answer."""
    paths: list[Node] = []
    for node in tree:
        before = paths[node.parent] if node.parent is not None else Node(None, [])
        scored = [len(before.ids) + offset for offset in node.scored]
        paths.append(Node(None, before.ids + node.ids, before.images + node.images, scored))
    return [[path] for path in paths if path.scored]


def common_length(prompts: Sequence[list[int]], image_token: int) -> int:
    """The number of tokens that these prompts all begin with, none of them an image token.

    It is less than the length of the shortest prompt.
    """
    first, shortest = prompts[0], min(map(len, prompts))
    for position in range(shortest - 1):
        token = first[position]
        if token == image_token or any(ids[position] != token for ids in prompts):
            return position
    return shortest - 1
