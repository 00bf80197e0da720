"""adaptive.py and client.py: the policy as a pure function, and the client that follows it."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.adaptive import Level, Moment, Policy, pressure, step
from export.client import AdaptiveClient, Failed, Refused, high_quantile, is_refusal
from patchrank.errors import UserError

policies = st.builds(
    Policy, num_levels=st.integers(1, 5), target_ms=st.just(100.0), patience=st.integers(1, 4), max_patience=st.just(16)
)
moments = st.builds(Moment, latency_ms=st.floats(0, 400), refused=st.sampled_from([0, 0, 0, 1, 7]))
SLOW, CALM, BETWEEN = Moment(latency_ms=300), Moment(latency_ms=10), Moment(latency_ms=75)


def walk(policy: Policy, seen: list[Moment], now: Level | None = None) -> list[Level]:
    levels = [now or Level()]
    for moment in seen:
        levels.append(step(policy, levels[-1], moment))
    return levels


@settings(max_examples=25, deadline=None)
@given(policies, st.lists(moments, max_size=30), moments, moments)
def test_more_pressure_never_keeps_more(policy: Policy, past: list[Moment], one: Moment, other: Moment) -> None:
    now = walk(policy, past)[-1]
    assert 0 <= now.level < policy.num_levels
    less, more = sorted((one, other), key=lambda moment: pressure(policy, moment))
    assert step(policy, now, less).level <= step(policy, now, more).level


@settings(max_examples=25, deadline=None)
@given(policies, st.lists(moments, max_size=30), st.floats(50.0, 100.0), st.integers(1, 40))
def test_between_the_thresholds_nothing_changes(policy: Policy, past: list[Moment], latency: float, count: int) -> None:
    now = walk(policy, past)[-1]
    levels = walk(policy, [Moment(latency_ms=latency)] * count, now)
    assert {level.level for level in levels} == {now.level}


@settings(max_examples=25, deadline=None)
@given(policies, st.lists(moments, max_size=30))
def test_it_reaches_both_ends(policy: Policy, past: list[Moment]) -> None:
    now = walk(policy, past)[-1]
    assert walk(policy, [SLOW] * policy.num_levels, now)[-1].level == policy.num_levels - 1
    assert walk(policy, [Moment(refused=1)], now)[-1].level == policy.num_levels - 1
    assert walk(policy, [CALM] * (policy.num_levels * policy.max_patience), now)[-1].level == 0


def test_a_load_between_two_levels_is_tried_ever_more_rarely() -> None:
    policy = Policy(num_levels=2, patience=4, max_patience=64)
    now, switches = Level(), []
    for number in range(1000):
        after = step(policy, now, SLOW if now.level == 0 else CALM)
        if after.level != now.level:
            switches.append(number)
        now = after
    assert len(switches) <= 2 * (4 + 1000 // 64) and now.level == 1
    ups = switches[1::2]
    assert ups[1] - ups[0] > 4 and ups[-1] - ups[-2] >= 64


def test_a_survived_probation_makes_it_bold_again() -> None:
    policy = Policy(num_levels=2, patience=2)
    tired = Level(level=1, patience=16)
    up = walk(policy, [CALM] * 16, tired)[-1]
    assert up.level == 0 and up.probation == 16
    assert walk(policy, [BETWEEN] * 16, up)[-1] == Level(level=0, patience=2)
    assert step(policy, up, SLOW).patience == 32


@pytest.mark.parametrize(
    "changes", [{"num_levels": 0}, {"low": 0.0}, {"low": 2.0}, {"target_ms": 0.0}, {"patience": 0}, {"patience": 99}]
)
def test_bad_policies_are_refused(changes: dict) -> None:
    with pytest.raises(UserError):
        Policy(**({"num_levels": 2} | changes))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeServer:
    """Takes `seconds` of the clock; refuses while `full`."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds, self.full, self.asked = clock, {"dense": 0.3, "half": 0.05}, False, []

    async def infer(self, model, inputs, outputs):
        self.asked.append(model)
        self.clock.now += self.seconds[model]
        if self.full:
            raise Refused("full")
        return {"feature": model}


def test_the_client_goes_down_when_answers_are_late_and_up_again() -> None:
    clock = Clock()
    server = FakeServer(clock)
    policy = Policy(num_levels=2, target_ms=200, patience=2)
    client = AdaptiveClient(server, ["dense", "half"], policy, window_s=0.2, clock=clock)

    async def ask(count: int) -> None:
        for _ in range(count):
            model, values = await client.infer({}, [])
            assert values["feature"] == model

    asyncio.run(ask(3))
    assert server.asked[0] == "dense" and client.model == "half" and client.switches == 1
    server.seconds["dense"] = 0.06
    asyncio.run(ask(30))
    assert client.model == "dense" and client.switches == 2


def test_refusals_and_silence_are_pressure() -> None:
    clock = Clock()
    server = FakeServer(clock)
    policy = Policy(num_levels=3, target_ms=1000)
    client = AdaptiveClient(server, ["dense", "half", "half"], policy, window_s=0.2, clock=clock)
    server.full = True
    with pytest.raises(Refused):
        asyncio.run(client.infer({}, []))
    assert client.level.level == 2

    async def silence() -> str:
        quiet = AdaptiveClient(server, ["dense", "half", "half"], policy, window_s=0.2, clock=clock)
        never = asyncio.Event()

        async def wait(model, inputs, outputs):
            await never.wait()

        quiet.client = type("Silent", (), {"infer": staticmethod(wait)})()
        first = asyncio.create_task(quiet.infer({}, []))
        await asyncio.sleep(0)
        clock.now += 5.0
        second = asyncio.create_task(quiet.infer({}, []))
        await asyncio.sleep(0)
        never.set()
        await asyncio.gather(first, second)
        return (await first)[0], (await second)[0]

    assert asyncio.run(silence()) == ("dense", "half")


def test_a_ladder_must_fit_its_policy() -> None:
    with pytest.raises(UserError, match="2 levels for 1"):
        AdaptiveClient(FakeServer(Clock()), ["dense"], Policy(num_levels=2))


class WireError(Exception):
    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = lambda: status


def test_a_full_queue_is_told_from_a_broken_server() -> None:
    assert is_refusal(WireError("3 images are waiting", "429"))
    assert is_refusal(WireError("Exceeds maximum queue size", "503"))
    assert is_refusal(WireError("Request timeout expired", "StatusCode.UNAVAILABLE"))
    assert not is_refusal(WireError("failed to connect to all addresses", "StatusCode.UNAVAILABLE"))
    assert not is_refusal(OSError("connection reset"))
    assert Failed is not Refused


def test_high_quantile() -> None:
    assert high_quantile([]) == 0.0
    assert high_quantile([5.0]) == 5.0
    assert high_quantile(list(range(1, 11))) == 9
