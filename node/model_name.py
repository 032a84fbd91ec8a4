"""ModelName: the operator's name for a model.  PROTOCOL.md, section 16.

Pure: bytes in, verified state out.  Law: a name is its signer's claim; the id is the truth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from node import operator_signed
from node.operator_signed import check_name, refuse
from protos import peers_pb2 as pb
from protos.ids import ModelId
from protos.limits import MODEL_NAME_BYTES_MAX
from protos.transcript import MODEL_NAME_DOMAIN

if TYPE_CHECKING:
    from node.identity import Identity
    from node.network import Network

_WHAT: Final = "a model's name"
_MODEL_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ModelName:
    """Of two for one name the later one is in force.  `issued_at_ms`: since 1970."""

    name: str
    model_id: ModelId
    issued_at_ms: int


def sign(name: ModelName, operator: Identity) -> bytes:
    """Raises InvalidGrant for one that nobody would take."""
    _check(name)
    content = pb.ModelName(name=name.name, model_id=name.model_id, issued_at_ms=name.issued_at_ms).SerializeToString(
        deterministic=True
    )
    return operator_signed.write(content, MODEL_NAME_DOMAIN, operator)


def read(data: bytes, network: Network | None) -> ModelName:
    """Checked in this order: as operator_signed.read; protobuf; fields.

    `network` None: whichever it is of.  Raises InvalidGrant, WrongNetwork, InvalidSignature.
    """
    content = operator_signed.read(data, MODEL_NAME_DOMAIN, network, _WHAT, MODEL_NAME_BYTES_MAX)
    try:
        message = pb.ModelName.FromString(content)
    except DecodeError:
        refuse(_WHAT, "what was signed is none")
    name = ModelName(message.name, ModelId(message.model_id), message.issued_at_ms)
    _check(name)
    return name


def _check(name: ModelName) -> None:
    check_name(name.name, "text", _WHAT)
    if not name.name.strip() or not name.issued_at_ms:
        refuse(_WHAT, "it has no text or no time")
    if not _MODEL_ID.fullmatch(name.model_id):
        refuse(_WHAT, "what it stands for is no model id: 64 hex digits are")
