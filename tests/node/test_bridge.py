"""Threads and trio meet without waiting for each other without an end."""

import threading
from concurrent.futures import Future

import pytest
import trio
import trio.testing

from node.bridge import Portal, Stream, await_future, in_thread


def test_a_future_resolved_by_a_thread_wakes_the_task() -> None:
    future: Future[int] = Future()

    async def main() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, lambda: future.set_result(7))
            return await await_future(future)
        raise AssertionError

    assert trio.run(main) == 7


def test_a_futures_exception_is_raised_in_the_task() -> None:
    future: Future[int] = Future()
    future.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        trio.run(await_future, future)


def test_a_cancelled_task_cancels_its_future() -> None:
    future: Future[int] = Future()

    async def main() -> None:
        with trio.move_on_after(0):
            await await_future(future)

    trio.run(main)
    assert future.cancelled()


def test_a_future_that_resolves_after_trio_has_ended_disturbs_nobody() -> None:
    future: Future[int] = Future()
    future.set_running_or_notify_cancel()

    async def main() -> None:
        with trio.move_on_after(0):
            await await_future(future)

    trio.run(main)
    future.set_result(1)


async def sleep(_: Stream[int]) -> None:
    await trio.sleep_forever()


def stream_to_thread(work, items_max: int = 2):
    """What a thread that iterates gets: items, then the error or None."""
    got: list[object] = []

    def read(stream: Stream[int]) -> None:
        try:
            got.extend(stream)
        except ValueError as error:
            got.append(str(error))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            portal = Portal(nursery, lambda: ValueError("closed"))
            await in_thread(lambda: read(portal.stream(work, items_max)))

    trio.run(main)
    return got


def test_a_thread_gets_what_a_task_sends_in_order_and_then_the_end() -> None:
    async def work(stream: Stream[int]) -> None:
        for n in range(10):
            await stream.send(n)

    assert stream_to_thread(work) == list(range(10))


def test_a_thread_gets_the_error_that_ended_the_task() -> None:
    async def work(stream: Stream[int]) -> None:
        await stream.send(1)
        raise ValueError("broken")

    assert stream_to_thread(work) == [1, "broken"]


def test_a_task_is_never_further_ahead_of_its_thread_than_the_limit() -> None:
    sent: list[int] = []

    async def work(stream: Stream[int]) -> None:
        for n in range(5):
            await stream.send(n)
            sent.append(n)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            stream = Portal(nursery, lambda: ValueError("closed")).stream(work, 3)
            await trio.testing.wait_all_tasks_blocked()
            assert sent == [0, 1, 2]
            stream.abandon()

    trio.run(main)


def test_an_abandoned_stream_cancels_its_task_and_ends() -> None:
    async def work(stream: Stream[int]) -> None:
        await trio.sleep_forever()

    async def main() -> list[int]:
        async with trio.open_nursery() as nursery:
            stream = Portal(nursery, lambda: ValueError("closed")).stream(work, 1)
            stream.abandon()
            return await in_thread(lambda: list(stream))
        raise AssertionError

    assert trio.run(main) == []


def test_a_stream_ends_when_the_nursery_is_cancelled() -> None:
    ended = threading.Event()

    async def work(stream: Stream[int]) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            stream = Portal(nursery, lambda: ValueError("closed")).stream(work, 1)
            nursery.start_soon(in_thread, lambda: (list(stream), ended.set()))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert ended.is_set()


def test_a_closed_portal_starts_nothing() -> None:
    async def main() -> Stream[int]:
        async with trio.open_nursery() as nursery:
            portal = Portal(nursery, lambda: ValueError("closed"))
            portal.close()
            stream: Stream[int] = portal.stream(sleep, 1)
            await trio.testing.wait_all_tasks_blocked()
            return stream
        raise AssertionError

    with pytest.raises(ValueError, match="closed"):
        list(trio.run(main))


def test_a_portal_whose_trio_has_ended_starts_nothing() -> None:
    async def main() -> Portal:
        async with trio.open_nursery() as nursery:
            return Portal(nursery, lambda: ValueError("closed"))
        raise AssertionError

    portal = trio.run(main)
    stream: Stream[int] = portal.stream(sleep, 1)
    stream.abandon()
    with pytest.raises(ValueError, match="closed"):
        list(stream)


def test_what_is_offered_to_a_thread_that_is_behind_is_dropped() -> None:
    async def offer(stream: Stream[int]) -> None:
        for item in range(5):
            stream.offer(item)

    assert stream_to_thread(offer) == [0, 1]
