"""What the operator of a permissioned network says: bytes that its key signed.  PROTOCOL.md, section 16.

Pure: bytes in, verified content out.  Law: the key is in the message, and the network's id is its sha256, so whoever
knows the id knows whom to believe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from google.protobuf.message import DecodeError

from node import network as networks
from node.identity import peer_of, verify
from protos import peers_pb2 as pb
from protos.errors import InvalidGrant
from protos.limits import NAME_CHARS_MAX, PUBLIC_KEY_BYTES, SIGNATURE_BYTES

if TYPE_CHECKING:
    from node.identity import Identity
    from node.network import Network
    from protos.ids import PeerId

_PEER_BYTES = 32


def write(content: bytes, domain: bytes, operator: Identity) -> bytes:
    """The bytes of an OperatorSigned."""
    made = pb.OperatorSigned(
        content=content, operator_key=operator.public_key, signature=operator.sign(domain, content)
    )
    return made.SerializeToString(deterministic=True)


def read(data: bytes, domain: bytes, network: Network | None, what: str, bytes_max: int) -> bytes:
    """The content, checked in this order: size; protobuf; lengths of key and signature; network; signature.

    `network` None: whichever it is of.  Raises InvalidGrant, WrongNetwork, InvalidSignature.
    """
    if len(data) > bytes_max:
        refuse(what, f"it has {len(data)} bytes; at most {bytes_max} are allowed")
    try:
        message = pb.OperatorSigned.FromString(data)
    except DecodeError:
        refuse(what, "nobody signed it")
    if len(message.operator_key) != PUBLIC_KEY_BYTES or len(message.signature) != SIGNATURE_BYTES:
        refuse(what, "its key or its signature has not the length of one")
    if network is not None:
        network.check(networks.permissioned(message.operator_key).id, what)
    verify(message.operator_key, message.signature, domain, message.content)
    return message.content


def network_of(data: bytes) -> Network:
    """Of which network this claims to be; nothing is verified.  Raises InvalidGrant."""
    try:
        return networks.permissioned(pb.OperatorSigned.FromString(data).operator_key)
    except DecodeError:
        refuse("this", "nobody signed it")


def peer(raw: bytes, what: str) -> PeerId:
    """Raises InvalidGrant."""
    if len(raw) != _PEER_BYTES:
        refuse(what, "it names a peer by what is no peer's id")
    return peer_of(raw)


def check_name(text: str, field: str, what: str) -> None:
    """Raises InvalidGrant for what is too long, or what a terminal would obey."""
    if len(text) > NAME_CHARS_MAX or not (text.isprintable() or not text):
        refuse(what, f"its {field} is longer than {NAME_CHARS_MAX} characters, or not printable")


def refuse(what: str, why: str) -> NoReturn:
    raise InvalidGrant(f"{what} is refused: {why}")
