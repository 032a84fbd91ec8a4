"""What a batch is made of, whatever waits."""

from hypothesis import given
from hypothesis import strategies as st

from protos.ids import SessionId
from shard.batch import Chunk, Step, plan
from shard.worker import ROWS_MAX

Feeds = list[tuple[Step, int]]


@st.composite
def waiting(draw: st.DrawFn) -> Feeds:
    """Feeds that are somewhere on their way; some of them are single steps, some end before their feed does."""
    feeds = []
    for number in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, 50))
        length = draw(st.one_of(st.just(1), st.integers(1, 40)))
        step = Step(SessionId(str(number)), 0, start, start + length + draw(st.integers(0, 2)), tuple(range(length)))
        feeds.append((step, start + draw(st.integers(0, length - 1))))
    return feeds


def left(feed: tuple[Step, int]) -> int:
    step, at = feed
    return step.end - at


def rows(chunks: list[Chunk]) -> int:
    return sum(chunk.rows for chunk in chunks)


@given(waiting(), st.integers(1, 64))
def test_every_feed_of_one_row_goes_into_the_batch(feeds: Feeds, rows_max: int) -> None:
    chosen = {chunk.step.session for chunk in plan(feeds, rows_max)}
    assert {step.session for step, at in feeds if step.end - at == 1} <= chosen


@given(waiting(), st.integers(1, 64))
def test_a_batch_keeps_to_its_rows_but_for_the_answers_that_run_and_one_row_of_a_prompt(
    feeds: Feeds, rows_max: int
) -> None:
    singles = sum(1 for feed in feeds if left(feed) == 1)
    longer = len(feeds) - singles
    assert rows(plan(feeds, rows_max)) <= max(rows_max, singles + min(1, longer))


@given(waiting(), st.integers(1, 64))
def test_a_batch_is_full_while_rows_are_left(feeds: Feeds, rows_max: int) -> None:
    assert rows(plan(feeds, rows_max)) >= min(rows_max, sum(map(left, feeds)))


@given(waiting(), st.integers(1, 64))
def test_the_oldest_feed_always_advances(feeds: Feeds, rows_max: int) -> None:
    (oldest, _), *_ = feeds
    assert plan(feeds, rows_max)[0].step is oldest
    long = [step for step, at in feeds if step.end - at > 1]
    if long:
        assert long[0] in [chunk.step for chunk in plan(feeds, rows_max)]


@given(waiting(), st.integers(1, 64))
def test_prompts_share_what_is_left_evenly(feeds: Feeds, rows_max: int) -> None:
    """Max-min fair: who gets less than another, by more than the odd row, has all that it wants."""
    taken = {chunk.step.session: chunk.rows for chunk in plan(feeds, rows_max)}
    shares = [(taken.get(feed[0].session, 0), left(feed)) for feed in feeds if left(feed) > 1]
    most = max((got for got, _ in shares), default=0)
    assert all(got == wanted or got >= most - 1 for got, wanted in shares)


def test_a_short_prompt_behind_a_long_one_is_through_in_its_first_batch() -> None:
    long = Step(SessionId("long"), 0, 0, 20_000, tuple(range(20_000)))
    short = Step(SessionId("short"), 0, 0, 12, tuple(range(12)))
    assert [chunk.rows for chunk in plan([(long, 0), (short, 0)], ROWS_MAX)] == [ROWS_MAX - 12, 12]


@given(waiting(), st.integers(1, 64))
def test_chunks_follow_on_each_other_without_a_gap_until_all_feeds_are_through(feeds: Feeds, rows_max: int) -> None:
    at = {step.session: (step, position) for step, position in feeds}
    for _ in range(sum(map(left, feeds))):
        waiting_now = [(step, position) for step, position in at.values() if position < step.end]
        if not waiting_now:
            break
        chunks = plan(waiting_now, rows_max)
        assert len({chunk.step.session for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            assert chunk.start == at[chunk.step.session][1] < chunk.end <= chunk.step.end
            assert chunk.ends_step == (chunk.end == chunk.step.end)
            assert chunk.ends_feed == (chunk.end == chunk.step.until)
            at[chunk.step.session] = (chunk.step, chunk.end)
    assert all(position == step.end for step, position in at.values())


def test_a_prompt_beyond_the_rows_of_a_batch_leaves_room_for_each_running_answer() -> None:
    prompt = Step(SessionId("prompt"), 0, 0, 10 * ROWS_MAX, tuple(range(10 * ROWS_MAX)))
    answers = [Step(SessionId(str(n)), 0, 5, 6, (1,)) for n in range(7)]
    chunks = plan([(prompt, 0), *((step, 5) for step in answers)], ROWS_MAX)
    assert [chunk.rows for chunk in chunks] == [ROWS_MAX - 7] + [1] * 7


def test_more_running_answers_than_rows_leave_one_row_to_a_prompt() -> None:
    prompt = Step(SessionId("prompt"), 0, 0, 9, tuple(range(9)))
    answers = [Step(SessionId(str(n)), 0, 5, 6, (1,)) for n in range(7)]
    assert [chunk.rows for chunk in plan([(prompt, 0), *((step, 5) for step in answers)], 3)] == [1] * 8


def test_nothing_waits_nothing_runs() -> None:
    assert plan([], ROWS_MAX) == []
