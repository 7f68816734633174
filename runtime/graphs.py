"""The regimes that exist on GPUs only: `graph` (a captured chain) and `kernel` (profiler time)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .measure import Bench, Component, chained
from .types import Series

MARKER_CYCLES = 4_000_000  # about 2 ms at 2 GHz: long enough for the host to issue what follows
UNCOUNTED = 2  # first iterations of each component: a profiler just started, another kernel just before
MARKER_KERNEL = "spin_kernel"  # the kernel behind torch.cuda._sleep, on CUDA and HIP alike


class GraphRefused(Exception):
    """The library declared itself graph-safe and the capture failed. The message is the library's."""


def capture(bench: Bench, turn: Callable[[], Any], turns: int) -> tuple[Callable[[], None], Any]:
    """Capture `turns` turns into one graph. Returns (replay, result of the last captured turn).

    The capture runs on a side stream in thread-local error mode, because the communicator's watchdog thread
    queries events meanwhile.
    """
    import torch

    bench.beat("graph capture", 0)
    began = time.perf_counter()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            turn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    bench.ranks.barrier()
    graph = torch.cuda.CUDAGraph()
    result = None
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(turns):
                result = turn()
    except RuntimeError as error:
        raise GraphRefused(f"graph capture failed: {str(error).splitlines()[0]}") from error
    torch.cuda.synchronize()
    bench.spent("warmup_s", began)
    return graph.replay, result


def graph_period(bench: Bench, replay: Callable[[], None], turns: int, component: str) -> Series:
    """The period of a turn when a graph of `turns` turns is replayed back to back."""
    for _ in range(4):
        replay()
    bench.device.synchronize()
    return chained(bench, replay, component, regime="graph", turns_per_call=turns)


def kernel_times(bench: Bench, components: Sequence[Component]) -> tuple[list[Series], list[str]]:
    """Time the GPU is busy in each component, from the profiler, ranks aligned on the device.

    Each iteration is [prepare, marker, align, marker, component, marker, finish]; the markers are spin
    kernels. They cut the trace into windows; the first lets the host run ahead, before the ranks are
    aligned: a rank whose host is late then makes the others wait outside the window. A sample is the length
    of the union of a window's kernel intervals: kernels that overlap are not counted twice.
    One profiler run for all components: its start and its end take longer than what they measure.
    Returns the series and warnings (a profiler that lost activity gives none, and says so).
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    turns = bench.sampling.kernel_iterations + UNCOUNTED
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for component in components:
            bench.beat(f"kernel {component.name}", 0)
            for _ in range(turns):
                bench.device.synchronize()
                state = component.prepare()
                torch.cuda._sleep(MARKER_CYCLES)
                bench.align()
                torch.cuda._sleep(1)
                result = component.run(state)
                torch.cuda._sleep(1)
                component.finish(result)
        bench.device.synchronize()
    intervals = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    windows = busy_windows(intervals)
    complete = all(bench.ranks.all_gather(len(windows) == turns * len(components)))
    bench.spent("measured_s", began)
    if not complete:
        return [], ["the profiler lost activity; no kernel times"]
    parts = [windows[at * turns + UNCOUNTED : (at + 1) * turns] for at in range(len(components))]
    named = zip(components, parts, strict=True)
    return [Series(component.name, "kernel", "max", samples) for component, samples in named], []


def busy_windows(intervals: Sequence[tuple[str, float, float]]) -> list[float]:
    """Microseconds of GPU activity in each window of a trace.

    intervals   (kernel name, start, end) in microseconds, any order
    Markers come in threes: a window runs from the end of the second to the start of the third.
    """
    ordered = sorted(intervals, key=lambda item: item[1])
    markers = [(start, end) for name, start, end in ordered if MARKER_KERNEL in name]
    work = [(start, end) for name, start, end in ordered if MARKER_KERNEL not in name]
    windows = []
    at = 0
    for index in range(1, len(markers) - 1, 3):
        opens, closes = markers[index][1], markers[index + 1][0]
        busy, covered = 0.0, opens
        while at < len(work) and work[at][0] < opens:
            at += 1
        while at < len(work) and work[at][0] < closes:
            start, end = max(work[at][0], covered), work[at][1]
            if end > start:
                busy += end - start
                covered = end
            at += 1
        windows.append(busy)
    return windows
