"""What lies between a driver and its workers, however many: order, and the stop request."""

import asyncio
import itertools

from hypothesis import given
from hypothesis import strategies as st

from cluster.ray_mailbox import Box


@given(st.permutations(list(itertools.product("ab", range(4)))))
def test_each_senders_news_come_in_its_own_order(arrivals: list[tuple[str, int]]) -> None:
    """In whatever order Ray runs the calls, and without waiting for another sender's."""

    async def deliver() -> list[tuple[str, int]]:
        box, fetched = Box(), []
        for sender, number in arrivals:
            await box.put(sender, number, {"told": (sender, number)})
            fetched += [news["told"] for news in await box.fetch()]
        return fetched

    fetched = asyncio.run(deliver())
    assert sorted(fetched) == sorted(arrivals)
    for sender in "ab":
        assert [number for name, number in fetched if name == sender] == [0, 1, 2, 3]


def test_a_thousand_workers_wait_for_the_stop_by_one_call_each() -> None:
    class Counted(Box):
        calls = 0

        async def wait_for_stop(self) -> None:
            self.calls += 1
            await super().wait_for_stop()

    async def run() -> tuple[int, int]:
        box = Counted()
        waiting = [asyncio.create_task(box.wait_for_stop()) for _ in range(1000)]
        for _ in range(10):  # time passes, and others are served meanwhile
            await box.put("rank 0", _, {"step": _})
            await asyncio.sleep(0)
        before = sum(task.done() for task in waiting)
        await box.ask_to_stop()
        await asyncio.gather(*waiting)
        await box.wait_for_stop()  # and who comes late does not wait
        return before, box.calls

    assert asyncio.run(run()) == (0, 1001)
