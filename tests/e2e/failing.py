"""An expert peer that fails in the middle of an answer, whichever peer that is, and what the door must make of it.

Law: a case counts only if the peer had a call in its hands when it failed, and the door says that it went elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from deeds import Deed

if TYPE_CHECKING:
    from collections.abc import Callable

    from deeds import What
    from swarm import Answer, Node, Swarm

DOOR = 0
Moment = Literal["prefill", "early", "late"]


def answer_while_a_peer_fails(swarm: Swarm, what: What, moment: Moment, ask: Callable[[], Answer]) -> list[Answer]:
    """Two answers: while all is well, which tells how many calls one takes, and then with the failure.

    All nodes are well again when it returns, and the door has forgotten what it knew of the one that failed.
    """
    before = _calls(swarm)
    well = ask()
    calls = sum(_calls(swarm).values()) - sum(before.values())
    others = [node for node in swarm.nodes if node is not swarm[DOOR]]
    # Some peer serves as many calls as the mean one, whoever is asked this time: half of that is never too late.
    after = {"prefill": 1, "early": 2, "late": calls // len(others) // 2}[moment]
    claim = swarm[DOOR].folder / "claim"
    claim.unlink(missing_ok=True)
    for node in others:
        node.order(Deed(what, "prefill" if moment == "prefill" else "decode", after, str(claim)))
    retried = _retried(swarm)
    try:
        answer = ask()
        failed = _failed(others)
        assert [len(node.done) for node in failed] == [1], "one peer was in use, and failed then"
        (victim,) = failed
        assert _retried(swarm)[victim.peer] > retried.get(victim.peer, 0), "the door counted that a call went elsewhere"
        assert victim.peer in [notice.peer_id for notice in answer.notices], "the client was told"
    finally:
        for node in others:
            node.withdraw()
        ended = [*_failed(others), swarm[DOOR]]
        for node in ended:
            node.kill()
        swarm.restart(*ended)
    return [well, answer]


def _failed(others: list[Node]) -> list[Node]:
    return [node for node in others if node.done]


def _calls(swarm: Swarm) -> dict[str, int]:
    """To other nodes, for the door's stage, since it started."""
    return {peer: work.calls for peer, work in swarm.work(DOOR).items() if peer != swarm[DOOR].peer}


def _retried(swarm: Swarm) -> dict[str, int]:
    return {peer: work.retried for peer, work in swarm.work(DOOR).items()}
