"""Time and memory of the routing table at ten thousand records: merge, holders of a unit, snapshot, push-pull.

python -m bench.routing_table [--records 10000] [--rounds 5]

How to read it.  Records are signed with real Ed25519 keys and come as bytes, as they do from other nodes.  A "span"
record holds four of 58 layers with all their 256 experts; a "scattered" one a random half of all 14,848 experts, the
longest there is to say of this model.  Each column has a process of its own; its memory is what it grew by (RSS) while
it merged, with the signed bytes that it passes on.  Times are the thread's CPU time, so that what else runs on the
machine does not count (but of the file with marks); medians of the rounds, of a merge the median over all records.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import cryptography
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.rounds import table
from node import marks_file
from node.identity import Identity
from node.reconcile import follow_up, reply, request
from node.record import Held, Record, opened, sign
from node.routing_table import RoutingTable
from protos.limits import NEWCOMERS_OF_SENDER_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = 1_800_000_000.0
MODEL = "ab" * 32
LAYERS, EXPERTS, SPAN = 58, 256, 4
HEAD = ("", "span", "scattered")


def main() -> None:
    arguments = _arguments()
    columns = []
    for kind in HEAD[
        1:
    ]:  # one after the other, each in a fresh process, or the second would use the first one's memory
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            columns.append(process.submit(_measure, kind, arguments.records, arguments.rounds).result())
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    print(table((f"at {arguments.records:,} records", *HEAD[1:]), rows))
    print(f"\nOne process, one thread. {_conditions()}.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _measure(kind: str, count: int, rounds: int) -> dict[str, str]:
    random = Random(7)
    people = [Identity(Ed25519PrivateKey.from_private_bytes(random.randbytes(32))) for _ in range(count)]
    signed = [_signed(one, kind, random) for one in people]
    gc.collect()
    before = psutil.Process().memory_info().rss
    known = RoutingTable()
    merges = _filled(known, signed)
    grown = psutil.Process().memory_info().rss - before
    changed = [_signed(one, kind, random, sequence=2) for one in people[:rounds]]
    return {
        "a record": f"{statistics.mean(map(len, signed)):.0f} bytes",
        "merge of a new one (check, verify, index)": _us(statistics.median(merges)),
        "merge of all": f"{sum(merges):.2f} s",
        "merge of one that is known": _us(_median(lambda: known.merge(signed[0], NOW), 20 * rounds)),
        "memory": f"{grown / 2**20:.0f} MiB, {grown / count / 1024:.1f} KiB each",
        **_lookups(known, changed, rounds),
        **_snapshots(known, people, kind, random, rounds),
        **_push_pulls(known, signed, people, kind, random, rounds),
        **_marks(known, rounds),
    }


def _signed(identity: Identity, kind: str, random: Random, sequence: int = 1) -> bytes:
    now_ms = int(NOW * 1000)
    first = random.randrange(LAYERS - SPAN)
    span = range(first, first + SPAN) if kind == "span" else range(LAYERS)
    full = (1 << EXPERTS) - 1
    experts = {layer: full if kind == "span" else random.getrandbits(EXPERTS) for layer in span}
    held = Held(MODEL, True, span, span.start == 0, span.stop == LAYERS, experts)
    address = f"10.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(256)}:7645"
    made = Record(
        identity.public_key, (address,), random.randbytes(32), sequence, now_ms, now_ms + 3_600_000, held=(held,),
        zone=f"zone-{random.randrange(40)}", owner="somebody", version="0.1.0", sessions_max=8, kv_bytes_max=1 << 34,
    )  # fmt: skip
    return sign(made, identity)


def _filled(known: RoutingTable, signed: list[bytes]) -> list[float]:
    """Seconds for each.  As many senders as the limit for newcomers asks for."""
    took = []
    for n, data in enumerate(signed):
        began = time.thread_time()
        known.merge(data, NOW, f"10.0.0.{n // NEWCOMERS_OF_SENDER_MAX}")
        took.append(time.thread_time() - began)
    return took


def _lookups(known: RoutingTable, changed: list[bytes], rounds: int) -> dict[str, str]:
    firsts = [_once(lambda n=n: known.holders(MODEL, f"expert.{n}.0")) for n in range(20, 20 + rounds)]
    others = [_once(lambda e=e: known.holders(MODEL, f"expert.20.{e}")) for e in range(1, 21)]
    after = []
    for data in changed:
        known.merge(data, NOW)
        after.append(_once(lambda: known.holders(MODEL, "expert.20.0")))
    again = _median(lambda: known.holders(MODEL, "expert.20.0"), 20)
    return {
        "holders of a unit": f"{len(known.holders(MODEL, 'expert.20.0')):,}",
        "found: first question about a layer": _us(statistics.median(firsts)),
        "found: another expert of it": _us(statistics.median(others)),
        "found: after a record changed": _us(statistics.median(after)),
        "found: again": _us(again),
    }


def _snapshots(known: RoutingTable, people: list[Identity], kind: str, random: Random, rounds: int) -> dict[str, str]:
    changed = [_signed(one, kind, random, sequence=3) for one in people[:rounds]]
    shared = []
    for n, data in enumerate(changed):
        envelope = opened(data)
        assert envelope.peer == people[n].peer
        known.records()
        known.held(MODEL)
        shared.append(_once(lambda data=data: known.merge(data, NOW)))
    again = [_signed(one, kind, random, sequence=4) for one in people[:rounds]]
    plain = [_once(lambda data=data: known.merge(data, NOW)) for data in again]
    return {
        "snapshot of all records": _us(_median(known.records, 20 * rounds)),
        "what it costs the next change": _us(max(statistics.median(shared) - statistics.median(plain), 0.0)),
    }


def _push_pulls(
    known: RoutingTable, signed: list[bytes], people: list[Identity], kind: str, random: Random, rounds: int
) -> dict[str, str]:
    other = RoutingTable()
    _filled(other, [known.signed_of(one.peer) or b"" for one in people])
    equal = [_sync(known, other, n) for n in range(rounds + 1)][1:]  # the first one computes all digests
    found = {"push-pull, equal tables": _exchange(equal)}
    for differing in (1, 100):
        took = []
        for n in range(rounds):
            for one in random.sample(people, differing):
                newer = _signed(one, kind, random, sequence=100 + n + differing * 100)
                (known if n % 2 else other).merge(newer, NOW)
            took.append(_sync(known, other, n))
        assert known.digest.digests(1) == other.digest.digests(1)
        found[f"push-pull, {differing} changed"] = _exchange(took)
    return found


def _sync(asker: RoutingTable, answerer: RoutingTable, seed: int) -> tuple[float, int]:
    """Seconds of both sides together, and bytes of all messages."""
    random = Random(seed)
    began = time.thread_time()
    first = request(asker)
    answer = reply(answerer, first, random)
    size = first.ByteSize() + answer.ByteSize()
    for data in answer.records:
        asker.merge(data, NOW)
    second = follow_up(asker, first, answer, random)
    if second is not None:
        for data in second.records:
            answerer.merge(data, NOW)
        last = reply(answerer, second, random)
        size += second.ByteSize() + last.ByteSize()
        for data in last.records:
            asker.merge(data, NOW)
    return time.thread_time() - began, size


def _marks(known: RoutingTable, rounds: int) -> dict[str, str]:
    for peer in known.records():
        known.reached(peer, NOW)
    marks = known.marks()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "marks"
        saving = _median(lambda: marks_file.save(path, marks), rounds, time.perf_counter)
        loading = _median(lambda: marks_file.load(path), rounds, time.perf_counter)
        size = path.stat().st_size
    return {"marks: write, read": f"{saving * 1e3:.0f} and {loading * 1e3:.0f} ms, {size / 1024:.0f} KiB"}


def _exchange(took: list[tuple[float, int]]) -> str:
    return f"{statistics.median(s for s, _ in took) * 1e3:.1f} ms, {statistics.median(b for _, b in took):,.0f} bytes"


def _once(work: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    began = clock()
    work()
    return clock() - began


def _median(work: Callable[[], object], times: int, clock: Callable[[], float] = time.thread_time) -> float:
    return statistics.median(_once(work, clock) for _ in range(times))


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-4 else f"{seconds * 1e6:,.0f} us"


def _conditions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}; Python {platform.python_version()}, cryptography {cryptography.__version__}"


if __name__ == "__main__":
    main()
