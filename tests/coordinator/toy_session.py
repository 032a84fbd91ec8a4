"""Sessions in each of their states, over a route of three nodes of which the first is the door."""

from coordinator.route import Route, StageRef
from coordinator.session import (
    Cancelled,
    DeadlinePassed,
    Effect,
    Epoch,
    Opened,
    Routed,
    Session,
    State,
    StepFailed,
    TokenArrived,
)
from protos.errors import PeerLost, ShoalError, UnitMissing
from protos.ids import PeerId
from protos.sampling import SamplingParams

DOOR, NEAR, FAR, OTHER = (PeerId(name) for name in ("door", "near", "far", "other"))
FIRST, SECOND, THIRD = (Epoch(counter, DOOR) for counter in (1, 2, 3))
STEP_DEADLINE_S = 10.0


def route(*peers: PeerId) -> Route:
    """Two layers for each."""
    return Route(tuple(StageRef(peer, 2 * n, 2 * n + 1, None) for n, peer in enumerate(peers)))


ROUTE = route(DOOR, NEAR, FAR)
DETOUR = route(DOOR, NEAR, OTHER)
LOST = {peer: PeerLost(f"{peer} cannot be reached") for peer in (DOOR, NEAR, FAR, OTHER)}
NO_ROUTE = UnitMissing("no live peer beside far, which failed holds trunk.4")


def planning(
    max_tokens: int = 8,
    *,
    recompute_at: int | None = None,
    context: int = 100,
    repair_wait_s: float = 30.0,
    reroutes_max: int = 8,
) -> Session:
    return Session(
        (1, 2, 3),
        SamplingParams(max_tokens=max_tokens, stop_tokens=(99,)),
        door=DOOR,
        context=context,
        recompute_at=recompute_at,
        step_deadline_s=STEP_DEADLINE_S,
        repair_wait_s=repair_wait_s,
        reroutes_max=reroutes_max,
    )


def opening(max_tokens: int = 8, **options: float) -> Session:
    session = planning(max_tokens, **options)
    session.handle(Routed(ROUTE), 0.0)
    return session


def feeding(max_tokens: int = 8, **options: float) -> Session:
    session = opening(max_tokens, **options)
    session.handle(Opened(FIRST, (0, 0, 0)), 0.0)
    return session


def replanning() -> Session:
    session = feeding()
    lose(session, FAR)
    return session


def waiting() -> Session:
    session = replanning()
    session.handle(StepFailed(session.epoch, NO_ROUTE), 0.0)
    return session


def done() -> Session:
    session = feeding()
    session.handle(Cancelled(), 0.0)
    return session


def failed() -> Session:
    session = feeding()
    session.handle(DeadlinePassed(), STEP_DEADLINE_S)
    return session


IN_STATE = {
    State.PLANNING: planning,
    State.OPENING: opening,
    State.FEEDING: feeding,
    State.WAITING: waiting,
    State.DONE: done,
    State.FAILED: failed,
}


def arrive(session: Session, token: int = 7, now: float = 0.0) -> list[Effect]:
    return session.handle(TokenArrived(session.epoch, len(session.log), token), now)


def fail(session: Session, error: ShoalError, peer: PeerId | None = None, now: float = 0.0) -> list[Effect]:
    """`peer` None: of a plan."""
    return session.handle(StepFailed(session.epoch, error, None, peer), now)


def lose(session: Session, peer: PeerId, now: float = 0.0) -> list[Effect]:
    return fail(session, LOST[peer], peer, now)


def reopen(session: Session, on: Route, held: tuple[int, ...], now: float = 0.0) -> list[Effect]:
    session.handle(Routed(on), now)
    return session.handle(Opened(session.epoch, held), now)
