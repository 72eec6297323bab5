"""Where a prompt goes: to its prefix, while that is worth more than what it would wait for there."""

import zlib
from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.routing.affinity import Affinity
from serve_app.routing.prefix import BLOCK, Prefix
from tests.fakes import FakeClock

NAMES = ("a", "b", "c", "d")
IDLE = dict.fromkeys(NAMES, 0)
numbers = count()


def prompt(*parts: tuple[str, int], session: str = "") -> Prefix:
    """A prompt of parts, each of so many blocks that are equal where its name and what goes before are."""
    names = [f"{part} {block}" for part, blocks in parts for block in range(blocks)]
    keys = tuple(zlib.crc32("/".join(names[: end + 1]).encode()) for end in range(len(names)))
    return Prefix(keys, BLOCK * len(keys) + 10, session)


class Bench:
    """An ingress replica's knowledge, and replicas that take what they get."""

    def __init__(self, **options: float) -> None:
        self.clock = FakeClock()
        self.affinity = Affinity(100_000, clock=self.clock, **options)  # type: ignore[arg-type]

    def send(
        self, prefix: Prefix, queues: dict[str, int] = IDLE, needs: int = 0, full: tuple[str, ...] = ()
    ) -> tuple[str, str]:
        """A call that is under way: its id, and its replica."""
        call = f"call {next(numbers)}"
        self.affinity.expect(call, prefix, needs)
        order = [name for tier in self.affinity.order(call, queues) for name in tier]
        replica = next(name for name in order if name not in full)
        self.affinity.sent(call, replica)
        return call, replica

    def end(self, call: str, cached_tokens: int | None = None) -> int:
        """A call is answered, and its replica had what was expected, unless told otherwise."""
        made = self.affinity._calls[call]
        expected = self.affinity.found(call, made.held * BLOCK if cached_tokens is None else cached_tokens)
        self.affinity.ended(call)
        return expected

    def do(self, prefix: Prefix, queues: dict[str, int] = IDLE) -> str:
        call, replica = self.send(prefix, queues)
        self.end(call)
        return replica


def test_a_conversation_stays_where_it_began() -> None:
    bench = Bench()
    turns = [prompt(("system", 4), ("chat", 10 + 5 * turn)) for turn in range(8)]
    assert len({bench.do(turn) for turn in turns}) == 1


def test_what_a_replica_is_expected_to_hold_is_told() -> None:
    bench = Bench()
    bench.do(prompt(("chat", 10)))
    call, _ = bench.send(prompt(("chat", 10), ("more", 5)))
    assert bench.end(call) == 10 * BLOCK


def test_work_under_way_counts_against_a_prefix() -> None:
    """A replica that holds 10 blocks is worth waiting for 19 blocks of others, and not for 21."""
    for waits, goes in ((19, True), (21, False)):
        bench = Bench()
        home = bench.do(prompt(("chat", 10)))
        bench.clock.now += 1000  # what it did then does not count now
        bench.affinity._load(home).busy = waits * BLOCK
        assert (bench.send(prompt(("chat", 10), ("more", 1)))[1] == home) is goes


def test_calls_of_other_ingress_replicas_count_too() -> None:
    bench = Bench()
    home = bench.do(prompt(("chat", 10)))
    assert bench.do(prompt(("chat", 10)), IDLE | {home: 50}) != home


def test_prompts_that_share_nothing_are_spread_by_their_work() -> None:
    bench = Bench()
    work: Counter[str] = Counter()
    for index in range(200):
        prefix = prompt((f"own {index}", 5 + index % 20))
        work[bench.send(prefix)[1]] += prefix.tokens  # none of them ends
    assert max(work.values()) < 1.25 * work.total() / len(NAMES)


@pytest.mark.parametrize("own", [1, 8])
def test_a_prefix_that_all_share_does_not_pile_up_on_one(own: int) -> None:
    """Not even where each prompt is answered before the next comes, so that none ever waits."""
    bench = Bench()
    went: Counter[str] = Counter()
    for index in range(400):
        bench.clock.now += 0.05
        went[bench.do(prompt(("system", 30), (f"own {index}", own)))] += 1
    assert max(went.values()) < 2 * went.total() / len(NAMES), went


def test_new_conversations_begin_where_there_was_little_to_do() -> None:
    bench = Bench()
    begun: Counter[str] = Counter()
    for index in range(60):
        bench.clock.now += 0.5
        begun[bench.do(prompt(("system", 5), (f"chat {index}", 20)))] += 1
    assert max(begun.values()) < 1.4 * begun.total() / len(NAMES), begun


def test_a_session_stays_though_its_prompt_begins_anew() -> None:
    """Its window has moved on: only the first turns of the conversation are gone."""
    bench = Bench()
    for index in range(20):
        bench.do(prompt((f"other {index}", 20)))
    bench.clock.now += 1000
    home = bench.do(prompt(("chat", 10), session="s"))
    for turn in range(6):
        for index in range(8):
            bench.do(prompt((f"others {turn} {index}", 10)))
        assert bench.do(prompt((f"window {turn}", 10), session="s")) == home
    bench.affinity._load(home).busy = 100 * BLOCK
    assert bench.do(prompt(("window 7", 10), session="s")) != home, "while its load allows"


def test_ingress_replicas_agree_on_a_conversation_without_talking() -> None:
    """Each turn comes to another, which knows the system prompt that all conversations share, and not this one."""
    system = ("system", 6)
    benches = [Bench(guess=0.9) for _ in range(4)]
    for bench in benches:
        for name in NAMES:
            call, _ = bench.send(prompt(system), {name: 0})
            bench.end(call)
        bench.clock.now += 1000
    for chat in range(20):
        turns = [prompt(system, (f"chat {chat}", 5 + 3 * turn)) for turn in range(4)]
        assert len({bench.do(turn) for bench, turn in zip(benches, turns, strict=True)}) == 1


def test_a_session_is_found_by_other_ingress_replicas() -> None:
    assert len({Bench().do(prompt((f"turn {turn}", 5), session="s")) for turn in range(6)}) == 1


def test_how_far_others_can_be_relied_on_is_learnt() -> None:
    alone, among = Bench(), Bench()
    for index in range(40):
        call, _ = alone.send(prompt((f"chat {index}", 10)))
        alone.end(call, 0)
        call, _ = among.send(prompt((f"chat {index}", 10)))
        among.end(call, 10 * BLOCK)
    assert alone.affinity.guess < 0.1 < 0.9 < among.affinity.guess


def test_a_replica_that_is_gone_is_forgotten() -> None:
    bench = Bench()
    home = bench.do(prompt(("chat", 10), session="s"))
    left = {name: 0 for name in NAMES if name != home}
    bench.affinity.keep(left.keys())
    assert bench.affinity.blocks == 0
    call, other = bench.send(prompt(("chat", 10), session="s"), left)
    assert other != home
    assert bench.end(call) == 0


def test_how_likely_it_is_that_a_replica_still_holds_a_prompt_is_learnt_by_its_age() -> None:
    """Its cache is small: it finds prompts that it had just now, and none that it had before the last 64 blocks."""
    bench = Bench()
    for index in range(200):
        bench.do(prompt((f"chat {index}", 40)), {"a": 0})
        bench.do(prompt((f"chat {index}", 40)), {"a": 0})
        if index > 2:
            call, _ = bench.send(prompt((f"chat {index - 2}", 40)), {"a": 0})
            bench.end(call, 0)
    bench.affinity.right = 1.0
    assert bench.affinity.expected(prompt(("chat 199", 40)), {"a": 0}) == (40 * BLOCK, 1.0)
    bench.do(prompt(("chat 200", 40)), {"a": 0})
    expected, likely = bench.affinity.expected(prompt(("chat 198", 40)), {"a": 0})
    assert expected == 40 * BLOCK and likely < 0.1


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    bench = Bench()
    call, _ = bench.send(prompt(("chat", 10)))
    bench.affinity.ended(call)
    assert bench.affinity.blocks == 0
    assert all(load.busy == load.calls == 0 for load in bench.affinity._loads.values())
    assert bench.affinity._calls == {}


def test_a_call_whose_first_replica_is_full_counts_for_the_next() -> None:
    bench = Bench()
    first = bench.do(prompt(("chat", 10)))
    call, replica = bench.send(prompt(("chat", 12)), full=(first,))
    assert replica != first
    assert bench.affinity._loads[first].busy == 0
    assert bench.affinity._loads[replica].busy == prompt(("chat", 12)).tokens
    bench.end(call)
    assert bench.affinity._held[first].leading(prompt(("chat", 12)).keys) == 10


def test_a_call_that_needs_what_it_left_out_tries_those_first_that_hold_it() -> None:
    bench = Bench()
    home = bench.do(prompt(("chat", 10)))
    bench.affinity._load(home).busy = 1000 * BLOCK
    assert bench.send(prompt(("chat", 10)), needs=10 * BLOCK)[1] == home
    assert bench.send(prompt(("chat", 10)), needs=0)[1] != home


def test_what_a_replica_has_lost_is_expected_no_more() -> None:
    bench = Bench()
    bench.do(prompt(("chat", 10)))
    assert bench.affinity.expected(prompt(("chat", 10)), IDLE)[0] == 10 * BLOCK
    call, _ = bench.send(prompt(("chat", 10)), needs=10 * BLOCK)
    bench.affinity.lost(call)
    bench.affinity.ended(call)
    assert bench.affinity.expected(prompt(("chat", 10)), IDLE)[0] == 0


def test_expectations_are_relied_on_when_some_have_come_true() -> None:
    bench = Bench()
    bench.do(prompt(("chat", 10)))
    assert bench.affinity.expected(prompt(("chat", 10)), IDLE) == (10 * BLOCK, 0.0)
    for _ in range(20):
        bench.do(prompt(("chat", 10)))
    assert bench.affinity.expected(prompt(("chat", 10)), IDLE)[1] > 0.8


def test_a_sequence_that_is_decoded_counts_little_and_until_its_end() -> None:
    bench = Bench(sequence_tokens=100.0, guess=0.0)
    call, replica = bench.send(prompt(("chat", 50)))
    assert bench.affinity._loads[replica].busy == prompt(("chat", 50)).tokens + 100
    bench.affinity.found(call, 0)
    bench.affinity.began(call)
    assert bench.affinity._loads[replica].busy == 100
    bench.affinity.ended(call)
    assert bench.affinity._loads[replica].busy == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 30), st.booleans(), st.integers(0, 40), st.sampled_from("saxyz")),
        max_size=60,
    )
)
def test_whatever_happens_every_replica_is_named_once_and_the_counts_end_at_nothing(
    steps: list[tuple[int, int, bool, int, str]],
) -> None:
    bench = Bench(sequence_tokens=7.0)
    open_calls: list[str] = []
    for chat, blocks, ends, cached, session in steps:
        bench.clock.now += 1
        call = f"call {next(numbers)}"
        prefix = prompt((f"chat {chat}", blocks), session=session if session == "s" else "")
        bench.affinity.expect(call, prefix)
        tiers = bench.affinity.order(call, IDLE)
        assert sorted(name for tier in tiers for name in tier) == sorted(NAMES)
        bench.affinity.sent(call, NAMES[cached % 4])
        open_calls.append(call)
        if ends:
            done = open_calls.pop(0)
            bench.affinity.found(done, cached * BLOCK)
            bench.affinity.began(done)
            bench.affinity.ended(done)
    for call in open_calls:
        bench.affinity.ended(call)
    assert all(load.calls == 0 and abs(load.busy) < 1e-6 for load in bench.affinity._loads.values())
    assert bench.affinity._calls == {}


def test_a_prefix_with_which_many_prompts_begin_is_had_by_every_replica_soon() -> None:
    """Twelve clients at a time: two or three replicas with the prefix would never be so busy that another is worth it."""
    bench = Bench()
    open_calls: list[str] = []
    went: Counter[str] = Counter()
    for index in range(60):
        bench.clock.now += 0.05
        call, replica = bench.send(prompt(("system", 35), (f"own {index}", 7)))
        went[replica] += index >= 30
        open_calls.append(call)
        if len(open_calls) == 12:
            bench.end(open_calls.pop(0))
    assert set(went) == set(NAMES)
    assert max(went.values()) <= 10


def test_a_conversation_is_not_taken_for_such_a_prefix_though_its_turns_are_short() -> None:
    """Three turns end in the same block."""
    bench = Bench()
    keys = prompt(("chat", 60)).keys
    homes = [bench.do(Prefix(keys[: 10 + turn // 3], BLOCK * 10 + 20 * turn)) for turn in range(60)]
    assert len(set(homes)) == 1
