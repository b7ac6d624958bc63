"""The cache of states: what it finds is the longest part that is known, and it stays in its bounds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba import State
from moemamba.inference.cache import EVERY, LEAST, Snapshot, StateCache

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=40).map(tuple)
ROOTS = st.sampled_from([None, "a"])


def snapshot(position, size=10):
    return Snapshot(State(()), torch.zeros(size), position)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.booleans(), ROOTS, TOKENS), max_size=40))
def test_the_longest_known_part(actions):
    cache, known = StateCache(1 << 30), {}
    for puts, root, tokens in actions:
        if puts:
            found = snapshot(len(tokens))
            cache.put(root, tokens, found)
            known.setdefault((root, tokens), found)
            assert len(cache) == len(known) and cache.nbytes == 40 * len(known)
            continue
        parts = [size for size in range(1, len(tokens) + 1) if (root, tokens[:size]) in known]
        size, found, places = cache.find(root, tokens)
        assert size == max(parts, default=0)
        assert found is (known[root, tokens[:size]] if parts else None)
        paths = [other for key, other in known if key == root]
        shared = max((_shared(tokens, other) for other in paths), default=0)
        expected = {len(tokens)} | ({shared} if shared - size >= LEAST else set())
        assert set(places) == {place for place in expected if place > size}


def _shared(a, b):
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 400), st.lists(st.tuples(st.booleans(), TOKENS, st.integers(1, 60)), max_size=60))
def test_it_stays_in_its_bounds(limit, actions):
    cache = StateCache(limit)
    for puts, tokens, size in actions:
        if puts:
            cache.put(None, tokens, snapshot(len(tokens), size))
        else:
            depth, found, _ = cache.find(None, tokens)
            assert found is None or found.position == depth
        assert cache.nbytes <= limit and (len(cache) > 0) == (cache.nbytes > 0)
    nodes, left = 0, list(cache._roots.values())
    while left:
        node = left.pop()
        nodes += node.snapshot is not None
        assert node.snapshot is not None or node.below, "no path leads nowhere"
        left += node.below.values()
    assert nodes == len(cache) and len(cache._heap) <= 4 * len(cache) + 65
    cache.clear()
    assert len(cache) == cache.nbytes == 0


def test_who_is_asked_for_stays():
    cache = StateCache(3 * 40)
    for first in range(3):
        cache.put(None, (first, 9), snapshot(2))
    for _ in range(3):
        for other in range(10, 14):
            assert cache.find(None, (0, 9))[0] == 2
            cache.put(None, (other, 9), snapshot(2))
    assert cache.find(None, (0, 9))[0] == 2 and cache.find(None, (1, 9))[0] == 0


def test_long_prompts_are_kept_now_and_then():
    tokens = [1] * (3 * EVERY + 5)
    assert StateCache(100).find(None, tokens)[2] == (EVERY, 2 * EVERY, 3 * EVERY, len(tokens))
    assert StateCache(3).put(None, tokens, snapshot(9)) is None, "what does not fit is not kept"
