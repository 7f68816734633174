"""Cutting a profiler trace into windows, on hand-made traces."""

from __future__ import annotations

from collectivex.runtime.graphs import busy_windows

SPIN = "void at::cuda::(anonymous namespace)::spin_kernel(long)"


def iteration(at, work):
    """Marker 10 us, align 5, marker 10, then `work` as (offset, length) from 30 us on, marker, finish."""
    spans = [(SPIN, at, at + 10), ("align", at + 10, at + 15), (SPIN, at + 15, at + 25)]
    spans += [("kernel", at + 30 + a, at + 30 + a + b) for a, b in work]
    return [*spans, (SPIN, at + 80, at + 81), ("finish", at + 82, at + 90)]


def test_a_window_holds_what_ran_between_the_second_marker_and_the_third():
    """Alignment before it and finishing after it are outside."""
    trace = iteration(0, [(0, 4), (6, 3)]) + iteration(100, [(0, 20)])

    assert [7.0, 20.0] == busy_windows(trace)


def test_kernels_that_overlap_are_counted_once():
    """Two streams, 0-10 and 5-12, keep the GPU busy for 12 us; a kernel inside another adds none."""
    assert [12.0] == busy_windows(iteration(0, [(0, 10), (5, 7), (6, 2)]))


def test_the_order_of_events_does_not_matter():
    """Profilers list activity by stream, not by time."""
    trace = iteration(0, [(0, 4)]) + iteration(100, [(3, 5)])

    assert busy_windows(trace) == busy_windows(trace[::-1])


def test_a_trace_that_lost_its_last_marker_gives_fewer_windows():
    """The caller sees that activity was lost instead of a wrong number."""
    whole = iteration(0, [(0, 4)]) + iteration(100, [(3, 5)])

    assert 1 == len(busy_windows(whole[:-2]))
