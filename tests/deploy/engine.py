"""A Docker engine on this machine: found, or started by a script.

Law: only an engine that was started here is stopped; no command outlives its time, nor do its children.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A script that starts an engine where none runs, and says where it is; `down` beside it stops it.
BESIDE = Path(__file__).parents[3] / "shared" / "engine" / "up"
START_S, SHORT_S = 600.0, 60.0  # to be installed and started; any other command


class NoEngine(Exception):  # noqa: N818  (it is no failure)
    """No containers on this machine, and why."""


@dataclass
class Engine:
    """A Docker engine that answers; `environment` reaches it."""

    environment: Mapping[str, str] = field(default_factory=dict)
    stop: Path | None = None  # what stops it, if it was started here

    @classmethod
    def find(cls) -> Self:
        """The script's, or else what `docker info` finds.  Raises NoEngine."""
        script = Path(os.environ.get("ENGINE_UP") or BESIDE)
        if os.access(script, os.X_OK):
            return cls._start(script)
        if shutil.which("docker") and works(["docker", "info"], os.environ):
            return cls()
        raise NoEngine("no Docker engine answers `docker info`, and ENGINE_UP names no script that starts one")

    @classmethod
    def _start(cls, script: Path) -> Self:
        begun = time.time()
        try:
            told = run([str(script)], os.environ, START_S)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoEngine(f"{script} started none: {error}") from error
        said = re.search(r"DOCKER_HOST=([^\s,]+)(?:.*base image ([^\s,]+))?", told)
        if said is None:
            raise NoEngine(f"{script} does not say where its engine is: {told!r}")
        base = {"BASE": said[2]} if said[2] else {}
        return cls({"DOCKER_HOST": said[1]} | base, script.with_name("down") if _is_newer(said[1], begun) else None)

    def close(self) -> None:
        if self.stop is not None:
            run([str(self.stop)], os.environ, SHORT_S)


def _is_newer(host: str, moment: float) -> bool:
    """Whether the engine there has made its socket since."""
    socket = Path(host.removeprefix("unix://"))
    return socket.exists() and socket.stat().st_mtime >= moment


def works(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    try:
        run(command, environment, SHORT_S)
    except (subprocess.SubprocessError, OSError):
        return False
    return True


def run(command: Sequence[str], environment: Mapping[str, str], within_s: float, said: str = "") -> str:
    """What it printed, told `said`.  Raises CalledProcessError with what it complained about, or TimeoutExpired."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(said, within_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        told = f"{' '.join(command)}\n{(out + err)[-4000:]}\n"
        raise subprocess.CalledProcessError(process.returncode, told, out, err)
    return out
