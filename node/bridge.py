"""Where threads meet trio, and the only file where they do: futures of the worker, handlers of gRPC.

Law: no thread waits for trio without an end.  Whatever a handler thread waits on is closed when its trio task ends, for
whatever reason; what a thread says to a trio that has ended is dropped.
"""

from __future__ import annotations

import queue
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from concurrent.futures import Future

T = TypeVar("T")


async def await_future(future: Future[T]) -> T:
    """The future's result.  If the waiting task is cancelled the future is too, as far as its owner lets it."""
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()
    future.add_done_callback(lambda _: _tell(token, done.set))
    try:
        await done.wait()
    except trio.Cancelled:
        future.cancel()
        raise
    return future.result()


async def in_thread(work: Callable[[], T], *, abandon: bool = False) -> T:
    """Runs what blocks in a thread.  `abandon`: if the waiting task is cancelled the thread is left to itself."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=abandon)


class Stream(Generic[T]):
    """A bounded channel from one trio task to one thread.

    The task awaits `send`, which waits while the thread is `items_max` behind.  The thread iterates; it gets every item
    sent, then the end, or the error that ended the task.
    """

    def __init__(self, token: trio.lowlevel.TrioToken, items_max: int) -> None:
        self._token = token
        self._items: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = trio.Semaphore(items_max)
        self._scope = trio.CancelScope()

    async def send(self, item: T) -> None:
        await self._room.acquire()
        self._items.put(item)

    def offer(self, item: T) -> None:
        """From trio: sends the item if the thread is not behind, or drops it."""
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            return
        self._items.put(item)

    async def run(self, work: Callable[[Stream[T]], Awaitable[None]]) -> None:
        """Runs the task that fills the stream; never raises but Cancelled."""
        error: BaseException | None = None
        try:
            with self._scope:
                await work(self)
        except Exception as raised:  # noqa: BLE001  (it belongs to the thread, which raises it)
            error = raised
        finally:
            self._items.put(_End(error))

    def abandon(self) -> None:
        """From any thread: nobody reads any more, so the task is cancelled."""
        _tell(self._token, self._scope.cancel)

    def refuse(self, error: Exception) -> None:
        """Ends a stream whose task was never started."""
        self._items.put(_End(error))

    def __iter__(self) -> Iterator[T]:
        while not isinstance(item := self._items.get(), _End):
            _tell(self._token, self._room.release)
            yield item
        if item.error is not None:
            raise item.error


class Inbox(Generic[T]):
    """What threads tell one task, in order.  Made in trio; what comes when `items_max` are unread is dropped."""

    def __init__(self, items_max: int) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._items: deque[T] = deque()
        self._items_max = items_max
        self._arrived = trio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """From any thread; never blocks."""
        _tell(self._token, lambda: self._add(item))

    async def get(self) -> T:
        while not self._items:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return self._items.popleft()

    def _add(self, item: T) -> None:
        if len(self._items) < self._items_max:
            self._items.append(item)
            self._arrived.set()


class Portal:
    """Lets gRPC's threads start tasks in a nursery, until it is closed."""

    def __init__(self, nursery: trio.Nursery, refusal: Callable[[], Exception]) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._refusal = refusal
        self._closed = False

    def close(self) -> None:
        """From trio, before the nursery ends: no task is started any more."""
        self._closed = True

    def stream(self, work: Callable[[Stream[T]], Awaitable[None]], items_max: int) -> Stream[T]:
        """From any thread: starts `work` in trio and gives what it sends.  If trio has ended, the stream fails."""
        stream: Stream[T] = Stream(self._token, items_max)
        try:
            self._token.run_sync_soon(self._start, stream, work)
        except trio.RunFinishedError:
            stream.refuse(self._refusal())
        return stream

    def _start(self, stream: Stream[T], work: Callable[[Stream[T]], Awaitable[None]]) -> None:
        if self._closed:
            stream.refuse(self._refusal())
        else:
            self._nursery.start_soon(stream.run, work)


class _End:
    __slots__ = ("error",)

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def _tell(token: trio.lowlevel.TrioToken, say: Callable[[], object]) -> None:
    try:
        token.run_sync_soon(say)
    except trio.RunFinishedError:
        return
