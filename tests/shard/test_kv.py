"""KV: what is reserved, what is held, what is taken from elsewhere."""

from collections.abc import Callable

import pytest
import torch
from chain import Chain
from tiny import model

from protos.errors import BrokenInvariant, InvalidRequest, OutOfMemory, Overloaded
from protos.ids import SessionId
from shard.kv import KvPool, LayerKv, RaggedCache, SessionKv, Slice

CPU = torch.device("cpu")
LAYERS = {
    2: LayerKv(heads=2, width=3, value_heads=1, value_width=4, dtype=torch.float32),
    5: LayerKv(heads=1, width=2, value_heads=1, value_width=0, dtype=torch.bfloat16),
}
POSITION_BYTES = (2 * 3 + 4) * 4 + 2 * 2
ONE, TWO = SessionId("one"), SessionId("two")

Rows = dict[int, tuple[torch.Tensor, torch.Tensor]]


def pool(positions: int) -> KvPool:
    return KvPool(LAYERS, positions * POSITION_BYTES, CPU)


def some_rows(count: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            torch.randn((kv.heads, count, kv.width), generator=generator).to(kv.dtype),
            torch.randn((kv.value_heads, count, kv.value_width), generator=generator).to(kv.dtype),
        )
        for layer, kv in LAYERS.items()
    }


def filled(held: int, positions: int = 10) -> SessionKv:
    kv = SessionKv(LAYERS, positions, CPU)
    kv.restore(0, some_rows(held))
    return kv


def content(kv: SessionKv) -> Rows:
    return {layer: kv.export(layer, 0, kv.held) for layer in LAYERS}


def assert_equal(ours: Rows, theirs: Rows) -> None:
    assert ours.keys() == theirs.keys()
    for layer, pair in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, theirs[layer], strict=True))


def test_a_position_takes_the_bytes_of_its_keys_and_values_in_every_layer() -> None:
    kv = pool(1).reserve(ONE, 1)
    slabs = [*kv.keys.values(), *kv.values.values()]
    assert sum(slab.nbytes for slab in slabs) == pool(1).bytes_per_position == POSITION_BYTES


def test_reserved_bytes_are_counted_until_they_are_released() -> None:
    kv = pool(10)
    kv.reserve(ONE, 4)
    kv.reserve(TWO, 6)
    assert kv.bytes_used == kv.bytes_max == 10 * POSITION_BYTES
    kv.release(ONE)
    assert kv.bytes_used == 6 * POSITION_BYTES
    kv.release(TWO)
    assert kv.bytes_used == 0


def test_a_full_pool_says_when_to_ask_again_and_serves_whoever_asks_after_a_release() -> None:
    kv = pool(10)
    kv.reserve(ONE, 6)
    with pytest.raises(Overloaded, match="5 positions") as refused:
        kv.reserve(TWO, 5)
    assert refused.value.retry_after_s
    assert kv.bytes_used == 6 * POSITION_BYTES
    kv.release(ONE)
    kv.reserve(TWO, 5)


def test_what_exceeds_the_whole_pool_is_not_worth_asking_again() -> None:
    kv = pool(10)
    with pytest.raises(InvalidRequest, match="11 positions"):
        kv.reserve(ONE, 11)
    assert kv.bytes_used == 0
    kv.reserve(ONE, 10)


def test_a_session_reserves_once() -> None:
    kv = pool(10)
    kv.reserve(ONE, 4)
    with pytest.raises(BrokenInvariant, match="one"):
        kv.reserve(ONE, 4)
    kv.release(ONE)
    assert kv.bytes_used == 0


def test_releasing_twice_or_what_was_never_there_frees_nothing() -> None:
    kv = pool(10)
    kv.reserve(ONE, 4)
    kv.release(TWO)
    assert kv.bytes_used == 4 * POSITION_BYTES
    kv.release(ONE)
    kv.release(ONE)
    assert kv.bytes_used == 0


def test_memory_that_the_machine_does_not_have_is_a_typed_error_and_nothing_stays_reserved() -> None:
    kv = KvPool(LAYERS, 1 << 62, CPU)
    with pytest.raises(OutOfMemory, match="positions"):
        kv.reserve(ONE, (1 << 61) // POSITION_BYTES)
    assert kv.bytes_used == 0
    kv.reserve(ONE, 3)


@pytest.mark.parametrize("position", [0, 3, 7])
def test_truncated_kv_holds_what_came_before(position: int) -> None:
    kv = filled(7)
    before = {layer: kv.export(layer, 0, position) for layer in LAYERS}
    kv.truncate(position)
    assert kv.held == position
    assert_equal(content(kv), before)


@pytest.mark.parametrize("position", [-1, 8])
def test_kv_is_not_truncated_to_where_it_never_was(position: int) -> None:
    kv = filled(7)
    with pytest.raises(BrokenInvariant, match="7 positions are held"):
        kv.truncate(position)
    assert kv.held == 7


def test_rows_that_were_written_count_only_once_held_passes_them() -> None:
    kv = filled(4)
    before = content(kv)
    for layer, (key, value) in some_rows(3, seed=1).items():
        kv.write(layer, 4, key, value)
    assert_equal(content(kv), before)
    kv.held = 7
    assert_equal({layer: kv.export(layer, 4, 7) for layer in LAYERS}, some_rows(3, seed=1))


@pytest.mark.parametrize(("start", "end"), [(0, 8), (-1, 3), (5, 4), (7, 9)])
def test_only_held_rows_are_exported(start: int, end: int) -> None:
    with pytest.raises(InvalidRequest, match="7 are held"):
        filled(7).export(2, start, end)


def test_what_was_exported_does_not_change_with_the_session() -> None:
    kv = filled(7)
    exported = content(kv)
    kv.restore(0, some_rows(7, seed=1))
    assert_equal(exported, some_rows(7))


def test_restored_in_two_parts_is_restored() -> None:
    source, kv = filled(7), SessionKv(LAYERS, 10, CPU)
    kv.restore(0, {layer: source.export(layer, 0, 4) for layer in LAYERS})
    kv.restore(4, {layer: source.export(layer, 4, 7) for layer in LAYERS})
    assert_equal(content(kv), content(source))


def one_wrong(change: Callable[[torch.Tensor], torch.Tensor], which: int) -> Rows:
    rows = some_rows(3, seed=1)
    pair = list(rows[5])
    pair[which] = change(pair[which])
    return rows | {5: (pair[0], pair[1])}


WRONG: dict[str, Rows] = {
    "a layer is missing": {2: some_rows(3)[2]},
    "a layer is not of this stage": some_rows(3) | {9: some_rows(3)[2]},
    "no layer": {},
    "key of another dtype": one_wrong(torch.Tensor.float, 0),
    "value of another dtype": one_wrong(torch.Tensor.float, 1),
    "fewer rows": one_wrong(lambda t: t[:, :2], 0),
    "more values than keys": one_wrong(lambda t: torch.cat([t, t], 1), 1),
    "wider": one_wrong(lambda t: torch.cat([t, t], 2), 0),
    "more heads": one_wrong(lambda t: torch.cat([t, t], 0), 1),
    "too few axes": one_wrong(lambda t: t[0], 0),
    "first layer without axes": {2: (torch.tensor(1.0), torch.tensor(1.0)), 5: some_rows(3)[5]},
    "more than reserved": some_rows(7),
}


@pytest.mark.parametrize("rows", WRONG.values(), ids=WRONG.keys())
def test_rows_that_do_not_fit_are_refused_and_nothing_is_changed(rows: Rows) -> None:
    kv = filled(4)
    before = content(kv)
    with pytest.raises(InvalidRequest):
        kv.restore(4, rows)
    assert kv.held == 4
    assert_equal(content(kv), before)


@pytest.mark.parametrize("start", [-1, 5])
def test_rows_are_not_restored_behind_a_gap(start: int) -> None:
    kv = filled(4)
    with pytest.raises(InvalidRequest, match="4 held"):
        kv.restore(start, some_rows(1))
    assert kv.held == 4


def test_a_packed_layer_returns_the_contexts_of_all_sessions_one_after_another() -> None:
    first, second = filled(4), filled(2)
    new = torch.arange(2 * 5 * 3, dtype=torch.float32).view(1, 2, 5, 3)
    values = torch.arange(5 * 4, dtype=torch.float32).view(1, 1, 5, 4)
    cache = RaggedCache([Slice(first, 4, 0, 2), Slice(second, 1, 2, 5)], direct=frozenset())
    keys, packed_values = cache.update(new, values, 2)
    assert torch.equal(
        keys[0], torch.cat([first.keys[2][:, :4], new[0, :, :2], second.keys[2][:, :1], new[0, :, 2:]], 1)
    )
    assert packed_values.shape == (1, 1, 6 + 4, 4)
    assert torch.equal(first.keys[2][:, 4:6], new[0, :, :2])
    assert torch.equal(second.values[2][:, 1:4], values[0, :, 2:])
    assert (first.held, second.held) == (4, 2)


def test_a_direct_layer_returns_the_new_rows_themselves_and_writes_them_to_the_slabs() -> None:
    first, second = filled(4), filled(2)
    new, values = torch.randn((1, 2, 5, 3)), torch.randn((1, 1, 5, 4))
    cache = RaggedCache([Slice(first, 4, 0, 2), Slice(second, 1, 2, 5)], direct=frozenset({2}))
    keys, same_values = cache.update(new, values, 2)
    assert keys is new
    assert same_values is values
    assert torch.equal(first.keys[2][:, 4:6], new[0, :, :2])
    assert torch.equal(second.keys[2][:, 1:4], new[0, :, 2:])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_session_whose_kv_moved_to_another_stage_goes_on_with_the_same_tokens(family: str) -> None:
    """Mixtral's layers are direct, DeepSeek's keep latents that the layer expands."""
    tiny = model(family)
    here, there = Chain(tiny, cuts=(1,)), Chain(tiny, cuts=(1,))
    prompt = list(range(5, 30))
    stays = here.open("stays", prompt, 12)
    moves = here.open("moves", prompt, 12)
    for _ in range(6):
        here.feed(stays, moves)
    arrived = there.open("moves", here.answers[moves].log, 6)
    for old, new in zip(here.stages, there.stages, strict=True):
        kv = old.session_kv(moves)
        new.session_kv(arrived).restore(0, {layer: kv.export(layer, 0, kv.held) for layer in kv.keys})
    here.close(moves)
    for _ in range(6):
        here.feed(stays)
        there.feed(arrived)
    assert there.held(arrived) == 25 + 11
    assert there.answers[arrived].log == here.answers[stays].log
