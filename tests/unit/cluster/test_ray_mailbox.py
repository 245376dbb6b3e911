"""What lies between a driver and its workers, however many: order, and the stop request."""

import asyncio
import itertools

from hypothesis import given
from hypothesis import strategies as st

from cluster.ray_mailbox import GO, Box, Broken, Readmitted, Request, Seat, Started


@given(st.permutations(list(itertools.product("ab", range(4)))))
def test_each_senders_news_come_in_its_own_order(arrivals: list[tuple[str, int]]) -> None:
    """In whatever order Ray runs the calls, and without waiting for another sender's."""

    async def deliver() -> list[tuple[str, int]]:
        box, fetched = Box(), []
        for sender, number in arrivals:
            await box.put(sender, number, {"told": (sender, number)})
            fetched += [news["told"] for news in await box.fetch(0)]
        return fetched

    fetched = asyncio.run(deliver())
    assert sorted(fetched) == sorted(arrivals)
    for sender in "ab":
        assert [number for name, number in fetched if name == sender] == [0, 1, 2, 3]


def test_a_thousand_workers_wait_for_the_stop_by_one_call_each() -> None:
    async def run() -> tuple[int, set[str], str]:
        box = Box(hear_s=60)
        waiting = [asyncio.create_task(box.hear(0, GO)) for _ in range(1000)]
        for number in range(10):  # time passes, and others are served meanwhile
            await box.put("rank 0", number, {"step": number})
            await asyncio.sleep(0)
        before = sum(task.done() for task in waiting)
        await box.ask_to_stop(None)
        heard = await asyncio.gather(*waiting)
        late = await box.hear(0, GO)  # and who comes late does not wait
        return before, {request.kind for request in heard}, late.kind

    assert asyncio.run(run()) == (0, {"stop"}, "stop")


def test_a_wish_to_leave_is_for_one_attempt_and_a_stop_for_all() -> None:
    async def run() -> list[Request]:
        box = Box(hear_s=0.01)
        nothing = await box.hear(3, GO)  # an answer, so that the worker knows of its driver
        await box.ask_to_leave(3, 20.0)
        leave = await box.hear(3, GO)
        known = await box.hear(3, leave)
        other = await box.hear(4, GO)
        await box.ask_to_leave(4, None)  # of which those before have nothing
        known = await box.hear(3, known)
        await box.ask_to_stop(9.0)
        return [nothing, leave, known, other, await box.hear(3, leave), await box.hear(4, GO)]

    leave, stop = Request("leave", 20.0), Request("stop", 9.0)
    assert asyncio.run(run()) == [GO, leave, leave, GO, stop, stop]


def test_a_controller_that_asks_waits_until_it_is_allowed_each_time() -> None:
    async def run() -> list[bool]:
        box, seen = Box(), []
        assert await box.wanted() is None
        for workers in (4, 3):
            asked = asyncio.create_task(box.ask(Broken("workers", (), "lost")))
            await asyncio.sleep(0)
            seen.append(asked.done())
            assert await box.fetch(0) == [Broken("workers", (), "lost")]
            await box.allow(workers, workers + 1, frozenset("a"))
            await asked
            assert (await box.wanted(), await box.most()) == (workers, workers + 1)
            assert await box.avoided() == {"a"}
            await box.readmit()
            assert await box.avoided() == frozenset()
            assert await box.fetch(0) == [Readmitted()]
        return seen

    assert asyncio.run(run()) == [False, False]


def test_who_fetches_waits_for_the_first_event_until_it_is_told_to_wait_no_longer() -> None:
    async def run() -> list[object]:
        box = Box()
        fetching = asyncio.create_task(box.fetch(60))
        await asyncio.sleep(0)
        seen: list[object] = [fetching.done()]
        await box.put("rank 0", 0, {"step": 0})
        seen.append(await fetching)
        fetching = asyncio.create_task(box.fetch(60))
        await asyncio.sleep(0)
        await box.answer()
        return [*seen, await fetching, await box.fetch(0.001)]

    assert asyncio.run(run()) == [False, [{"step": 0}], [], []]


def test_attempts_are_numbered_as_they_begin() -> None:
    async def run() -> list[object]:
        box, seat = Box(), Seat(node="n", address="127.0.0.1", host="h", pid=1)
        numbers = [await box.begin((seat,)), await box.begin((seat, seat))]
        return [*numbers, *await box.fetch(0)]

    seat = Seat(node="n", address="127.0.0.1", host="h", pid=1)
    assert asyncio.run(run()) == [0, 1, Started(0, (seat,)), Started(1, (seat, seat))]
