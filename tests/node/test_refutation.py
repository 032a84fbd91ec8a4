"""PROTOCOL.md section 15: what an accused node says, and what it does not."""

from __future__ import annotations

from dataclasses import replace

from toy_membership import NETWORK, QUIET, START, Shoal, census, claim, core, key, peer, sent, signer, suspicion

from node.claim import sign_claim
from node.member import State
from node.membership_effect import Changed, Refusal, Refused, Send
from node.membership_event import Received, Synced
from node.message import Ack, Gossip, Ping
from protos.limits import INCARNATION_MAX


def test_a_forged_death_of_a_healthy_node_leads_to_a_refutation_and_nothing_else() -> None:
    shoal = Shoal(5)
    lie = Gossip((suspicion(1, 4),))
    for at in (0, 1, 2, 3):
        shoal.tell(at, Received(peer(4), lie))
    shoal.run(10)
    changes = [e for _, _, e in shoal.effects if isinstance(e, Changed)]
    assert {e.after for e in changes} <= {State.SUSPECT, State.ALIVE}
    assert {shoal.state(1, at) for at in (0, 2, 3, 4)} == {State.ALIVE}
    assert shoal[1].claim.incarnation == START + 1


def test_an_accused_node_raises_its_incarnation_answers_and_counts_it_against_its_health() -> None:
    node = core(1, census(4), profile=QUIET)
    [ack] = sent(node.handle(Received(peer(2), Ping(5, (suspicion(1, 2),))), 0.0), Ack)
    assert ack.message.gossip[0] == claim(1, START + 1)
    assert node.health == 1
    [reply] = sent(node.handle(Received(peer(2), Gossip((suspicion(1, 3, START + 1),))), 0.1), Gossip)
    assert reply.message.gossip[0] == claim(1, START + 2)
    assert node.health == 1  # once in a period: nobody can talk a node ill


def test_an_accuser_that_is_refuted_again_and_again_is_not_heard_about_that_member_any_more() -> None:
    node = core(1, census(5), profile=QUIET)

    def accuse(subject: int, accuser: int, now: float) -> State:
        held = node.member(peer(subject)).claim
        node.handle(Received(peer(accuser), Gossip((suspicion(subject, accuser, held.incarnation),))), now)
        state = node.member(peer(subject)).state
        refuted = claim(subject, held.incarnation + 1)
        node.handle(Received(peer(subject), Gossip((refuted,))), now)
        return state

    assert [accuse(3, 2, 0.1 * n) for n in range(6)] == [State.SUSPECT] * 4 + [State.ALIVE] * 2
    assert accuse(4, 2, 1.0) is State.SUSPECT, "about another it is heard"
    assert accuse(3, 4, 1.0) is State.SUSPECT, "and another is heard about that one"
    assert accuse(3, 2, 1.0 + QUIET.accuser_gap_s) is State.SUSPECT


def test_a_stale_accusation_is_answered_with_the_claim_in_force() -> None:
    node = core(1, census(4), profile=QUIET, incarnation=START + 7)
    [reply] = sent(node.handle(Received(peer(2), Gossip((suspicion(1, 3),))), 0.0), Gossip)
    assert node.claim in reply.message.gossip
    assert node.claim == claim(1, START + 7)


def test_an_accusation_of_an_incarnation_that_never_was_raises_nothing() -> None:
    node = core(1, census(4), profile=QUIET)
    assert node.handle(Received(peer(2), Gossip((suspicion(1, 2, INCARNATION_MAX),))), 0.0) == []
    assert node.claim == claim(1)


def test_two_that_have_signed_the_highest_incarnation_do_not_contradict_each_other_without_end() -> None:
    pair = Shoal(2)
    gone = tuple(claim(number, INCARNATION_MAX, left=True) for number in range(2))
    accused = tuple(suspicion(number, 1 - number, INCARNATION_MAX) for number in range(2))
    for number in range(2):
        pair.tell(number, Synced(peer(1 - number), gone, accused))
    pair.run(5.0)
    assert len([effect for _, _, effect in pair.effects if isinstance(effect, Send)]) < 100


def test_an_accusation_of_less_than_the_highest_incarnation_is_answered_with_it() -> None:
    node = core(1, census(4), profile=QUIET)
    node.handle(Synced(peer(2), (claim(1, INCARNATION_MAX),)), 0.0)
    [reply] = sent(node.handle(Received(peer(2), Gossip((suspicion(1, 3),))), 1.0), Gossip)
    assert reply.message.gossip[0] == claim(1, INCARNATION_MAX)
    assert node.handle(Received(peer(2), Gossip((suspicion(1, 3, INCARNATION_MAX),))), 2.0) == []


def test_a_forged_accusation_is_not_refuted() -> None:
    node = core(1, census(4), profile=QUIET)
    effects = node.handle(Received(peer(2), Gossip((replace(suspicion(1, 2), signature=bytes(64)),))), 0.0)
    assert effects == [Refused(peer(2), Refusal.FORGED)]
    assert node.claim == claim(1)


def test_an_accuser_who_is_thought_dead_is_refuted_too_but_says_nothing_about_health() -> None:
    node = core(1, census(4), profile=QUIET)
    node.handle(Received(peer(2), Gossip((suspicion(1, 77),))), 0.0)
    assert node.claim.incarnation == START + 1
    assert node.health == 0


def test_a_higher_claim_of_its_own_is_gone_above_and_a_forged_one_is_not() -> None:
    node = core(1, census(4), profile=QUIET)
    node.handle(Received(peer(2), Gossip((replace(claim(1, START + 9), signature=bytes(64)),))), 0.0)
    assert node.claim.incarnation == START
    node.handle(Synced(peer(2), (claim(1, START + 9),)), 0.0)
    assert node.claim.incarnation == START + 10
    node.handle(Synced(peer(2), (claim(1, INCARNATION_MAX),)), 0.0)
    assert node.claim.incarnation == INCARNATION_MAX


def test_a_push_pull_that_accuses_this_node_is_answered_at_once() -> None:
    node = core(1, census(4), profile=QUIET)
    [reply] = sent(node.handle(Synced(peer(2), (), (suspicion(1, 2),)), 0.0), Gossip)
    assert (reply.to, reply.message.gossip[0]) == (peer(2), claim(1, START + 1))


def test_nobody_raises_anothers_incarnation() -> None:
    node = core(0, census(4), profile=QUIET)
    raised = sign_claim(signer(key(2)), NETWORK, key(1), START + 50, 1)  # signed by 2
    assert node.handle(Received(peer(2), Gossip((raised,))), 0.0) == [Refused(peer(2), Refusal.FORGED)]
    assert node.member(peer(1)).claim == claim(1)
