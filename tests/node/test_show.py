"""What `shoal show` prints."""

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


def test_a_model_is_a_line_its_facts_and_its_layers() -> None:
    toy = manifest()
    assert toy.model_id[:12] in printed(show.models([toy]))
    head = printed(show.head(toy))
    assert toy.model_id in head
    assert "2 a layer, 1 a token" in head
    lines = printed(show.layers(toy)).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "text", "embed", "trunk.0", "expert.0.*", "trunk.1", "expert.1.*", "head",
    ]  # fmt: skip
    assert lines[4].split()[1:] == ["2", "1000", "B", "2.0", "KiB"]


def test_facts_list_every_unit() -> None:
    toy = manifest()
    facts = show.facts(toy)
    assert facts["model"] == toy.model_id
    assert list(facts["units"]) == [entry.name for entry in toy.units]
