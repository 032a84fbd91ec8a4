"""How a call of another node or a client ends with an error: the one way, for every service.

Law: whoever calls hears a typed error, also of a bug, which the log tells in full and the caller only by its name.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import grpc

from node import log, status
from protos.errors import BrokenInvariant, ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator


def refuse(context: grpc.ServicerContext, error: ShoalError) -> NoReturn:
    """Ends the call with the error.  Raises what gRPC wants raised: not inside `refusing`."""
    context.set_trailing_metadata(status.metadata_of(error))
    context.abort(status.status_of(error), status.details_of(error))
    raise error  # abort has raised; this line tells the type checker so


@contextmanager
def refusing(context: grpc.ServicerContext, service: str) -> Iterator[None]:
    """Whatever is raised inside ends the call with a typed error; that its other end is gone ends it anyway."""
    try:
        yield
    except grpc.RpcError:
        raise
    except ShoalError as error:
        refuse(context, error)
    except Exception as error:  # noqa: BLE001  (a bug in one call must not look like anything else to its caller)
        refuse(context, bug(service, error))


def bug(service: str, error: Exception) -> BrokenInvariant:
    """In an except clause: what a caller hears of our bug."""
    log.get(service).exception("a call failed", error=str(error))
    return BrokenInvariant(f"the node failed: {type(error).__name__}; its log says more")
