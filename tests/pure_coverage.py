"""How much of the pure files the unit tests reach: each file at least 95 % of its lines and of its branches.

python -m tests.pure_coverage REPORT        judges a JSON report of coverage; fails and names the files below

Law: which files are pure is said in one place, the import contracts of pyproject.toml, and read from there.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

CODE = Path(__file__).parents[1]
PER_CENT_MIN = 95.0
PURE = "pure:"  # in a contract's name


def main() -> int:
    measured = json.loads(Path(sys.argv[1]).read_text())["files"]
    rows = [(path, *_per_cent(measured[path]["summary"])) for path in pure_files()]
    below = [row for row in rows if min(row[1:]) < PER_CENT_MIN]
    for path, lines, branches in below:
        print(f"{path}: lines {lines:.1f} %, branches {branches:.1f} %")
    lowest = [min(row[column] for row in rows) for column in (1, 2)]
    print(
        f"{len(rows)} pure files, {len(below)} below {PER_CENT_MIN:g} %; lowest: lines {lowest[0]:.1f} %,"
        f" branches {lowest[1]:.1f} %"
    )
    return int(bool(below))


def pure_files() -> list[str]:
    """Paths from the root of the code, of every contract that calls its modules pure."""
    contracts = tomllib.loads((CODE / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules = [module for contract in contracts if PURE in contract["name"] for module in contract["source_modules"]]
    files = []
    for module in modules:
        path = CODE / module.replace(".", "/")
        files += sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    return [str(path.relative_to(CODE)) for path in files]


def _per_cent(summary: dict[str, int]) -> tuple[float, float]:
    """Of lines, of branches; a file without any has all of them."""
    pairs = (("covered_lines", "num_statements"), ("covered_branches", "num_branches"))
    return tuple(100.0 * summary[part] / summary[whole] if summary[whole] else 100.0 for part, whole in pairs)  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
