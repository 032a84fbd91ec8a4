import pytest

from protos import units
from protos.errors import InvalidManifest
from protos.limits import EXPERTS_MAX, LAYERS_MAX
from protos.units import Unit


def test_names_parse_to_what_made_them():
    assert units.parse(units.TEXT) == Unit("text")
    assert units.parse(units.EMBED) == Unit("embed")
    assert units.parse(units.HEAD) == Unit("head")
    assert units.parse(units.trunk(12)) == Unit("trunk", 12)
    assert units.parse(units.expert(3, 40)) == Unit("expert", 3, 40)


def test_order_is_the_order_of_the_forward_pass_with_numbers_as_numbers():
    names = ["head", "expert.10.0", "trunk.2", "expert.2.10", "expert.2.9", "embed", "trunk.10", "text"]
    assert sorted(names, key=units.order) == [
        "text", "embed", "trunk.2", "expert.2.9", "expert.2.10", "trunk.10", "expert.10.0", "head",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["", "tex", "text ", "text\n", "Trunk.1", "trunk", "trunk.", "trunk.01", "trunk.-1", "trunk.1.2", "trunk.\u0661",
     "expert.1", "expert.1.2.3", "expert.1.02", "expert..1", "trunk.999999", "x" * 10_000],
)  # fmt: skip
def test_any_other_spelling_is_refused(name: str):
    with pytest.raises(InvalidManifest, match="is not the name of a unit"):
        units.parse(name)


def test_layer_and_expert_numbers_have_a_limit():
    assert units.parse(f"expert.{LAYERS_MAX - 1}.{EXPERTS_MAX - 1}").expert == EXPERTS_MAX - 1
    for name in (f"trunk.{LAYERS_MAX}", f"expert.{LAYERS_MAX}.0", f"expert.0.{EXPERTS_MAX}"):
        with pytest.raises(InvalidManifest, match="not below the limit"):
            units.parse(name)
