"""Writes the Python of the .proto files beside them; with --check it only says which committed files are not current.

Law: the generated code is committed, and nothing else writes it.
"""

import argparse
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

from protos.errors import BrokenInvariant

ROOT = Path(__file__).resolve().parent.parent
ROOM = "protos"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(target: Path) -> list[Path]:
    """Compiles every protos/*.proto into target/protos; the files written, relative to target."""
    sources = sorted(f"{ROOM}/{path.name}" for path in (ROOT / ROOM).glob("*.proto"))
    plugins = ("python_out=", "grpc_python_out=", "mypy_out=quiet:", "mypy_grpc_out=quiet:")
    outputs = [f"--{plugin}{target}" for plugin in plugins]
    well_known = resources.files("grpc_tools") / "_proto"
    # protoc finds the mypy plugins on the path; they are installed beside this interpreter.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    status = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *sources])
    if status != 0:
        raise BrokenInvariant(f"protoc ended with status {status}; its messages are above")
    return [Path(source.removesuffix(".proto") + suffix) for source in sources for suffix in SUFFIXES]


def stale() -> list[str]:
    """Committed files that differ from what the .proto files give, are missing, or have no .proto any more."""
    with tempfile.TemporaryDirectory() as folder:
        written = generate(Path(folder))
        differing = [path for path in written if _read(ROOT / path) != _read(Path(folder) / path)]
    committed = {path.relative_to(ROOT) for suffix in SUFFIXES for path in (ROOT / ROOM).glob(f"*{suffix}")}
    return sorted(str(path) for path in {*differing, *committed.difference(written)})


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main(arguments: list[str]) -> int:
    """The command: 0, or 1 after the names of files that are not current."""
    parser = argparse.ArgumentParser(
        prog="python -m protos.generate", description="Generate Python from protos/*.proto."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed code is not current")
    if not parser.parse_args(arguments).check:
        generate(ROOT)
        return 0
    names = stale()
    if names:
        message = "not current: " + ", ".join(names) + "; run `python -m protos.generate` and commit what it writes"
        sys.stderr.write(message + "\n")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
