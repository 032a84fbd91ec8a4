"""What follows from a Future that another thread resolves: callbacks, never a wait.

Law: a Future that was cancelled has failed with ShuttingDown; who cancels what follows from it changes nothing there.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from protos.errors import ShuttingDown

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
U = TypeVar("U")


def done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def error_of(future: Future[Any]) -> BaseException | None:
    """Why a future that has ended failed."""
    return ShuttingDown("this node is shutting down") if future.cancelled() else future.exception()


def mapped(
    first: Future[T], value: Callable[[T], U], rescue: Callable[[BaseException], U | None] | None = None
) -> Future[U]:
    """The first one's outcome with another value; of an error what `rescue` makes of it, if that is something."""
    out: Future[U] = Future()
    first.add_done_callback(lambda ended: _settle(ended, out, value, rescue))
    return out


def after(first: Future[Any], then: Callable[[BaseException | None], Future[U]]) -> Future[U]:
    """What `then` begins when the first one has ended, well (None) or not."""
    out: Future[U] = Future()

    def go_on(ended: Future[Any]) -> None:
        then(error_of(ended)).add_done_callback(lambda second: _settle(second, out, lambda value: value, None))

    first.add_done_callback(go_on)
    return out


def _settle(
    ended: Future[T], out: Future[U], value: Callable[[T], U], rescue: Callable[[BaseException], U | None] | None
) -> None:
    error = error_of(ended)
    if not out.set_running_or_notify_cancel():
        return
    if error is None:
        out.set_result(value(ended.result()))
    elif rescue is not None and (found := rescue(error)) is not None:
        out.set_result(found)
    else:
        out.set_exception(error)
