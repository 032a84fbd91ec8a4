"""deploy/compose.yaml with a real engine, found or started: four nodes come up, and everything goes down again.

Law: nothing that was there before is touched: the project, its volumes and its port are the test's own, and only an
engine that was started here is stopped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CODE = Path(__file__).parents[2]
DEPLOY = CODE / "deploy"
# A script that starts an engine on a machine that has none, and says where it is; `down` beside it stops it.
ENGINE = Path(os.environ.get("ENGINE_UP") or CODE.parent / "shared" / "engine" / "up")
ENGINE_S, BUILD_S, UP_S, SHORT_S = 300.0, 360.0, 240.0, 60.0


class NoEngine(Exception):  # noqa: N818  (it is no failure)
    """No containers on this machine, and why."""


@dataclass
class Engine:
    """A Docker engine that answers; `environment` reaches it."""

    environment: Mapping[str, str] = field(default_factory=dict)
    stop: Path | None = None  # what stops it, if it was started here

    @classmethod
    def find(cls) -> Self:
        """Raises NoEngine."""
        if shutil.which("docker") and _works(["docker", "info"], os.environ):
            return cls()
        if not os.access(ENGINE, os.X_OK):
            raise NoEngine("no Docker engine answers `docker info`, and ENGINE_UP names no script that starts one")
        return cls._start()

    @classmethod
    def _start(cls) -> Self:
        try:
            told = _run([str(ENGINE)], os.environ, ENGINE_S)
        except (subprocess.SubprocessError, OSError) as error:
            raise NoEngine(f"{ENGINE} started none: {error} {getattr(error, 'stderr', '')}") from error
        said = re.search(r"DOCKER_HOST=([^\s,]+)(?:.*base image ([^\s,]+))?", told)
        if said is None:
            raise NoEngine(f"{ENGINE} does not say where its engine is: {told!r}")
        base = {"BASE": said[2]} if said[2] else {}
        return cls({"DOCKER_HOST": said[1]} | base, ENGINE.with_name("down"))

    def close(self) -> None:
        if self.stop is not None:
            _run([str(self.stop)], os.environ, SHORT_S)


class Project:
    """The four nodes; use as a context manager."""

    def __init__(self, engine: Engine, name: str, port: int) -> None:
        """Raises NoEngine where the engine has no compose."""
        self.door = f"localhost:{port}"
        own = {"COMPOSE_PROJECT_NAME": name, "COMPOSE_FILE": str(DEPLOY / "compose.yaml"), "DOOR_PORT": str(port)}
        self._environment = {**os.environ, **engine.environment, **own}
        self._compose = next((way for way in COMPOSE if _works([*way, "version"], self._environment)), None)
        if self._compose is None:
            raise NoEngine("the engine runs, but neither `docker compose` nor `docker-compose` does")
        if _can_fetch_wheels():
            _run([sys.executable, str(DEPLOY / "fetch_wheels.py")], self._environment, BUILD_S)
            self._environment["PIP_NO_INDEX"] = "1"

    def __enter__(self) -> Self:
        try:
            self.compose("build", "model", within_s=BUILD_S)
            self.compose("up", "--detach", within_s=UP_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", "--timeout", "5", within_s=SHORT_S)

    def compose(self, *words: str, within_s: float = SHORT_S) -> str:
        assert self._compose is not None
        return _run([*self._compose, *words], self._environment, within_s)

    def docker(self, *words: str) -> str:
        return _run(["docker", *words], self._environment, SHORT_S)

    def container(self, service: str) -> str:
        """Its id, also when it has ended."""
        named = self.docker("ps", "--all", "--quiet", "--no-trunc", *self._labels(service))
        assert re.fullmatch(r"[0-9a-f]{64}\n", named), (service, named)
        return named.strip()

    def inspect(self, service: str) -> Any:
        return json.loads(self.docker("inspect", self.container(service)))[0]

    def health(self, service: str) -> str:
        return str(self.inspect(service)["State"]["Health"]["Status"])

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "40")

    def _labels(self, service: str) -> list[str]:
        project = self._environment["COMPOSE_PROJECT_NAME"]
        labels = {"com.docker.compose.project": project, "com.docker.compose.service": service}
        return [word for name, value in labels.items() for word in ("--filter", f"label={name}={value}")]


COMPOSE = (("docker", "compose"), ("docker-compose",))


def _can_fetch_wheels() -> bool:
    """Whether this Python takes the wheels that the image needs.  Where not, the image's own pip asks the index."""
    return sys.platform == "linux" and sys.version_info[:2] == (3, 11)


def _works(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    try:
        _run(command, environment, SHORT_S)
    except (subprocess.SubprocessError, OSError):
        return False
    return True


def _run(command: Sequence[str], environment: Mapping[str, str], within_s: float) -> str:
    """What it printed.  Raises CalledProcessError with what it complained about."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=within_s, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-4000:]
        raise subprocess.CalledProcessError(done.returncode, f"{' '.join(command)}\n{said}\n", done.stdout, done.stderr)
    return done.stdout
