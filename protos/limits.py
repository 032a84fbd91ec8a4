"""The maximum of everything that another party decides the size of: unit last in the name, reason beside the number.

Law: a reader checks the limit before it allocates or parses; each limit has a test that reaches it.
"""

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

# --- manifest -----------------------------------------------------------------------------------------------------

MANIFEST_BYTES_MAX: Final = 64 * MIB
"""A model of 384 experts in each of 60 layers, two tensors an expert, needs 6 MiB."""

MANIFEST_UNITS_MAX: Final = 1 << 17
"""The same model has 23 000 units; each costs about 1 KiB once parsed."""

MANIFEST_TENSORS_MAX: Final = 1 << 19
"""Over all units. 64 MiB of JSON hold about as many entries; bounds what parsing allocates to a few hundred MiB."""

LAYERS_MAX: Final = 1024
"""The deepest published MoE models have below 100 layers."""

EXPERTS_MAX: Final = 4096
"""Experts in one layer; published models have up to 512."""

HIDDEN_MAX: Final = 1 << 17
"""Values in a row; published models have up to 16 384."""

VOCAB_MAX: Final = 1 << 24
"""Tokens; published vocabularies stay below 2**19. Bounds the allowed-token bitset to 2 MiB."""

CONTEXT_MAX: Final = 1 << 24
"""Positions; the longest published context is 10 million."""

NAME_CHARS_MAX: Final = 64
"""Family, architecture and experts function: they are identifiers in transformers' source."""

TENSOR_NAME_CHARS_MAX: Final = 256
"""Parameter paths inside one layer stay below 80."""

TENSOR_RANK_MAX: Final = 8
"""Weights have rank 1 to 3, convolutions up to 5."""

TENSOR_DIM_MAX: Final = 1 << 40
"""One dimension; keeps every product of a sane shape inside 64 bits."""

UNIT_BYTES_MAX: Final = 1 * TIB
"""One unit; the largest trunk of a published model is below 2 GiB, an embedding table below 8 GiB."""

# --- tensor frame -------------------------------------------------------------------------------------------------

FRAME_RANK_MAX: Final = 4
"""Rows have rank 2, KV of one layer 3 or 4."""

FRAME_BYTES_MAX: Final = 64 * MIB
"""Rows of one step or expert call, header included: almost 2048 rows of 8192 float32. A sender splits by rows."""

FRAME_HEADER_BYTES_MAX: Final = 16 + 8 * FRAME_RANK_MAX
"""What a frame has before its data, at most."""

# --- sampling -----------------------------------------------------------------------------------------------------

OUTPUT_TOKENS_MAX: Final = 1 << 20
"""max_tokens: KV for all of them is reserved at Open."""

TEMPERATURE_MIN: Final = 1e-6
"""Smallest that is not 0: keeps logits / temperature finite in float32."""

TEMPERATURE_MAX: Final = 100.0
"""Beyond it every distribution is flat."""

REPETITION_PENALTY_MIN: Final = 0.01
"""Keeps logits / penalty finite in float32."""

REPETITION_PENALTY_MAX: Final = 100.0
"""The same, for logits * penalty."""

ADDITIVE_PENALTY_MAX: Final = 2.0
"""Presence and frequency penalty, either sign: the range of the OpenAI API."""

SEED_MAX: Final = (1 << 64) - 1
"""The sampler hashes eight bytes of it."""

CHOICES_MAX: Final = 128
"""Answers to one request (`n` of the OpenAI API)."""

STOP_TOKENS_MAX: Final = 64
"""Token ids that end an answer; generation configs list up to about ten."""

TOKEN_ID_MAX: Final = (1 << 31) - 1
"""A token id fits an int32 on every device."""

TOP_LOGPROBS_MAX: Final = 20
"""The OpenAI API's limit."""

# --- messages -----------------------------------------------------------------------------------------------------

INFERENCE_MESSAGE_BYTES_MAX: Final = 16 * MIB
"""A message of a client or to it: LOG_TOKENS_MAX ids of five bytes are 10 MiB, a text of as many tokens about 8 MiB."""

STAGE_MESSAGE_BYTES_MAX: Final = FRAME_BYTES_MAX + 16 * MIB
"""The largest Step: a frame, and beside it token ids and a bitset of 2 MiB. The largest Open: 10 MiB of log."""

EXPERT_MESSAGE_BYTES_MAX: Final = FRAME_BYTES_MAX + 4 * MIB
"""The largest call: a frame, and beside it 1 MiB of pairs and 0.3 MiB of unit hashes."""

ID_CHARS_MAX: Final = 128
"""Session ids, model ids, peer ids and unit hashes in a message; hashes have 64."""

ADDRESS_CHARS_MAX: Final = 300
"""`host:port`: a DNS name has at most 253 characters."""

LOG_TOKENS_MAX: Final = 1 << 21
"""Token ids in one message: prompt and answer so far."""

CHAT_MESSAGES_MAX: Final = 4096
"""Messages of one chat; the limit of the whole message bounds their text."""

ROLE_CHARS_MAX: Final = 64
"""The role of a chat message."""

STOP_STRINGS_MAX: Final = 16
"""Stop strings of one request; the OpenAI API allows 4."""

STOP_STRING_CHARS_MAX: Final = 256
"""The door holds back that much text while it looks for one."""

ROUTE_STAGES_MAX: Final = LAYERS_MAX
"""A stage has at least one layer."""

STEP_ROWS_MAX: Final = 1 << 14
"""Rows (positions) in one step; a longer feed goes in several."""

PAIRS_MAX: Final = 1 << 17
"""(row, expert) pairs in one expert call: STEP_ROWS_MAX rows with 8 experts each."""

RESUME_KEY_BYTES: Final = 32
"""A session's resume key, and its sha256 that the stages keep."""

ERROR_MESSAGE_CHARS_MAX: Final = 1024
"""A typed error's message: it also travels in gRPC trailers, of which receivers take 8 KiB in all."""

# --- peers --------------------------------------------------------------------------------------------------------

KEY_FILE_BYTES_MAX: Final = 4 * KIB
"""A key in PEM has about 120 bytes."""

PUBLIC_KEY_BYTES: Final = 32
"""Ed25519."""

SIGNATURE_BYTES: Final = 64
"""Ed25519."""

NONCE_BYTES: Final = 32
"""Random, on both sides of a Hello."""

TOKEN_BYTES: Final = 32
"""Random; who knows it is taken for who said Hello."""

CLOCK_DIFFERENCE_S_MAX: Final = 300
"""Between what a Hello or a record says and the receiver's clock; volunteers' clocks are minutes off, not hours."""

NONCES_MAX: Final = 4096
"""Challenges that wait for their Hello, 30 s at most; beyond it the oldest is forgotten."""

TOKENS_MAX: Final = 4096
"""Tokens in force at one node, about 1 KiB each; beyond it the host with most of them gives way, or is refused."""

TOKENS_OF_A_PEER_MAX: Final = 64
"""Of these, one peer's: each start of a command says Hello with its user's key. Beyond it the oldest ends."""

HELLO_MESSAGE_BYTES_MAX: Final = 4 * KIB
"""A Challenge or a Hello, which anybody may send: a Hello has 180 bytes."""

PEERS_MESSAGE_BYTES_MAX: Final = 4 * MIB
"""A message of Peers: a thousand records of 4 KiB."""

RECORD_BYTES_MAX: Final = 8 * KIB
"""A signed record. 58 layers with other experts of 256 in each need 2.4 KB with a grant, 60 with 384 in each 3.5 KB."""

RECORDS_MAX: Final = 1 << 14
"""Peers in a routing table: a network of ten thousand, and room. 128 MiB at worst, 10 to 40 in practice."""

RECORD_EXPERT_LAYERS_MAX: Final = 512
"""Layers with experts, over all of a record's models: a few bytes may name many, and each costs 40 once parsed."""

RECORD_S_MAX: Final = 86_400
"""From a record's issue to its expiry: a peer that is gone is forgotten within a day."""

RECORD_ADDRESSES_MAX: Final = 4
"""Addresses of one node."""

RECORD_HOLDINGS_MAX: Final = 8
"""Models of which one node holds units."""

NETWORK_ID_BYTES: Final = 32
"""sha256, of an open network's name or of an operator's key."""

NEWCOMERS_MAX: Final = 12_288
"""Peers of an open network in a routing table that this node has not reached yet. So 4096 places are for the reached
alone, however many identities are invented; and a network of ten thousand can still be learned from one seed."""

REACHED_OF_SITE_MAX: Final = 64
"""Reached peers at one host, IPv6 /64 or domain that nobody pushes out: a testnet on one machine, or the nodes behind
one router. More of them can take part, as newcomers do."""

NEWCOMERS_OF_SENDER_MAX: Final = 1024
"""Unknown peers that one sender may introduce in a minute: a signature each, so 0.1 s of computing."""

NEWCOMER_SENDERS_MAX: Final = 1024
"""Senders that introduce somebody within one minute; what others say of unknown peers waits for the next."""

NEWCOMER_S_MAX: Final = 3600
"""An unreached peer is forgotten after so long: a ping a second to each in turn reaches 3600."""

EVIDENCE_MAX: Final = 64
"""Peers of which two records with one sequence are kept; 1 MiB."""

MARKS_MAX: Final = 1 << 16
"""High-water marks of sequences: four times the peers of a table, since a mark outlives its record by a day. 4 MiB."""

GRANT_BYTES_MAX: Final = 768
"""A signed grant: 140 bytes, and a zone and an owner of NAME_CHARS_MAX characters of 4 bytes."""

GRANT_S_MAX: Final = 366 * 86_400
"""From a grant's issue to its expiry: revocations must be kept for as long."""

REVOCATIONS_MAX: Final = RECORDS_MAX
"""Peers on a revocation list: as many as a network has. Those whose grants have expired leave the next list."""

REVOCATIONS_BYTES_MAX: Final = 1 * MIB
"""A signed revocation list: 45 bytes for each peer."""

MODEL_NAME_BYTES_MAX: Final = 512
"""A signed model name: 180 bytes, and a name of NAME_CHARS_MAX characters of 4 bytes."""

LOAD_BYTES_MAX: Final = 512
"""A signed load report with LOAD_HOTTEST_MAX experts has 330 bytes; it fits a datagram beside others."""

LOAD_HOTTEST_MAX: Final = 8
"""Experts in a load report: what is worth another replica now."""

LOAD_S_MAX: Final = 15
"""A load report is forgotten after so many seconds."""

SYNC_BUCKETS_MAX: Final = 256
"""Digests in a push-pull: 3 KiB. At ten thousand peers a bucket has 40, whose entries are 640 bytes."""

SYNC_RECORDS_MAX: Final = NEWCOMERS_OF_SENDER_MAX
"""Records in one push-pull message: what a receiver takes from one sender in a minute. The rest goes next time."""

SYNC_CLAIMS_MAX: Final = 8192
"""Claims in one push-pull message, 0.9 MiB. The rest goes next time."""

SYNC_SUSPICIONS_MAX: Final = 512
"""Suspicions in one push-pull message: what a receiver may have to verify beyond news. A network in which more are in
force at once has lost a part, which a few of them tell as well."""

DIAL_BACKS_AT_ONCE_MAX: Final = 2
"""Callers that are called back at once: each holds a thread of the four for control, for some seconds."""

DATAGRAM_BYTES_MAX: Final = 1200
"""Of gossip, signature included: QUIC's number, which crosses every path that IPv6 (1280) or a tunnel makes narrow."""

GOSSIP_ITEMS_MAX: Final = 8
"""Claims and suspicions on a datagram; as many as usually fit, and what one datagram can make its receiver verify."""

INCARNATION_MAX: Final = 1 << 63
"""Milliseconds since 1970 stay far below, so that a node can always go above its past."""
