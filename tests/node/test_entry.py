"""Ctrl-C while the command is still imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CODE = Path(__file__).parents[2]
INTERRUPTED = """
import importlib, os, signal, sys

imported, entry = sys.argv[1:]

class Interrupting:
    def find_spec(self, name, path, target=None):
        if name == imported:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
module, _, function = entry.partition(":")
main = getattr(importlib.import_module(module), function)
sys.argv[1:] = ["run"]
main()
"""


@pytest.mark.parametrize("imported", ["typer", "node.cli", "node.outcome", "node.log", "pydantic", "node.wire"])
def test_ctrl_c_while_something_is_imported_ends_quietly_with_130(imported: str, tmp_path: Path) -> None:
    scripts = tomllib.loads((CODE / "pyproject.toml").read_text())["project"]["scripts"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, imported, scripts["shoal"]],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
        env={"PYTHONPATH": str(CODE), "XDG_DATA_HOME": str(tmp_path), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stderr.strip() in ("", "interrupted")
    assert done.returncode == 130
