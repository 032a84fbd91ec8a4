"""A toy node that listens: trio in a thread of its own, gRPC on loopback."""

from __future__ import annotations

import contextlib
import threading

import trio
from toy_node import ToyWorker, door

from node.bridge import Portal, in_thread
from node.server import Server
from protos.errors import ShuttingDown


class Node:
    """A toy node whose trio runs in a thread of its own."""

    def __init__(self, files: dict[str, bytes] | None = None, **settings: object) -> None:
        self.worker = ToyWorker()
        self.files = files
        self.settings = {"port": 0, **settings}
        self.address = ""
        self.error: BaseException | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001
            self.error = error
            self._up.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._leave = trio.Event()
        async with trio.open_nursery() as nursery:
            self.door = door(self.worker, self.files, **self.settings)
            portal = Portal(nursery, lambda: ShuttingDown("leaving"))
            server = Server(self.door.config, self.door, portal, lambda: self.worker.kv_bytes)
            self.address = f"127.0.0.1:{server.port}"
            self._up.set()
            await self._leave.wait()
            self.door.leave()
            await in_thread(lambda: server.stop(5.0))
            portal.close()
            nursery.cancel_scope.cancel()

    def leave(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._leave.set)

    def __enter__(self) -> Node:
        self._thread.start()
        assert self._up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        if self.error is None:
            self.leave()
        self._thread.join(20)
        assert not self._thread.is_alive()
