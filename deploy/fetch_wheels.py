"""Fills deploy/wheels with what the image installs, so that it builds without a package index.

Law: pip knows this machine's index, proxy and certificates; nothing of them is written into the folder.
It takes what fits the Python that runs it: run it on Linux, with the image's version (3.11).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

DEPLOY = Path(__file__).resolve().parent
ROOT = DEPLOY.parent
WHEELS = DEPLOY / "wheels"


def requirements(project: str) -> list[str]:
    """What the image runs with, and what builds shoal itself."""
    told = tomllib.loads(project)
    return [
        *told["project"]["dependencies"],
        *told["project"]["optional-dependencies"]["demo"],
        *told["build-system"]["requires"],
    ]


def download(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--only-binary=:all:", "--dest", str(WHEELS), *arguments], check=True)  # noqa: S603


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from node.demo.source import SOURCE

    with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
        listed.write("\n".join(requirements((ROOT / "pyproject.toml").read_text())))
        listed.flush()
        download("--constraint", str(ROOT / "constraints.txt"), "--requirement", listed.name)
    # Of the demo model's source only the file counts, not what the package asks for.
    download("--no-deps", SOURCE)


if __name__ == "__main__":
    main()
