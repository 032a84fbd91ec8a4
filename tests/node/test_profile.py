"""node.profile: every number within the range that it is documented with, also when it is scaled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.profile import LAN, MEMBERLIST_LAN, MEMBERLIST_WAN, PLAIN_SWIM, WAN, Profile, scaled

PROFILES = {"lan": LAN, "wan": WAN, "memberlist": MEMBERLIST_LAN, "memberlist_wan": MEMBERLIST_WAN, "swim": PLAIN_SWIM}


def check(profile: Profile) -> None:
    assert 0 < profile.probe_timeout_s < profile.probe_period_s
    assert 0 < profile.nack_share <= 1
    assert 0 <= profile.helpers <= 8
    assert 1 <= profile.health_max <= 16
    assert 3 <= profile.suspicion_multiplier <= 10
    assert 1 <= profile.suspicion_max_multiplier <= 10
    assert 1 <= profile.retransmit_multiplier <= 8
    assert profile.gossip_period_s >= 0.05
    assert 0 <= profile.gossip_fanout <= 8
    assert profile.sync_gap_s <= profile.sync_first_s <= profile.sync_period_s
    assert profile.sync_period_s >= 1
    assert profile.dead_probe_period_s >= profile.probe_period_s
    assert profile.tombstones_max < profile.members_max
    assert profile.accusers_max >= profile.suspicion_multiplier - 1


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_within_its_ranges(name: str) -> None:
    check(PROFILES[name])
    assert PROFILES[name].pause_s <= PROFILES[name].probe_timeout_s


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("probe_period_s", [0.02, 0.1, 1.0, 5.0, 60.0])
def test_a_scaled_one_is_too_and_keeps_its_proportions(name: str, probe_period_s: float) -> None:
    profile = PROFILES[name]
    made = scaled(profile, probe_period_s)
    check(made)
    assert made.probe_period_s == probe_period_s
    for field in ("probe_timeout_s", "sync_gap_s", "sync_first_s", "dead_probe_period_s"):
        share = getattr(profile, field) / profile.probe_period_s
        assert getattr(made, field) / probe_period_s == pytest.approx(share)
    assert (made.tombstone_s, made.pause_s) == (profile.tombstone_s, profile.pause_s)


def test_the_same_period_changes_nothing() -> None:
    assert scaled(LAN, LAN.probe_period_s) == LAN
    assert scaled(WAN, WAN.probe_period_s) == WAN
    assert scaled(replace(LAN, dead_probe_period_s=0.0), 9.0).dead_probe_period_s == 0, "off stays off"
