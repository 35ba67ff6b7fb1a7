"""The chunk plan against its rule: hand-made trajectories, and random ones checked with a literal O(T^2) reading."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_cache import Span, plan_chunks, plan_frame_chunks, sampled_rows, travelled_distance
from support import Outcome, check_stamps, make_trajectory, no_hang, read_chunk, straight_line, write_config

# ---------------------------------------------------------------------------------------------------------------------
# The rule, read literally.
# ---------------------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A trajectory's travelled distance s (T,) [m] and the three limits [m]."""

    s: list[float]
    max_m: float
    overlap_m: float
    min_m: float

    def plan(self) -> list[Span]:
        with no_hang():
            return plan_chunks(np.array(self.s), self.max_m, self.overlap_m, self.min_m)

    def pieces(self) -> list[range]:
        """Frames between pose jumps, stored or not."""
        jumps = [i for i in range(1, len(self.s)) if self.s[i] - self.s[i - 1] > self.max_m]
        return [range(first, stop) for first, stop in pairwise([0, *jumps, len(self.s)])]

    def stored_pieces(self) -> list[range]:
        return [piece for piece in self.pieces() if self.s[piece[-1]] - self.s[piece[0]] >= self.min_m]

    def last_frame(self, piece: range, a: int) -> int:
        """Of the chunk that begins at frame a."""
        b = max(i for i in piece if i >= a and self.s[i] - self.s[a] <= self.max_m)
        return piece[-1] if self.s[piece[-1]] - self.s[b] < self.min_m else b

    def next_start(self, piece: range, a: int, b: int) -> int:
        """First frame of the chunk after the one from a to b."""
        overlapping = [i for i in piece if a < i <= b and self.s[b] - self.s[i] >= self.overlap_m]
        earliest = max(overlapping, default=b)
        return next(i for i in piece if i >= earliest and self.last_frame(piece, i) > b)

    def expected(self) -> list[Span]:
        spans = []
        for piece in self.stored_pieces():
            a = piece[0]
            while (b := self.last_frame(piece, a)) != piece[-1]:
                spans.append(Span(a, b + 1))
                a = self.next_start(piece, a, b)
            spans.append(Span(a, b + 1))
        return spans


def piece_of(problem: Problem, span: Span) -> range:
    return next(piece for piece in problem.pieces() if span.start in piece)


# Multiples of 1/8 make sums exact, so that ties with a limit are met; arbitrary floats bring rounding.
EXACT = st.integers(0, 24).map(lambda eighths: eighths / 8)
STEP = st.one_of(EXACT, st.just(0.0), st.floats(0, 3), st.sampled_from([0.1, 0.3, 0.7]), st.just(100.0))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    max_m = draw(st.one_of(EXACT.filter(bool), st.floats(0.05, 5), st.sampled_from([0.1, 0.3, 0.7])))
    overlap_m = draw(st.one_of(EXACT, st.floats(0, max_m)).filter(lambda overlap: overlap < max_m))
    min_m = draw(st.one_of(EXACT, st.floats(0, max_m), st.just(max_m)).filter(lambda least: least <= max_m))
    steps = draw(st.lists(st.one_of(STEP, st.just(max_m)), max_size=60))
    return Problem(np.concatenate([[0.0], np.cumsum(steps)]).tolist(), max_m, overlap_m, min_m)


# The same examples every time: a test of this suite must not fail by chance.
many_examples = settings(max_examples=300, deadline=None, derandomize=True, database=None)


@many_examples
@given(problems())
def test_plan_is_the_rule_read_literally(problem: Problem) -> None:
    assert problem.plan() == problem.expected()


@many_examples
@given(problems())
def test_chunks_cover_the_stored_pieces_and_nothing_else(problem: Problem) -> None:
    covered = {frame for span in problem.plan() for frame in range(*span)}
    assert covered == {frame for piece in problem.stored_pieces() for frame in piece}


@many_examples
@given(problems())
def test_chunks_are_in_order_and_none_lies_inside_another(problem: Problem) -> None:
    for before, span in pairwise(problem.plan()):
        assert before.start < span.start < span.stop
        assert before.stop < span.stop


@many_examples
@given(problems())
def test_only_the_last_chunk_of_a_piece_exceeds_the_maximum_and_by_less_than_the_minimum(problem: Problem) -> None:
    s = problem.s
    for span in problem.plan():
        length = s[span.stop - 1] - s[span.start]
        if span.stop == piece_of(problem, span).stop:
            assert length <= problem.max_m or length < problem.max_m + problem.min_m * (1 + 1e-9)
        else:
            assert length <= problem.max_m


@many_examples
@given(problems())
def test_chunks_never_cross_a_pose_jump_nor_share_a_frame_across_it(problem: Problem) -> None:
    plan = problem.plan()
    for span in plan:
        assert span.stop <= piece_of(problem, span).stop
    for before, span in pairwise(plan):
        assert (span.start < before.stop) == (piece_of(problem, before) == piece_of(problem, span))


@many_examples
@given(problems())
def test_overlap_falls_short_only_where_no_start_gives_it_and_progress(problem: Problem) -> None:
    s = problem.s
    for before, span in pairwise(problem.plan()):
        piece, b = piece_of(problem, before), before.stop - 1
        if span.start in piece and s[b] - s[span.start] < problem.overlap_m:
            for i in range(before.start + 1, span.start):
                assert s[b] - s[i] < problem.overlap_m or problem.last_frame(piece, i) <= b


# ---------------------------------------------------------------------------------------------------------------------
# By hand.
# ---------------------------------------------------------------------------------------------------------------------

ABOVE_1 = math.nextafter(1.0, 2.0)
BELOW_1 = math.nextafter(1.0, 0.0)
ABOVE_4 = math.nextafter(4.0, 5.0)
BELOW_4 = math.nextafter(4.0, 3.0)


BY_HAND = {  # name: travelled distance [m], (max, overlap, min) [m], spans
    "steps of 1 m": (range(11), (4, 1, 0), [(0, 5), (3, 8), (6, 11)]),
    "without overlap the border frame is shared": (range(11), (4, 0, 0), [(0, 5), (4, 9), (8, 11)]),
    "overlap one step below the maximum": (range(6), (3, 2, 0), [(0, 4), (1, 5), (2, 6)]),
    "exactly the maximum is one chunk": (range(5), (4, 1, 0), [(0, 5)]),
    "just above the maximum there are two": (range(5), (BELOW_4, 1, 0), [(0, 4), (2, 5)]),
    "a rest of exactly the minimum is a chunk": (range(6), (4, 1, 1), [(0, 5), (3, 6)]),
    "a rest just above the minimum is a chunk": (range(6), (4, 1, BELOW_1), [(0, 5), (3, 6)]),
    "a rest just below the minimum joins the last chunk": (range(6), (4, 1, ABOVE_1), [(0, 6)]),
    "an overlap exactly reached": ([0, 2, 3, 4, 5], (4, 1, 0), [(0, 4), (2, 5)]),
    "an overlap just reached": ([0, 2, 3, 4, 5], (4, BELOW_1, 0), [(0, 4), (2, 5)]),
    "an overlap just not reached takes the frame before": ([0, 2, 3, 4, 5], (4, ABOVE_1, 0), [(0, 4), (1, 5)]),
    "an overlap that no frame gives leaves the border frame": ([0, 3, 6], (4, 1, 0), [(0, 2), (1, 3)]),
    "a start that reaches no further moves on": ([0, 3, 4, 8], (4, 1, 0), [(0, 3), (2, 4)]),
    "a step of exactly the maximum is no jump": ([0, 4, 8], (4, 1, 0), [(0, 2), (1, 3)]),
    "a step just below the maximum is no jump": ([0, 4, 8], (ABOVE_4, 1, 0), [(0, 2), (1, 3)]),
    "a step just above the maximum is a jump": ([0, 4, 8], (BELOW_4, 1, 0), [(0, 1), (1, 2), (2, 3)]),
    "a jump cuts without overlap": ([0, 1, 2, 102, 103], (4, 1, 0.5), [(0, 3), (3, 5)]),
    "a piece of exactly the minimum is stored": ([0, 1, 101, 103], (4, 1, 1), [(0, 2), (2, 4)]),
    "a piece just above the minimum is stored": ([0, 1, 101, 103], (4, 1, BELOW_1), [(0, 2), (2, 4)]),
    "a piece just below the minimum is left out": ([0, 1, 101, 103], (4, 1, ABOVE_1), [(2, 4)]),
    "lone frames between jumps are left out": ([0, 100, 200, 201], (4, 1, 1), [(2, 4)]),
    "standing still is nothing": ([0, 0, 0], (4, 1, 0.1), []),
    "standing still is one chunk where the minimum is 0": ([0, 0, 0], (4, 1, 0), [(0, 3)]),
    "one frame is one chunk where the minimum is 0": ([0], (4, 1, 0), [(0, 1)]),
    "a stop at the border lies in the first chunk": ([0, 4, 4, 4, 8], (4, 0, 0), [(0, 4), (3, 5)]),
    "the last frame of a stop is the start": ([0, 3, 3, 3, 4, 7], (4, 1, 0), [(0, 5), (3, 6)]),
    "stops at both ends belong to the end chunks": ([0, 0, 4, 8, 8], (4, 1, 0.5), [(0, 3), (2, 5)]),
}


@pytest.mark.parametrize("example", BY_HAND)
def test_plan_by_hand(example: str) -> None:
    s, limits, spans = BY_HAND[example]
    assert Problem(list(s), *limits).plan() == spans


def test_a_huge_overlap_does_not_cost_a_look_at_every_pair_of_frames() -> None:
    """50,000 chunks of 50,001 frames: a plan that did would look at 2.5e9 pairs, for an hour."""
    plan = plan_chunks(np.arange(100_000.0), 50_000, 49_999, 0)
    assert plan == [(a, a + 50_001) for a in range(50_000)]


@pytest.mark.parametrize("step_m", [0.1, 0.3, 0.7, 1 / 3])
@pytest.mark.parametrize("steps_per_chunk", [1, 3, 10])
def test_rounding_neither_loses_a_frame_nor_stops_the_plan(step_m: float, steps_per_chunk: int) -> None:
    """Sums of 0.1 lie above and below the true distance, so steps and chunks of exactly the maximum fall both ways."""
    problem = Problem(travelled_distance(straight_line(500, step_m)).tolist(), steps_per_chunk * step_m, 0, 0)
    plan = problem.plan()
    assert plan == problem.expected()
    assert {frame for span in plan for frame in range(*span)} == set(range(500))


@pytest.mark.parametrize(
    ("position", "travelled"),
    [
        ([[0, 0], [3, 4], [3, 4], [3, 3]], [0, 5, 5, 6]),  # a 3-4-5 triangle, a stop, one metre back
        ([[7, 7]], [0]),
        ([[0, 0, 9], [0, 2, -9]], [0, 2]),  # height does not count
    ],
)
def test_travelled_distance_sums_the_steps_over_the_first_two_coordinates(
    position: list[list[float]], travelled: list[float]
) -> None:
    assert travelled_distance(np.array(position, dtype=float)).tolist() == travelled


# ---------------------------------------------------------------------------------------------------------------------
# In chunk files.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jumping_run(tmp_path: Path, run_here: Callable[..., Outcome]) -> tuple[Path, Outcome]:
    """A run over a trajectory of 6 moving frames, 2 that stand 100 m away and 5 moving ones 100 m further."""
    x = [0, 0.5, 1, 1.5, 2, 2.5, 102.5, 102.5, 202.5, 203, 203.5, 204, 204.5]
    position = np.stack([x, np.zeros(13)], axis=1)
    make_trajectory(tmp_path / "data" / "jumping", 13, stamp=3, position=position)
    outcome = run_here(write_config(tmp_path / "config.yaml", tmp_path / "data"))
    return tmp_path / "data" / "dino_cache_small", outcome


def test_chunk_files_follow_the_plan_across_pose_jumps(jumping_run: tuple[Path, Outcome]) -> None:
    cache_dir, outcome = jumping_run
    assert outcome.code == 0, outcome.err
    check_stamps(cache_dir, "jumping", 3)
    chunks = [read_chunk(path) for path in sorted((cache_dir / "jumping").iterdir())]
    # Chunks of 2 m with 0.5 m of overlap; the two frames that stand still are in none of them.
    assert [(attributes["start"], attributes["stop"]) for attributes, _ in chunks] == [(0, 5), (3, 6), (8, 13)]
    travelled = [datasets["travelled_distance"].tolist() for _, datasets in chunks]
    assert travelled == [[0, 0.5, 1, 1.5, 2], [1.5, 2, 2.5], [202.5, 203, 203.5, 204, 204.5]]


def test_a_piece_that_is_not_stored_is_reported(jumping_run: tuple[Path, Outcome]) -> None:
    _, outcome = jumping_run
    assert "jumping" in outcome.out + outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# By number of frames
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "most", "overlap", "expected"),
    [
        (10, 10, 3, [(0, 10)]), (11, 10, 3, [(0, 10), (7, 11)]), (17, 10, 3, [(0, 10), (7, 17)]),
        (18, 10, 3, [(0, 10), (7, 17), (14, 18)]), (1, 10, 3, [(0, 1)]), (3, 1, 0, [(0, 1), (1, 2), (2, 3)]),
        (2, 10, 9, [(0, 2)]), (12, 10, 9, [(0, 10), (1, 11), (2, 12)]),
    ],
)  # fmt: skip
def test_chunks_by_number_of_frames(count: int, most: int, overlap: int, expected: list[tuple[int, int]]) -> None:
    assert plan_frame_chunks(count, most, overlap) == expected


def test_no_chunk_crosses_a_break() -> None:
    assert plan_frame_chunks(12, 5, 2, [4, 5]) == [(0, 4), (4, 5), (5, 10), (8, 12)]
    travelled = np.arange(10.0)
    assert plan_chunks(travelled, 4.0, 1.0, 0.5, [6]) == [(0, 5), (3, 6), (6, 10)]
    assert plan_chunks(travelled, 4.0, 1.0, 0.5, [9]) == [(0, 5), (3, 8), (6, 9)]  # the last frame alone moves nowhere


@given(
    steps=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), min_size=1, max_size=30),
    breaks=st.sets(st.integers(1, 30)),
)
def test_pieces_between_breaks_are_cut_as_if_they_were_alone(steps: list[float], breaks: set[int]) -> None:
    travelled = np.cumsum([0.0, *steps])
    edges = [0, *sorted(at for at in breaks if at < len(travelled)), len(travelled)]
    alone = [
        Span(first + span.start, first + span.stop)
        for first, stop in pairwise(edges)
        for span in plan_chunks(travelled[first:stop], 2.0, 0.5, 0.3)
    ]
    assert plan_chunks(travelled, 2.0, 0.5, 0.3, edges[1:-1]) == alone


def test_frames_are_sampled_by_the_clock_and_not_by_what_was_kept_before() -> None:
    every = np.arange(31) / 30
    assert sampled_rows(every, 4).tolist() == [0, 8, 15, 23, 30]  # first at or after 0, 0.25, 0.5, 0.75 and 1 s
    assert sampled_rows(np.array([5.0, 5.9, 6.1, 8.5, 8.6]), 1).tolist() == [0, 2, 3]
    assert sampled_rows(np.arange(20) / 4 + 1.6e9, 4).tolist() == list(range(20))
