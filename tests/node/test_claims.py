"""PROTOCOL.md section 17: two books of claims find out by digests what differs, and are the same then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from toy_membership import claim, peer

from node.claims import Claims
from node.reconcile import DIGEST_BYTES
from protos.limits import SYNC_BUCKETS_MAX

if TYPE_CHECKING:
    from node.claim import Claim, PeerHash

PEERS = range(60)
words = st.dictionaries(
    st.sampled_from(PEERS), st.tuples(st.integers(1, 4), st.booleans(), st.integers(1, 2)), max_size=len(PEERS)
)


def book(contents: dict[int, tuple[int, bool, int]]) -> Claims:
    made = Claims()
    for number, (incarnation, left, sequence) in contents.items():
        made.put(claim(number, incarnation, sequence, left=left))
    return made


def everything(of: Claims) -> dict[PeerHash, Claim]:
    return {found.peer: found for found in of.of([0], 1)}


def cut(digests: bytes) -> list[bytes]:
    return [digests[n : n + DIGEST_BYTES] for n in range(0, len(digests), DIGEST_BYTES)]


def take(into: Claims, claims: list[Claim]) -> None:
    """As membership does: only what is newer, and nobody who left and was unknown."""
    for one in claims:
        rank = into.rank_of(one.peer)
        if one.rank > rank and not (one.left and rank[0] < 0):
            into.put(one)


def exchange(asker: Claims, answerer: Claims) -> int:
    """How many claims crossed."""
    asked = cut(asker.digests())
    differing = answerer.differing(asked)
    theirs = list(answerer.of(differing, len(asked)))
    newer = list(asker.newer(theirs, differing, len(asked)))
    take(asker, theirs)
    take(answerer, newer)
    return len(theirs) + len(newer)


@settings(deadline=None, max_examples=100)
@given(words, words, words)
def test_two_books_say_the_same_of_all_who_are_there(one: dict, two: dict, common: dict) -> None:
    asker, answerer = book(common | one), book(common | two)
    exchange(asker, answerer)
    assert asker.digests() == answerer.digests()
    mine, theirs = everything(asker), everything(answerer)
    for who in mine.keys() | theirs.keys():
        ranks = [claims[who].rank[:2] for claims in (mine, theirs) if who in claims]
        left = [is_left for _, is_left in ranks]
        assert len(ranks) == 2 or all(left), "only who has left is known to one alone"
        assert len(set(left)) == 1
        assert all(left) or len(set(ranks)) == 1
    assert exchange(asker, answerer) == 0


@settings(deadline=None, max_examples=100)
@given(words, st.lists(st.sampled_from(PEERS)))
def test_a_book_is_what_was_put_and_not_dropped_whatever_the_order(contents: dict, dropped: list[int]) -> None:
    made = book(dict.fromkeys(contents, (9, True, 9)))
    for number, (incarnation, left, sequence) in reversed(contents.items()):
        made.put(claim(number, incarnation, sequence, left=left))
    for number in dropped:
        made.drop(peer(number))
    wanted = {number: word for number, word in contents.items() if number not in dropped}
    assert everything(made) == everything(book(wanted))
    assert made.digests() == book(wanted).digests()
    assert len(made) == len(wanted)


def test_who_has_left_stands_in_no_digest_but_goes_along_where_one_differs() -> None:
    one, two = book({1: (5, True, 1)}), book({})
    assert one.digests() == two.digests()
    assert two.differing(cut(one.digests())) == []
    assert [found.left for found in one.of([0], 1)] == [True]


def test_a_newer_record_alone_is_no_difference_of_claims() -> None:
    """It is one of records, and comes with them."""
    assert book({1: (5, False, 1)}).digests() == book({1: (5, False, 2)}).digests()


def test_there_are_as_many_digests_as_claims_want() -> None:
    for size, count in ((0, 1), (16, 1), (17, 2), (300, 32)):
        assert len(book(dict.fromkeys(range(size), (1, False, 1))).digests()) == count * DIGEST_BYTES
    many = Claims()
    for number in range(16 * SYNC_BUCKETS_MAX + 1):
        many.put(claim(number))
    assert len(many.digests()) // DIGEST_BYTES == SYNC_BUCKETS_MAX


def test_each_claim_is_in_one_bucket_of_any_number() -> None:
    made = book({number: (1, number % 3 == 0, 1) for number in PEERS})
    for count in (1, 2, 16, SYNC_BUCKETS_MAX):
        found = [one.peer for bucket in range(count) for one in made.of([bucket], count)]
        assert sorted(found) == sorted(peer(number) for number in PEERS)


def test_nobody_is_below_all() -> None:
    made = book({1: (0, False, 0)})
    assert made.rank_of(peer(2)) < made.rank_of(peer(1))
    made.drop(peer(2))
    assert len(made) == 1
