"""Interleaving by weights: which of several sources an item belongs to, so that every prefix holds their shares.

In: a weight for each source, and the number of an item (0, 1, 2, ...).
Out: its source, and which of that source's items it is; and back. Pure functions of exact integers, O(1) memory.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isfinite, lcm
from typing import NamedTuple

import numpy as np

# The vectorized division is exact up to here; the sum of larger weights is rounded to it.
LARGEST_TOTAL = 2**48


class _Node(NamedTuple):
    """Splits its items between two children: of its first n, (n * left + total // 2) // total go to the left one."""

    left: int  # weight
    total: int  # weight
    children: tuple["_Node | int", "_Node | int"]  # a leaf is the source's number


class _Step(NamedTuple):
    """From a node to one of its children, which gets (n * weight + offset) // total of the node's first n items."""

    weight: int
    total: int
    offset: int


class Mix:
    """Interleaves sources so that each prefix holds their shares: item p is the n-th of source s.

    A Huffman tree of the sources; each node deals its items to its two children as evenly as integers allow (a
    balanced word; Bresenham's line), and each child takes what it gets as its items 0, 1, 2, ...

    Of the first n items source s has n * weight[s] / sum(weights) within 1.68, whatever the number of sources: a node
    rounds by at most 1/2, of which a source inherits its share of the node's child. Along a path of a Huffman tree
    weights grow at least as Fibonacci's numbers do (an uncle weighs no less than either of its nephews), so that the
    shares sum to at most 1 + 1 + 1/2 + 1/3 + 1/5 + ... = 3.36. With two sources the bound is 1/2. After each
    sum(weights) items, the weights taken as the smallest integers of their ratios, the shares are exact.

    Args:
        weights: of the sources, in any unit; integers and fractions as they are, floats as their shortest decimal. A
            source of weight 0 gets nothing. Where the smallest integers of the ratios sum to more than 2^48, they
            are rounded to that precision, and to no less than 1.

    Raises:
        ValueError: a negative or infinite weight, or none that is positive.
    """

    def __init__(self, weights: Sequence[int | float | Fraction]) -> None:
        self.weights = _integers(weights)
        tree = [(weight, source, source) for source, weight in enumerate(self.weights) if weight]
        heap: list[tuple[int, int, _Node | int]] = list(tree)
        heapq.heapify(heap)
        number = len(self.weights)  # equal weights: sources in their order, then nodes in the order of their making
        while len(heap) > 1:
            (left, _, one), (right, _, other) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (left + right, number, _Node(left, left + right, (one, other))))
            number += 1
        self._root = heap[0][2]
        self._paths: dict[int, tuple[_Step, ...]] = {}
        self._collect(self._root, ())

    def _collect(self, node: _Node | int, path: tuple[_Step, ...]) -> None:
        if isinstance(node, int):
            self._paths[node] = path
            return
        half = node.total // 2
        self._collect(node.children[0], (*path, _Step(node.left, node.total, half)))
        self._collect(node.children[1], (*path, _Step(node.total - node.left, node.total, node.total - 1 - half)))

    def place(self, item: int) -> tuple[int, int]:
        """Source of the item, and which of that source's items it is: 0, 1, 2, ... in the order of the items.

        Raises:
            ValueError: negative item.
        """
        if item < 0:
            raise ValueError(f"item is {item}; allowed are integers from 0")
        node = self._root
        while not isinstance(node, int):
            before, after = ((n * node.left + node.total // 2) // node.total for n in (item, item + 1))
            if after > before:
                node, item = node.children[0], before
            else:
                node, item = node.children[1], item - before
        return node, item

    def places(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`place` of each item: sources and ordinals, int64 arrays of the shape of `items` (n,).

        Raises:
            ValueError: a negative item.
        """
        items = np.asarray(items, dtype=np.int64)
        if len(items) and (lowest := int(items.min())) < 0:
            raise ValueError(f"item is {lowest}; allowed are integers from 0")
        sources, ordinals = np.empty_like(items), np.empty_like(items)
        waiting: list[tuple[_Node | int, np.ndarray, np.ndarray]] = [(self._root, np.arange(len(items)), items)]
        while waiting:
            node, rows, numbers = waiting.pop()
            if isinstance(node, int):
                sources[rows], ordinals[rows] = node, numbers
                continue
            before = _dealt(numbers, node.left, node.total)
            left = _dealt(numbers + 1, node.left, node.total) > before
            for child, chosen, inherited in zip(node.children, (left, ~left), (before, numbers - before), strict=True):
                if chosen.any():
                    waiting.append((child, rows[chosen], inherited[chosen]))
        return sources, ordinals

    def count(self, source: int, items: int) -> int:
        """How many of the first `items` items are the source's; none where its weight is 0."""
        if source not in self._paths:
            return 0
        for step in self._paths[source]:
            items = (items * step.weight + step.offset) // step.total
        return items

    def item(self, source: int, ordinal: int) -> int:
        """The item that is the source's `ordinal`-th: the inverse of `place`.

        Raises:
            ValueError: the source has weight 0.
        """
        if source not in self._paths:
            raise ValueError(f"source {source} gets no items: its weight is 0")
        for step in reversed(self._paths[source]):  # the least n with (n * weight + offset) // total = ordinal + 1
            ordinal = -(((ordinal + 1) * step.total - step.offset) // -step.weight) - 1
        return ordinal


def _dealt(numbers: np.ndarray, left: int, total: int) -> np.ndarray:
    """(n * left + total // 2) // total for each n, exact for total up to 2^48.

    The product may have 96 bits: a float's quotient is off by less than 2, and its remainder, computed modulo 2^64 but
    smaller than that, says by how much.
    """
    rounds, numbers = np.divmod(numbers, total)
    quotients = (numbers.astype(np.float64) * left / total).astype(np.int64)
    remainders = numbers * left + total // 2 - quotients * total
    return rounds * left + quotients + remainders // total


def _integers(weights: Sequence[int | float | Fraction]) -> list[int]:
    for number, weight in enumerate(weights):
        if not isfinite(weight) or weight < 0:
            raise ValueError(f"weight {number} is {weight}; allowed are finite numbers from 0")
    exact = [Fraction(str(float(one))) if isinstance(one, float) else Fraction(one) for one in weights]
    if not any(exact):
        raise ValueError(f"the weights are {list(map(float, exact))}; at least one has to be positive")
    unit = lcm(*(one.denominator for one in exact))
    whole = [int(one * unit) for one in exact]
    whole = [one // gcd(*whole) for one in whole]
    if (total := sum(whole)) > LARGEST_TOTAL:
        room = LARGEST_TOTAL - len(whole)  # each may be rounded up
        whole = [max(1, round(Fraction(one * room, total))) if one else 0 for one in whole]
    return whole
