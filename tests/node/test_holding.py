"""The words of --hold: what they mean for a model, and what is refused by its word."""

from dataclasses import replace

import pytest
from toy_node import manifest

from node.holding import Holding, parse, whole
from protos import units
from protos.errors import InvalidRequest
from protos.ids import UnitHash
from protos.manifest import Manifest, UnitEntry

# Six layers, the first of them dense, ten experts in each of the others; spans begin at even layers.
EXPERTS = (0, 10, 10, 10, 10, 10)
NAMES = [units.TEXT, units.EMBED]
for _layer, _count in enumerate(EXPERTS):
    NAMES += [units.trunk(_layer), *(units.expert(_layer, e) for e in range(_count))]
UNITS = tuple(UnitEntry(name, UnitHash("ab" * 32), 1000, ()) for name in [*NAMES, units.HEAD])
SIX = replace(manifest(), layers=6, experts=EXPERTS, grain=2, units=UNITS)
ALL = (1 << 10) - 1


def hold(*words: str, of: Manifest = SIX) -> Holding:
    return parse(words, of)


def test_all_is_everything() -> None:
    assert hold("all") == Holding(range(6), dict.fromkeys(range(1, 6), ALL)) == whole(SIX)
    toy = manifest()
    assert list(whole(toy).units(toy)) == [
        units.EMBED, "trunk.0", "trunk.1", "expert.0.0", "expert.0.1", "expert.1.0", "expert.1.1", units.HEAD
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "span", "experts"),
    [
        (["trunk:*"], range(6), {}),
        (["trunk:2-5"], range(2, 6), {}),
        (["trunk:0-1", "trunk:2,3"], range(4), {}),
        (["span:2-3"], range(2, 4), {2: ALL, 3: ALL}),
        (["span:0-1"], range(2), {1: ALL}),
        (["experts:*/3"], range(0), dict.fromkeys(range(1, 6), 8)),
        (["experts:1/0-2,9"], range(0), {1: 0b1000000111}),
        (["experts:4,5/*"], range(0), {4: ALL, 5: ALL}),
        (["experts:1/1%4", "experts:1/2%4"], range(0), {1: 0b1001100110}),
        (["trunk:*", "experts:*/0%4"], range(6), dict.fromkeys(range(1, 6), 0b100010001)),
    ],
)
def test_words_add_up(words: list[str], span: range, experts: dict[int, int]) -> None:
    assert hold(*words) == Holding(span, experts)


def test_ends_of_the_model_belong_to_the_spans_that_reach_them() -> None:
    ends = [(hold(word).held(SIX).embed, hold(word).held(SIX).head) for word in ("span:0-1", "span:2-3", "span:4-5")]
    assert ends == [(True, False), (False, False), (False, True)]
    leaf = hold("experts:*/0").held(SIX)
    assert (leaf.embed, leaf.head, leaf.text, leaf.span) == (False, False, True, range(0))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["everything"], "hold 'everything': give all, span:A-B"),
        (["span:0-9"], "0-9 is not within the 6 layers of this model .0 to 5."),
        (["span:5-4"], "5-4 is not within"),
        (["trunk:"], "'' is no number and no A-B"),
        (["trunk:a"], "'a' is no number"),
        (["trunk:0/1"], "give all, span:A-B"),
        (["experts:1"], "give all, span:A-B"),
        (["experts:1/10"], "10 is not within the 10 experts"),
        (["experts:1/4%4"], "the first number must be below the second"),
        (["experts:1/0%0"], "the first number must be below the second"),
        (["trunk:0-1", "trunk:4-5"], "a node's span has no gaps"),
        (["trunk:1-3"], "begin at multiples of 2 layers"),
        (["trunk:0-2"], "begin at multiples of 2 layers"),
        (["trunk:" + "9" * 100], "is no number"),
    ],
)
def test_what_cannot_be_held_is_refused_by_its_word(words: list[str], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        hold(*words)
