"""deploy/compose.yaml with a real engine: four nodes come up, and everything goes down again.

Law: nothing that was there before is touched: the project, its volumes and its port are the test's own.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Self

from engine import SHORT_S, Engine, NoEngine, run, works

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = (("docker", "compose"), ("docker-compose",))
BUILD_S, UP_S = 360.0, 240.0


class Project:
    """The four nodes; use as a context manager."""

    def __init__(self, engine: Engine, name: str, port: int) -> None:
        """Raises NoEngine where the engine has no compose."""
        self.door = f"localhost:{port}"
        own = {"COMPOSE_PROJECT_NAME": name, "COMPOSE_FILE": str(DEPLOY / "compose.yaml"), "DOOR_PORT": str(port)}
        self._environment = {**os.environ, **engine.environment, **own}
        self._compose = next((way for way in COMPOSE if works([*way, "version"], self._environment)), None)
        if self._compose is None:
            raise NoEngine("the engine runs, but neither `docker compose` nor `docker-compose` does")
        if _can_fetch_wheels():
            run([sys.executable, str(DEPLOY / "fetch_wheels.py")], self._environment, BUILD_S)
            self._environment["PIP_NO_INDEX"] = "1"

    def __enter__(self) -> Self:
        self.__exit__()  # what a run that was cut off has left
        try:
            self.compose("build", "model", within_s=BUILD_S)
            self.compose("up", "--detach", within_s=UP_S)
        except BaseException as error:
            error.add_note(self.logs())
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.compose("down", "--volumes", "--timeout", "5", within_s=SHORT_S)

    def compose(self, *words: str, within_s: float = SHORT_S) -> str:
        assert self._compose is not None
        return run([*self._compose, *words], self._environment, within_s)

    def docker(self, *words: str) -> str:
        return run(["docker", *words], self._environment, SHORT_S)

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


def _can_fetch_wheels() -> bool:
    """Whether this Python takes the wheels that the image needs.  Where not, the image's own pip asks the index."""
    return sys.platform == "linux" and sys.version_info[:2] == (3, 11)
