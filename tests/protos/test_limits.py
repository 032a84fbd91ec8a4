"""Every maximum is reached by a test, which names it; what protos says of its limits is so."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from protos import limits
from protos.expert_pb2 import ComputeRequest
from protos.inference_pb2 import GenerateRequest, TokenIds
from protos.stage_pb2 import OpenRequest, Peer, Route, RouteStage, Step

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = [name for name in vars(limits) if name.isupper() and name not in ("KIB", "MIB", "GIB", "TIB")]
_MAXIMUM = re.compile(r"_?[A-Z][A-Z_]*_MAX")


def modules() -> Iterator[tuple[str, Path]]:
    """Those whose maxima must be reached, as they are imported."""
    for room in ("node", "shard", "coordinator"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def maxima() -> Iterator[str]:
    """`module.NAME` of each that a module of ours defines."""
    for module, path in modules():
        for name, _ in assignments(ast.parse(path.read_text())):
            if _MAXIMUM.fullmatch(name):
                yield f"{module}.{name}"


@cache
def reached() -> frozenset[str]:
    """`module.NAME` of everything of ours that some test names, whatever it is called there."""
    files = (ROOT / "tests").rglob("test_*.py")
    return frozenset(name for path in files for name in named(ast.parse(path.read_text())))


def named(test_file: ast.Module) -> Iterator[str]:
    """What the bodies of tests name, and the tables of cases that they are parametrized with."""
    imported = dict(imports(test_file))
    tables = dict(assignments(test_file))
    for function in ast.walk(test_file):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and function.name.startswith("test_"):
            decorators = [node for each in function.decorator_list for node in ast.walk(each)]
            cases = [tables[node.id] for node in decorators if isinstance(node, ast.Name) and node.id in tables]
            for part in (function, *cases):
                for node in ast.walk(part):
                    yield from names(node, imported)


def assignments(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names of a module and their values."""
    for node in module.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value


def names(node: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    """NAME, module.NAME, setattr(module, "NAME", ...) or setattr("room.module.NAME", ...)."""
    match node:
        case ast.Name(id=name):
            yield imported.get(name, "")
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in imported:
            yield f"{imported[module]}.{name}"
        case ast.Call(args=[ast.Name(id=module), ast.Constant(value=str(name)), *_]) if module in imported:
            yield f"{imported[module]}.{name}"
        case ast.Call(func=ast.Attribute(attr="setattr"), args=[ast.Constant(value=str(name)), *_]):
            yield name


def imports(test_file: ast.Module) -> Iterator[tuple[str, str]]:
    """What a name in the file stands for."""
    for node in ast.walk(test_file):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("name", [f"protos.limits.{name}" for name in NAMES] + sorted(maxima()))
def test_a_limit_is_named_by_a_test_that_reaches_it(name: str):
    assert name in reached(), f"no test names {name}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from node.a import X_MAX\ndef test_it(): f(X_MAX)", "node.a.X_MAX"),
        ("from node.a import X_MAX as top\ndef test_it(): f(top)", "node.a.X_MAX"),
        ("from node import a\ndef test_it(): f(a.X_MAX)", "node.a.X_MAX"),
        ("from node import a as b\ndef test_it(m): m.setattr(b, 'X_MAX', 3)", "node.a.X_MAX"),
        ("def test_it(m): m.setattr('node.a.X_MAX', 3)", "node.a.X_MAX"),
        ("from node.a import X_MAX\nCASES = [X_MAX]\n@parametrize('x', CASES)\ndef test_it(x): f(x)", "node.a.X_MAX"),
        ("from node.a import X_MAX\nCASES = [X_MAX]\ndef test_it(): f()", None),
        ("from node.a import X_MAX\ndef test_it(): f()", None),
        ("from node.a import X_MAX\ndef helper(): f(X_MAX)", None),
        ("from node.b import X_MAX\ndef test_it(): f(X_MAX)", None),
        ("from node import a\ndef test_it(): 'a.X_MAX'  # X_MAX", None),
    ],
)
def test_a_limit_counts_as_named_by_a_test_s_body_or_cases_alone(text: str, found: str | None):
    assert ("node.a.X_MAX" in set(named(ast.parse(text)))) == (found is not None)


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_is_used_by_the_code(name: str):
    rooms = [ROOT / room for room in ("protos", "shard", "coordinator", "node")]
    users = [path for room in rooms for path in room.rglob("*.py") if path.name != "limits.py"]
    assert any(mentions(path, name) for path in users), f"nothing uses {name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_ends_in_what_it_limits_and_has_a_reason(name: str):
    text = (ROOT / "protos" / "limits.py").read_text()
    assert re.search(rf'^{name}: Final = .*\n"""[^"]+"""$', text, re.MULTILINE), f"{name} has no reason"
    assert name.endswith(("_MAX", "_MIN", "_BYTES"))


def mentions(path: Path, name: str) -> bool:
    return re.search(rf"\b{name}\b", path.read_text()) is not None


def longest_ids(count: int) -> list[int]:
    return [limits.TOKEN_ID_MAX] * count


def test_the_largest_prompt_fits_a_clients_message():
    request = GenerateRequest(token_ids=TokenIds(ids=longest_ids(limits.LOG_TOKENS_MAX)))
    assert request.ByteSize() < limits.INFERENCE_MESSAGE_BYTES_MAX


def test_the_largest_step_and_the_largest_opening_fit_a_stages_message():
    step = Step(token_ids=longest_ids(limits.STEP_ROWS_MAX), allowed=bytes(limits.VOCAB_MAX // 8))
    assert step.ByteSize() + limits.FRAME_BYTES_MAX + 1024 < limits.STAGE_MESSAGE_BYTES_MAX
    peer = Peer(peer_id="p" * limits.ID_CHARS_MAX, address="a" * limits.ADDRESS_CHARS_MAX)
    route = Route(stages=[RouteStage(peer=peer, standby=peer)] * limits.ROUTE_STAGES_MAX)
    opening = OpenRequest(prompt_ids=longest_ids(limits.LOG_TOKENS_MAX), route=route)
    assert opening.ByteSize() < limits.STAGE_MESSAGE_BYTES_MAX


def test_the_largest_expert_call_fits_its_message():
    request = ComputeRequest(
        unit_hashes=["f" * limits.ID_CHARS_MAX] * limits.EXPERTS_MAX,
        pair_rows=[limits.STEP_ROWS_MAX] * limits.PAIRS_MAX,
        pair_experts=[limits.EXPERTS_MAX] * limits.PAIRS_MAX,
    )
    assert request.ByteSize() + limits.FRAME_BYTES_MAX + 1024 < limits.EXPERT_MESSAGE_BYTES_MAX


def test_a_message_between_peers_has_room_for_many_records_of_the_largest_size():
    assert limits.PEERS_MESSAGE_BYTES_MAX >= 16 * limits.RECORD_BYTES_MAX
