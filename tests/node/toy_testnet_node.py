"""A child process that a testnet takes for a node: it listens as it is told to and sees alive whom its folder names.

The file `deed` beside its key says what a node of that number does instead: "2 exit 3" ends it, "2 deaf" sees nobody.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from toy_door import Script, ToyDoor

from node.identity import Identity
from protos import inference_pb2 as pb


def deed(key: Path) -> list[str]:
    said = key.with_name("deed")
    words = said.read_text().split() if said.exists() else ["0"]
    return words[1:] if key.stem == f"node-{words[0]}" else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--identity", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--attached", action="store_true")
    given, _ = parser.parse_known_args()
    print(f"node of {given.identity}", flush=True)
    match deed(given.identity):
        case ["exit", code]:
            print("error: nothing works here", file=sys.stderr, flush=True)
            sys.exit(int(code))
        case ["deaf"]:
            known = []
        case _:
            known = [Identity.load(key).peer for key in given.identity.parent.glob("*.key")]
    identity = Identity.load(given.identity)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    alive = [pb.PeerStatus(peer_id=peer, state="alive") for peer in known if peer != identity.peer]
    script = Script(peers=pb.PeersReply(peer_id=identity.peer, peers=alive))
    with ToyDoor(script, identity=identity, port=given.port):
        if given.attached:
            sys.stdin.read()
        else:
            ended.wait()


main()
