import pytest

from node.address import Address, parse, site
from node.identity import peer_id
from protos.errors import InvalidRequest
from protos.limits import ADDRESS_CHARS_MAX

PEER = peer_id(bytes(32))


@pytest.mark.parametrize(
    ("text", "expected", "host", "port"),
    [
        ("127.0.0.1:7645", Address("127.0.0.1:7645"), "127.0.0.1", 7645),
        ("[::1]:1", Address("[::1]:1"), "::1", 1),
        (f"a.example:65535#{PEER}", Address("a.example:65535", PEER), "a.example", 65535),
    ],
)
def test_an_address_is_read(text: str, expected: Address, host: str, port: int) -> None:
    assert (parse(text), parse(text).host, parse(text).port) == (expected, host, port)


@pytest.mark.parametrize(
    "text",
    [
        "", ":1", "host", "host:", "host:0", "host:65536", "host:x", "host:²", "::1:80", "ho\nst:1", "host:999999",
        "host:1#", "host:1#short", f"host:1#{PEER.upper()}", f"host:1#{PEER}a",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse(text)


def test_an_address_may_have_so_many_characters_and_no_more() -> None:
    longest = "h" * (ADDRESS_CHARS_MAX - 2) + ":1"
    assert parse(longest).host_port == longest
    with pytest.raises(InvalidRequest):
        parse("h" + longest)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("2001:db8:1:2:aa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bb::ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("0x7f.0.0.01", "127.0.0.1"),
        ("a.example", "a.example"),
        ("one.of.many.Example.", "many.example"),
        ("1.2.3.4.example", "4.example"),
        ("localhost", "localhost"),
        ("no:address", "no:address"),
    ],
)
def test_what_one_party_has_many_of_is_one_site(host: str, expected: str) -> None:
    assert site(host) == expected
