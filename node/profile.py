"""Profiles: every number that membership runs by, with its unit, its range and where it comes from.

Pure data.  Law: nodes with different profiles understand each other; a profile changes when a node speaks, never what
its words mean.

Sources: [SWIM] Das, Gupta, Motivala, DSN 2002; [Lifeguard] Dadgar, Phillips, Currey, arXiv 1707.00788; [memberlist]
hashicorp/memberlist, config.go, DefaultLANConfig and DefaultWANConfig.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Profile:
    """The defaults are those of a LAN.  Times are in seconds; multipliers and counts have no unit."""

    probe_period_s: float = 1.0
    """One member is probed in each.  Above probe_timeout_s, best twice it or more, so that helpers have time.
    [SWIM] protocol period T'; [memberlist] ProbeInterval."""

    probe_timeout_s: float = 0.5
    """The direct probe's, before helpers are asked.  Above the p99 of a round trip, below probe_period_s.
    [memberlist] ProbeTimeout."""

    helpers: int = 3
    """Peers that are asked to probe indirectly.  0 to 8.  [SWIM] k; [memberlist] IndirectChecks."""

    nacks: bool = True
    """A helper says so when its own ping was not answered; one that is silent counts against the asker's health.
    [Lifeguard] LHA-Probe.  Off: a failed probe counts one against it."""

    nack_share: float = 0.8
    """Of probe_timeout_s, after which a helper sends its Nack.  Above 0, at most 1; below 1, so that it comes before
    the asker's period ends.  [Lifeguard] section 4.1, 80 %."""

    health_max: int = 8
    """The local health score stays below it, and stretches period and timeout up to so many times.  1 (off) to 16.
    [Lifeguard] LHM, S = 8; [memberlist] AwarenessMaxMultiplier."""

    suspicion_stretch_max: float = 1.5
    """Local ill health stretches suspicions too, 1 + health times but no further than this: who is slow itself gives
    others more time.  1 (off) to health_max.  Ours: since each node concludes deaths for itself, unbounded stretching
    made the last of a hundred nodes learn of a crash 6 times later under loss; memberlist: off."""

    pause_s: float = 0.25
    """A timer that is handled later than this says that this process stood still, and all running timers are moved by
    the same time: what came in meanwhile has not been read yet.  Above the scheduler's delay, at most probe_timeout_s;
    0: off.  Ours."""

    suspicion_multiplier: int = 4
    """A suspicion lasts at least this * max(1, log10 n) * probe_period_s.  3 to 10; confirmations that count: this - 2.
    [Lifeguard] alpha; [memberlist] SuspicionMult."""

    suspicion_max_multiplier: int = 6
    """An unconfirmed one lasts this times longer.  1 (off: confirmations change nothing) to 10.
    [Lifeguard] beta; [memberlist] SuspicionMaxTimeoutMult."""

    buddy: bool = True
    """A ping to a suspect carries the suspicion, so that it can refute at once.  [Lifeguard] buddy system."""

    retransmit_multiplier: int = 4
    """An item rides on at most this * ceil(log10(n + 1)) messages of a node.  1 to 8.
    [SWIM] lambda log n; [memberlist] RetransmitMult."""

    gossip_period_s: float = 0.2
    """News that no probe takes along is sent so often, while there is some.  At least 0.05.
    [memberlist] GossipInterval."""

    gossip_fanout: int = 3
    """To so many peers.  0 (off: on probes alone, as in [SWIM]) to 8.  [memberlist] GossipNodes."""

    sync_period_s: float = 30.0
    """Between push-pulls, on average; times ceil(log2 n - 5) + 1 beyond 32 members.  At least 1.
    [memberlist] PushPullInterval, pushPullScale."""

    sync_gap_s: float = 1.0
    """Between two push-pulls at least, whatever asks for one; scaled like sync_period_s, and below it.  Ours."""

    record_gap_s: float = 10.0
    """Newer records of one member ask for push-pulls so far apart in the long run, two at once: nobody honest issues
    them more often.  Ours: otherwise one member that does has everybody sync without end."""

    renewals_counted_max: int = 4096
    """Members of which that is counted.  About 200 bytes each."""

    sync_first_s: float = 2.0
    """After the first peer is known, a push-pull comes at a random time within it.  Up to sync_period_s.  Ours: the
    seed that a node joined by may hide others."""

    dead_probe_period_s: float = 10.0
    """A peer that is thought dead is told so, one at random in each; a healed partition is found by this.  At least
    probe_period_s; 0: off.  Ours, after Serf's reconnects (30 s)."""

    tombstone_s: float = 3600.0
    """The dead and the left are remembered so long, so that late claims do not raise them.  Far above the life of an
    item in gossip (minutes).  Ours: a record's life is an hour or more."""

    members_max: int = 16_384
    """Members and tombstones, about 400 bytes each.  A stranger gets the place of the oldest tombstone; where there is
    none it is refused, and the known ones stay."""

    tombstones_max: int = 12_288
    """Of these, dead and left ones; beyond it the oldest are forgotten early."""

    items_max: int = 8
    """Items on one message; 1,200 bytes hold about as many.  1 to 8."""

    broadcasts_max: int = 512
    """Items that wait to be told; beyond it the one told most often goes, and a push-pull is wanted instead."""

    synced_broadcasts_max: int = 64
    """Of what one push-pull brings, so many are passed on: a newcomer learns of thousands that all others know."""

    relays_max: int = 256
    """Probes under way for others; beyond it a PingRequest is dropped, and the asker has other helpers."""

    doubted_max: int = 64
    """Members to be probed ahead of their turn, because calls to them failed; beyond it they wait for their turn."""

    greetings_max: int = 64
    """Pings to members that have not been heard at their address; of more, the oldest's answer is no round trip."""

    accuser_gap_s: float = 120.0
    """An accuser's word counts against this node's health once in so long, and that of health_max accusers at most; and
    a quarter of it is what one accuser's suspicions of one other member are apart in the long run.  Above the time in
    which an ailing node recovers, health_max * probe_period_s.  Ours: otherwise one liar keeps a node ill, or a member
    suspect, for ever."""

    accusations_max: int = 4
    """Suspicions of one member by one accuser that are taken at once, as when a link comes and goes.  Ours."""

    accusations_counted_max: int = 1024
    """Pairs of accuser and accused that are counted.  About 200 bytes each."""

    accusers_max: int = 8
    """Kept of one suspicion; at least suspicion_multiplier - 1, which is all that its timeout looks at."""

    verified_max: int = 4096
    """Items whose signatures are known to fit, so that none is verified twice.  About 300 bytes each."""


LAN: Final = Profile()
"""Nodes within a few milliseconds: memberlist's LAN numbers, all parts of Lifeguard, and ours."""

WAN: Final = replace(
    LAN,
    probe_period_s=5.0,
    probe_timeout_s=3.0,
    pause_s=1.0,
    suspicion_multiplier=6,
    gossip_period_s=0.5,
    gossip_fanout=4,
    sync_period_s=60.0,
    sync_gap_s=2.0,
    sync_first_s=5.0,
    dead_probe_period_s=30.0,
)
"""Nodes around the world: memberlist's WAN numbers, all parts of Lifeguard, and ours."""

MEMBERLIST_LAN: Final = replace(LAN, nack_share=1.0, suspicion_stretch_max=1.0, pause_s=0.0, dead_probe_period_s=30.0)
"""memberlist's published behaviour on a LAN, as far as a protocol that never gossips a death can have it."""

MEMBERLIST_WAN: Final = replace(WAN, nack_share=1.0, suspicion_stretch_max=1.0, pause_s=0.0, dead_probe_period_s=60.0)
"""The same on a WAN."""

PLAIN_SWIM: Final = replace(
    LAN,
    nacks=False,
    health_max=1,
    suspicion_stretch_max=1.0,
    pause_s=0.0,
    suspicion_max_multiplier=1,
    buddy=False,
)
"""SWIM with suspicion and nothing of Lifeguard: the comparison of its paper (alpha as in LAN, beta = 1)."""


def scaled(profile: Profile, probe_period_s: float) -> Profile:
    """The same with another probe period, and all that must keep its proportion to it.

    `pause_s` stays: it is about this machine, not about the network.
    """
    factor = probe_period_s / profile.probe_period_s
    sync_first_s = profile.sync_first_s * factor
    return replace(
        profile,
        probe_period_s=probe_period_s,
        probe_timeout_s=profile.probe_timeout_s * factor,
        gossip_period_s=max(profile.gossip_period_s * factor, 0.05),
        sync_period_s=max(profile.sync_period_s, sync_first_s),
        sync_gap_s=profile.sync_gap_s * factor,
        sync_first_s=sync_first_s,
        dead_probe_period_s=profile.dead_probe_period_s * factor,
    )
