"""What `shoal show` prints."""

from dataclasses import replace

from rich.console import Console
from rich.table import Table
from toy_node import manifest

from node import show


def printed(table: Table) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(table)
        return console.export_text()


def test_sizes_are_for_people() -> None:
    assert [show.size(n) for n in (0, 1023, 1024, 3 << 29, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "5.0 TiB",
    ]


def test_a_model_is_a_line_its_facts_and_its_units_by_kind() -> None:
    toy = manifest()
    assert toy.model_id[:12] in printed(show.models([toy]))
    head = printed(show.head(toy))
    assert toy.model_id in head
    assert "2 a layer, 1 a token" in head
    kinds = [line.split() for line in printed(show.kinds(toy)).splitlines()]
    assert [line[0] for line in kinds] == ["unit", "text", "embed", "trunk", "expert", "head", "total"]
    assert kinds[4] == ["expert", "4", "1000", "B", "3.9", "KiB", "44", "%"]
    assert kinds[6][:2] == ["total", "9"]


def test_layers_that_are_alike_are_one_line() -> None:
    (line,) = printed(show.layers(manifest())).splitlines()[1:]
    assert line.split() == ["0", "to", "1", "2", "1000", "B", "1000", "B", "2.9", "KiB"]
    toy = manifest()
    units = tuple(replace(unit, size=7) if unit.name == "expert.1.1" else unit for unit in toy.units)
    first, second = printed(show.layers(replace(toy, units=units))).splitlines()[1:]
    assert first.split()[0] == "0"
    assert "7 B to 1000 B" in second


def test_facts_list_every_unit() -> None:
    toy = manifest()
    facts = show.facts(toy)
    assert facts["model"] == toy.model_id
    assert (facts["bytes"], facts["expert_bytes"]) == (9000, 4000)
    assert list(facts["units"]) == [entry.name for entry in toy.units]
