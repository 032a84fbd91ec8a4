"""The size that the virtual network counts for a message is the size of the real datagram."""

from __future__ import annotations

import pytest

from node.claim import sign_claim, sign_suspicion
from node.datagram import write
from node.message import Ack, Gossip, Nack, Ping, PingRequest
from tests.sim.host import NETWORK
from tests.sim.notary import Notary
from tests.sim.wire import datagram_bytes

PEN = Notary().pen("one")
CLAIM = sign_claim(PEN.sign, NETWORK, PEN.key, 1_767_225_600_000, 1_767_225_600_001)
LEFT = sign_claim(PEN.sign, NETWORK, PEN.key, 2**40, 1, left=True)
SUSPICION = sign_suspicion(PEN.sign, NETWORK, CLAIM.peer, 1_767_225_600_000, PEN.key)


@pytest.mark.parametrize(
    "message",
    [
        Gossip((CLAIM,)),
        Gossip((CLAIM, LEFT, SUSPICION) * 2),
        Ping(2**63),
        Ping(1, (CLAIM, SUSPICION)),
        Ack(2**64 - 1, (LEFT,)),
        Nack(7),
        PingRequest(9, CLAIM.peer, (SUSPICION,)),
    ],
)
def test_the_counted_size_is_the_real_one(message: object) -> None:
    data = write(message, CLAIM.peer, NETWORK, PEN.key, PEN.sign)  # type: ignore[arg-type]
    assert datagram_bytes(message) == pytest.approx(len(data), abs=2)  # type: ignore[arg-type]
