"""Prompts as trees of tokens: a history, questions that continue it, and answers that continue a question.

A tree is a list of nodes, parents first; node 0 is the root. A path runs from the root to a node. It is one prompt, or
a prompt with one answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace


@dataclass
class Node:
    """Consecutive tokens of a tree, which continue those of the parent.

    Args:
        parent: number of the parent node; None for the root.
        images: item indices of the images whose tokens are among `ids`, in order.
        scored: offsets in `ids` of the tokens whose log-probabilities are summed. A node with scored tokens counts as
            one answer. Besides answers, it can be a root (the warm-up scores titles of the history) or a question
            (mllm_srec scores its steps).
    """

    parent: int | None
    ids: list[int]
    images: list[int] = field(default_factory=list)
    scored: Sequence[int] = ()


def tree_length(tree: list[Node]) -> int:
    """Return the number of tokens of the longest path: the longest sequence that a token attends to."""
    ends: list[int] = []
    for node in tree:
        before = 0 if node.parent is None else ends[node.parent]
        ends.append(before + len(node.ids))
    return max(ends)


def merge_trees(trees: Iterable[list[Node]]) -> list[tuple[list[Node], list[int]]]:
    """Join neighbouring trees with equal roots that are not scored, so that their root is computed once.

    Returns a list of (tree, the numbers of its answers). Answers are numbered over all trees in order.
    """
    merged: list[tuple[list[Node], list[int]]] = []
    count = 0
    for tree in trees:
        answers = len([node for node in tree if node.scored])
        numbers = list(range(count, count + answers))
        count += answers
        last, last_numbers = merged[-1] if merged else ([], [])
        if last and not tree[0].scored and (last[0].ids, last[0].images) == (tree[0].ids, tree[0].images):
            shift = len(last) - 1  # the root is node 0 in both trees; the other nodes get higher numbers
            for node in tree[1:]:
                last.append(replace(node, parent=node.parent + shift if node.parent else 0))
            last_numbers += numbers
        else:
            merged.append((list(tree), numbers))
    return merged


def separate_paths(tree: list[Node]) -> list[list[Node]]:
    """Return, for each answer of a tree in order, a tree of one node: the path from the root to the answer."""
    paths: list[Node] = []
    for node in tree:
        before = Node(None, []) if node.parent is None else paths[node.parent]
        scored = [len(before.ids) + offset for offset in node.scored]
        paths.append(Node(None, before.ids + node.ids, before.images + node.images, scored))
    return [[path] for path in paths if path.scored]
