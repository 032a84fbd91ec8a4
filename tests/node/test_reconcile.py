"""PROTOCOL.md section 17: two tables find out what differs, and exchange only that."""

from __future__ import annotations

import contextlib
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node import reconcile
from node.identity import peer_bytes, peer_of
from node.network import Network, open_network
from node.reconcile import DIGEST_BYTES, EMPTY, Digest, follow_up, reply, request
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest, ShoalError, WrongNetwork
from protos.limits import (
    PEERS_MESSAGE_BYTES_MAX,
    RECORD_BYTES_MAX,
    REVOCATIONS_BYTES_MAX,
    SYNC_BUCKETS_MAX,
    SYNC_RECORDS_MAX,
)

if TYPE_CHECKING:
    from protos.ids import PeerId


class Toy:
    """A table whose records are (peer, sequence) and padding, and that believes everything."""

    def __init__(self, contents: dict[bytes, int] | None = None, size: int = 40) -> None:
        self.network: Network = open_network()
        self.digest = Digest()
        self.signed: dict[PeerId, bytes] = {}
        self.sequences: dict[bytes, int] = {}
        for peer, sequence in (contents or {}).items():
            self.merge(peer + sequence.to_bytes(8, "little") + bytes(size - 40))

    def merge(self, data: bytes) -> None:
        peer, sequence = data[:32], int.from_bytes(data[32:40], "little")
        if self.sequences.get(peer, -1) < sequence:
            self.sequences[peer] = sequence
            self.signed[peer_of(peer)] = data
            self.digest.put(peer, sequence)

    def signed_of(self, peer: PeerId) -> bytes | None:
        return self.signed.get(peer)


def synced(asker: Toy, answerer: Toy, seed: int = 0) -> list[int]:
    """Two round trips at most; the sizes of all messages."""
    random = Random(seed)
    first = request(asker)
    answer = reply(answerer, first, random)
    sizes = [first.ByteSize(), answer.ByteSize()]
    for data in answer.records:
        asker.merge(data)
    second = follow_up(asker, first, answer, random)
    if second is not None:
        for data in second.records:
            answerer.merge(data)
        last = reply(answerer, second, random)
        sizes += [second.ByteSize(), last.ByteSize()]
        for data in last.records:
            asker.merge(data)
    return sizes


def peers(count: int, seed: int = 0) -> list[bytes]:
    random = Random(seed)
    return [random.randbytes(32) for _ in range(count)]


def newest(one: Toy, two: Toy) -> dict[bytes, int]:
    both = one.sequences.keys() | two.sequences.keys()
    return {peer: max(one.sequences.get(peer, 0), two.sequences.get(peer, 0)) for peer in both}


POOL = peers(200)
tables = st.dictionaries(st.sampled_from(POOL), st.integers(1, 1 << 64 - 1), max_size=200)


@settings(deadline=None)
@given(tables, tables, st.dictionaries(st.sampled_from(POOL), st.integers(1, 9)))
def test_two_tables_are_equal_after_two_round_trips(one: dict, two: dict, common: dict) -> None:
    asker, answerer = Toy(common | one), Toy(common | two)
    wanted = newest(asker, answerer)
    synced(asker, answerer)
    assert asker.sequences == answerer.sequences == wanted
    assert len(synced(asker, answerer)) == 2


def test_equal_tables_of_ten_thousand_exchange_less_than_5_kb() -> None:
    contents = {peer: n + 1 for n, peer in enumerate(peers(10_000))}
    sizes = synced(Toy(contents), Toy(contents))
    assert len(sizes) == 2
    assert sum(sizes) < 5000


def test_one_new_record_among_ten_thousand_costs_its_bucket() -> None:
    contents = {peer: n + 1 for n, peer in enumerate(peers(10_000))}
    asker, answerer = Toy(contents, size=300), Toy(contents, size=300)
    answerer.merge(POOL[0] + (1 << 60).to_bytes(8, "little") + bytes(260))
    assert sum(synced(asker, answerer)) < 6000
    assert asker.sequences == answerer.sequences


def test_with_few_peers_the_digests_are_few() -> None:
    contents = dict.fromkeys(peers(10), 1)
    assert sum(synced(Toy(contents), Toy(contents))) < 150


def test_what_the_asker_surely_lacks_comes_with_the_first_answer() -> None:
    asker, answerer = Toy(), Toy(dict.fromkeys(peers(100), 1))
    assert len(synced(asker, answerer)) == 2
    assert asker.sequences == answerer.sequences
    assert len(synced(answerer, Toy())) == 4  # and what the answerer lacks, with the second request


def test_messages_are_bounded_and_the_rest_follows() -> None:
    contents = dict.fromkeys(peers(3 * SYNC_RECORDS_MAX), 1)
    asker, answerer = Toy(), Toy(contents, size=RECORD_BYTES_MAX)
    rounds = 0
    while asker.sequences != answerer.sequences:
        before = len(asker.sequences)
        sizes = synced(asker, answerer, seed=rounds)
        assert max(sizes) <= PEERS_MESSAGE_BYTES_MAX
        assert before < len(asker.sequences) <= before + 2 * SYNC_RECORDS_MAX
        rounds += 1
    assert rounds < 40


def test_the_records_of_a_message_leave_room_for_what_it_carries_beside_them() -> None:
    contents = dict.fromkeys(peers(SYNC_RECORDS_MAX), 1)
    table = Toy(contents, size=RECORD_BYTES_MAX)
    answer = reply(table, request(Toy()), Random(0))
    carried = sum(len(data) + 4 for data in answer.records)
    assert reconcile._RECORDS_BYTES_MAX - RECORD_BYTES_MAX - 4 < carried <= reconcile._RECORDS_BYTES_MAX
    assert answer.ByteSize() <= reconcile._RECORDS_BYTES_MAX + 1024  # its framing, with none of the rest in it
    assert reconcile._RECORDS_BYTES_MAX + REVOCATIONS_BYTES_MAX < PEERS_MESSAGE_BYTES_MAX


def test_a_record_that_is_refused_does_not_keep_others_from_coming() -> None:
    """Whoever fills a table with what nobody takes delays the rest by chance, not for ever."""
    contents = dict.fromkeys(peers(2 * SYNC_RECORDS_MAX), 1)
    refused = set(peers(SYNC_RECORDS_MAX))
    asker, answerer = Toy(), Toy(contents)
    take = asker.merge
    asker.merge = lambda data: None if data[:32] in refused else take(data)
    for seed in range(20):
        synced(asker, answerer, seed)
    assert asker.sequences.keys() == contents.keys() - refused


def test_peers_whose_ids_begin_alike_are_told_apart() -> None:
    """Somebody has tried 2**32 keys: his own records may take longer, and nobody else's."""
    twins = [POOL[0][:8] + bytes([n]) * 24 for n in range(3)]
    others = dict.fromkeys(POOL[:20], 7)
    one, two = Toy(others | {twins[0]: 1, twins[1]: 1}), Toy(others | {twins[2]: 1})
    for seed in range(4):
        synced(one, two, seed)
        synced(two, one, seed)
    assert one.sequences.keys() >= others.keys() | {twins[0]}
    assert {*one.sequences, *two.sequences} == {*others, *twins}


def test_a_digest_depends_on_what_is_there_and_not_on_how_it_came() -> None:
    forward, backward = Digest(), Digest()
    for peer in POOL:
        forward.put(peer, 1)
    for peer in reversed(POOL):
        backward.put(peer, 9)
        backward.put(peer, 1)
    backward.put(bytes(32), 3)
    backward.drop(bytes(32))
    for count in (1, 16, SYNC_BUCKETS_MAX):
        assert forward.digests(count) == backward.digests(count)
        assert len(forward.digests(count)) == count
    assert len(forward) == len(backward) == len(POOL)
    assert Digest().digests(2) == [EMPTY, EMPTY]


def test_another_network_is_refused_on_either_side() -> None:
    table, other = Toy({POOL[0]: 1}), Toy({POOL[0]: 1})
    other.network = open_network("other")
    with pytest.raises(WrongNetwork):
        reply(other, request(table), Random(0))
    with pytest.raises(WrongNetwork):
        follow_up(table, request(table), reply(other, request(other), Random(0)), Random(0))


NETWORK = open_network().id


@pytest.mark.parametrize(
    "wrong",
    [
        pb.SyncRequest(network=NETWORK, digests=b"x"),
        pb.SyncRequest(network=NETWORK, digests=bytes(3 * DIGEST_BYTES)),
        pb.SyncRequest(network=NETWORK, digests=bytes(2 * SYNC_BUCKETS_MAX * DIGEST_BYTES)),
        pb.SyncRequest(network=NETWORK, wants=b"x"),
        pb.SyncRequest(network=NETWORK, wants=bytes(8 * (SYNC_RECORDS_MAX + 1))),
    ],
)
def test_a_request_that_cannot_be_is_refused(wrong: pb.SyncRequest) -> None:
    with pytest.raises(InvalidRequest):
        reply(Toy({POOL[0]: 1}), wrong, Random(0))


@pytest.mark.parametrize(
    "wrong",
    [
        pb.SyncReply(network=NETWORK, differing=[1]),
        pb.SyncReply(network=NETWORK, differing=[0, 0]),
        pb.SyncReply(network=NETWORK, differing=[2**32 - 1]),
        pb.SyncReply(network=NETWORK, entries=bytes(15)),
        pb.SyncReply(network=NETWORK, entries=bytes(16 * 16_385)),
    ],
)
def test_an_answer_that_cannot_be_is_refused(wrong: pb.SyncReply) -> None:
    table = Toy({POOL[0]: 1})
    with pytest.raises(InvalidRequest):
        follow_up(table, request(table), wrong, Random(0))


@given(st.binary(max_size=64), st.binary(max_size=64), st.lists(st.integers(0, 300)), st.binary(max_size=64))
def test_any_bytes_are_a_typed_error_or_an_answer(
    digests: bytes, wants: bytes, differing: list, entries: bytes
) -> None:
    table = Toy(dict.fromkeys(POOL[:5], 1))
    with contextlib.suppress(ShoalError):
        reply(table, pb.SyncRequest(network=NETWORK, digests=digests, wants=wants), Random(0))
    with contextlib.suppress(ShoalError):
        answer = pb.SyncReply(network=NETWORK, differing=differing, entries=entries)
        follow_up(table, request(table), answer, Random(0))


def test_wants_are_answered_by_the_beginning_of_an_id() -> None:
    table = Toy(dict.fromkeys(POOL[:9], 1))
    answer = reply(table, pb.SyncRequest(network=NETWORK, wants=POOL[3][:8] + bytes(8)), Random(0))
    assert list(answer.records) == [table.signed[peer_of(POOL[3])]]
    assert peer_bytes(peer_of(POOL[3])) == POOL[3]
