"""What prompts leave behind: states at places of token sequences, so that nobody reads the same text twice."""

import heapq
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from ..state import State

EVERY = 2048
"""positions of a long prompt after which its state is kept"""
LEAST = 16
"""positions below which a state where paths part saves less than it costs"""
Key = str | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that is needed to go on from a place in a sequence, as a value.

    Attributes:
        state: of one row.
        hidden: (d,) what the head sees there, so that the next token needs no reading.
        position: tokens so far.
        tail: the last of them, which the text that follows may depend on; at most `request.TAIL`.
        name: of this value and no other.
    """

    state: State
    hidden: Tensor
    position: int
    tail: tuple[int, ...] = ()
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    @property
    def nbytes(self) -> int:
        """Size of its tensors in bytes."""
        return self.state.nbytes + self.hidden.nbytes


class _Node:
    """A place in the tree: the tokens that lead to it from the one above, and what is known there."""

    __slots__ = ("above", "below", "edge", "order", "snapshot", "worth")

    def __init__(self, edge: tuple[int, ...], above: "_Node | None"):
        self.edge, self.above = edge, above
        self.below: dict[int, _Node] = {}
        self.snapshot: Snapshot | None = None
        self.worth, self.order = 0.0, 0


class StateCache:
    """A tree of token sequences with snapshots at some places, of bounded size.

    Who is asked for least, saves least and takes most room goes first: GreedyDual-Size (Cao and Irani 1997) with the
    tokens that a snapshot saves as its cost.

    Args:
        limit: bytes of all snapshots.
    """

    def __init__(self, limit: int):
        self.limit, self.nbytes, self.queries, self.hits = limit, 0, 0, 0
        self._roots: dict[Key, _Node] = {}
        self._heap: list[tuple[float, int, _Node]] = []
        self._count, self._age = count(1), 0.0
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    def find(self, root: Key, tokens: Sequence[int]) -> tuple[int, Snapshot | None, tuple[int, ...]]:
        """What is known of a sequence after `root`, a snapshot's name or None.

        Returns:
            how many of its tokens the longest known part has, its snapshot, and where states are worth keeping: at
            its end, where it leaves a known path, and now and then in between.
        """
        node, depth, known = self._roots.get(root), 0, 0
        found: _Node | None = None
        while node is not None:
            if node.snapshot is not None:
                found, known = node, depth
            below = node.below.get(tokens[depth]) if depth < len(tokens) else None
            if below is None:
                break
            same = _same(below.edge, tokens, depth)
            depth += same
            if same < len(below.edge):
                break
            node = below
        places = {*range(EVERY, len(tokens), EVERY), len(tokens)}
        if depth - known >= LEAST:
            places.add(depth)
        self.queries += len(tokens)
        self.hits += known
        if found is not None:
            self._rate(found, known)
        snapshot = None if found is None else found.snapshot
        return known, snapshot, tuple(sorted(place for place in places if place > known))

    def put(self, root: Key, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Keep what a sequence leaves; what does not fit is not kept, and what is known stays as it is."""
        if snapshot.nbytes > self.limit:
            return
        node, above = self._node(root, tokens)
        if node.snapshot is None:
            node.snapshot = snapshot
            self.nbytes += snapshot.nbytes
            self._entries += 1
            self._rate(node, max(len(tokens) - above, 1))
            while self.nbytes > self.limit:
                self._evict()

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._heap.clear()
        self.nbytes = self._entries = 0

    def _node(self, root: Key, tokens: Sequence[int]) -> tuple[_Node, int]:
        """The node of a sequence, made if need be, and how far above it the next snapshot is."""
        node, depth, above = self._roots.setdefault(root, _Node((), None)), 0, 0
        while depth < len(tokens):
            if node.snapshot is not None:
                above = depth
            below = node.below.get(tokens[depth])
            if below is None:
                below = node.below[tokens[depth]] = _Node(tuple(tokens[depth:]), node)
            same = _same(below.edge, tokens, depth)
            if same < len(below.edge):
                below = _split(below, same)
            node, depth = below, depth + same
        return node, above

    def _rate(self, node: _Node, saved: int) -> None:
        """Renew what a node is worth; of its entries in the heap the last one counts."""
        assert node.snapshot is not None
        node.worth = self._age + saved / max(node.snapshot.nbytes, 1)
        node.order = next(self._count)
        heapq.heappush(self._heap, (node.worth, node.order, node))
        if len(self._heap) > 4 * self._entries + 64:
            self._heap = [entry for entry in self._heap if entry[1] == entry[2].order]
            heapq.heapify(self._heap)

    def _evict(self) -> None:
        worth, order, node = heapq.heappop(self._heap)
        if order != node.order or node.snapshot is None:
            return
        self._age = worth
        self.nbytes -= node.snapshot.nbytes
        self._entries -= 1
        node.snapshot = None
        while node.above is not None and node.snapshot is None and not node.below:  # paths that lead nowhere
            del node.above.below[node.edge[0]]
            node = node.above
        if node.above is None and node.snapshot is None and not node.below:
            self._roots = {key: root for key, root in self._roots.items() if root is not node}


def _same(edge: tuple[int, ...], tokens: Sequence[int], depth: int) -> int:
    """How many tokens of an edge the sequence has from `depth` on."""
    own = tuple(tokens[depth : depth + len(edge)])
    if own == edge:
        return len(edge)
    return next((place for place, (a, b) in enumerate(zip(edge, own, strict=False)) if a != b), len(own))


def _split(node: _Node, size: int) -> _Node:
    """A node in the middle of an edge; returns it."""
    assert node.above is not None
    middle = _Node(node.edge[:size], node.above)
    node.above.below[node.edge[0]] = middle
    node.edge, node.above = node.edge[size:], middle
    middle.below[node.edge[0]] = node
    return middle
