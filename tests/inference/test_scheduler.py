"""The scheduler, whatever comes in whatever order: nobody is lost, every slot is freed, none starves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moemamba.inference.scheduler import Scheduler

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 40), st.integers(1, 6)),  # a prompt's length, tokens to decode
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
    ),
    max_size=30,
)
SIZES = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
KNOWN = st.tuples(st.integers(0, 40), st.lists(st.integers(1, 40), max_size=3), st.booleans())


class World:
    """A scheduler with requests that decode some tokens each; every step is checked.

    Of prompts some is known when they are admitted, parts of them end at cuts, and some wait for the one before.
    """

    def __init__(self, sizes, known=()):
        self.scheduler, self.sizes, self.known = Scheduler(*sizes), sizes, known
        self.lengths, self.wanted, self.read, self.begun, self.ended = {}, {}, {}, [], []
        self.cuts, self.leaders = {}, {}

    def add(self, length, wanted):
        number = len(self.lengths)
        self.lengths[number], self.wanted[number], self.read[number] = length, wanted, 0
        self.scheduler.add(number, length)

    def abort(self, number):
        if number in self.lengths and number not in self.ended:
            self.scheduler.finish(number)
            self.ended.append(number)
            self.leaders.pop(number, None)
            for other in [other for other, leader in self.leaders.items() if leader == number]:
                del self.leaders[other]
                self.scheduler.begin(other, 0)  # nobody reads it for this one

    def admit(self):
        for number in self.scheduler.admit():
            assert number not in self.ended and number not in self.begun
            self.begun.append(number)
            length = self.lengths[number]
            done, cuts, waits = self.known[number % len(self.known)] if self.known else (0, [], False)
            reads = number - 1 in self.read and number - 1 not in self.ended and self.read[number - 1] < length
            if waits and reads and length == self.lengths[number - 1] and number - 1 not in self.leaders:
                self.leaders[number] = number - 1
                self.scheduler.hold(number)
                continue
            self.read[number], self.cuts[number] = min(done, length), sorted(cuts)
            self.scheduler.begin(number, self.read[number], self.cuts[number])

    def step(self):
        slots, chunk, piece, alone = self.sizes
        self.admit()
        live = self.scheduler.live
        parts = self.scheduler.plan()
        chunk = chunk if live else alone
        assert sum(part.last - part.first for part in parts) <= chunk
        assert len({part.request for part in parts}) == len(parts)
        for number, first, last, ends in parts:
            assert number not in self.ended and number not in live
            assert number not in self.leaders
            assert first == self.read[number] and first <= last <= min(first + piece, self.lengths[number])
            assert first < last or last == self.lengths[number]
            assert not any(first < cut < last for cut in self.cuts.get(number, ()))
            self.read[number] = last
            assert ends == (last == self.lengths[number])
            for other in [other for other, leader in self.leaders.items() if ends and leader == number]:
                del self.leaders[other]
                self.read[other] = last
                self.scheduler.ready(other)
        for number in live:  # every live row gets a token
            assert number not in self.ended and self.read[number] == self.lengths[number]
            self.wanted[number] -= 1
            if self.wanted[number] == 0:
                self.abort(number)
        assert 0 <= self.scheduler.free <= slots
        assert bool(parts) or bool(live) or not self.scheduler.busy, "a step does something"


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(SIZES, st.lists(KNOWN, max_size=4), ACTIONS)
def test_no_request_is_lost_and_every_slot_is_freed(sizes, known, actions):
    world = World(sizes, known)
    for action, value, other in actions:
        if action == "add":
            world.add(value, other)
        elif action == "abort":
            world.abort(value)
        else:
            for _ in range(value):
                world.step()
    bound = 2 * sum(world.lengths.values()) + sum(world.wanted.values()) + len(world.lengths)
    steps = 0
    while world.scheduler.busy:
        world.step()
        steps += 1
        assert steps <= bound, "none starves"
    assert sorted(world.ended) == list(world.lengths) and world.scheduler.free == sizes[0]
    assert world.begun == sorted(world.begun), "first come, first served"
    assert not world.leaders and world.scheduler.waiting == 0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(1, 60), st.integers(1, 6))
def test_a_long_prompt_holds_up_no_short_one(chunk, length, others):
    """A short prompt has three of four steps to itself, however long the others are."""
    scheduler = Scheduler(others + 1, chunk, 1 << 20)
    for number in range(others):
        scheduler.add(number, 1 << 20)
    scheduler.plan()
    scheduler.add(others, length)
    steps = 0
    while others not in scheduler.live:
        scheduler.plan()
        steps += 1
    own = -(-length // chunk)
    assert steps <= own + -(-own // 3)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(1, 100), st.integers(1, 12))
def test_a_long_prompt_does_not_starve(chunk, length, short):
    """However many short prompts come, one step of four is its own."""
    scheduler = Scheduler(4, chunk, 1 << 20)
    scheduler.add(0, length + short)
    number = steps = 0
    while 0 not in scheduler.live:
        while scheduler.free:
            number += 1
            scheduler.add(number, short)
            scheduler.admit()
        for part in scheduler.plan():
            if part.ends and part.request:
                scheduler.finish(part.request)
        steps += 1
    assert steps <= 4 * -(-(length + short) // chunk)


def test_who_has_least_left_is_read_first():
    scheduler = Scheduler(8, 10, 6)
    for number, length in enumerate((20, 2, 9, 9)):
        scheduler.add(number, length)
    read = [{part.request: part.last - part.first for part in scheduler.plan()} for _ in range(5)]
    assert read[:3] == [{1: 2, 2: 6, 3: 2}, {2: 3, 3: 6, 0: 1}, {3: 1, 0: 6}], "no more than a piece"
    scheduler = Scheduler(8, 10, 100)
    for number, length in enumerate((90, 60)):
        scheduler.add(number, length)
    assert [scheduler.plan()[0].request for _ in range(8)] == [1, 1, 1, 0, 1, 1, 1, 0]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.floats(1e-4, 0.02), st.floats(1e-6, 5e-4), st.sampled_from((8, 64, 500)), st.lists(st.floats(0.2, 5)))
def test_a_step_takes_as_long_as_it_may(fixed, each, chunk, noise):
    """Of a machine on which a step takes a fixed time and some for each position, whatever happened before."""
    gap = 0.03
    scheduler = Scheduler(4, chunk, 2048, gap=gap)
    scheduler.add(0, 1)
    scheduler.plan()  # decodes from now on
    scheduler.took(100.0)
    scheduler.add(1, 1 << 30)
    for times in noise + [1.0] * 60:
        (part,) = scheduler.plan()
        count = part.last - part.first
        assert chunk <= count <= 2048
        scheduler.took(times * (took := fixed + each * count))
    assert took <= gap or count == chunk, "never fewer"
    assert took >= 0.6 * gap or count == 2048


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1, 0)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(ValueError, match="it must be 1 or more"):
        Scheduler(*sizes)


def test_requests_that_are_not_known():
    scheduler = Scheduler(1, 1, 1)
    with pytest.raises(ValueError, match="request 3 is not known"):
        scheduler.finish(3)
