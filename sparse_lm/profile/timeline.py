"""Attributes the time of a trace to instructions.

On a CPU several threads work at once. One takes an instruction and hands pieces of its work to others; the profiler
records each handover and each piece. A moment is divided equally among the busy threads, so that shares add up to wall
time, not to the sum over threads.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax


class Span(NamedTuple):
    """A thread works on an instruction, or on a piece of work that another thread has handed over. Times in ns."""

    thread: str
    start: float
    end: float
    instruction: str | None  # None for a piece
    piece: int | None = None


class Handover(NamedTuple):
    """A thread hands over a piece of its work. Time in ns."""

    thread: str
    time: float
    piece: int


def attribute_time(spans: Iterable[Span], handovers: Iterable[Handover] = ()) -> dict[str, float]:
    """Computes the ns of each instruction. The innermost of nested spans counts, and busy threads count equally.

    A piece counts as the instruction that it was handed over from; a piece that nobody handed over is no work.
    """
    marks = [(h.time, 1, 0.0, h) for h in handovers]
    for span in spans:
        if span.end > span.start:
            # At the same time ends come before starts, inner spans end before outer ones, and outer ones start before
            # inner ones.
            marks += [(span.end, 0, -span.start, span), (span.start, 2, -span.end, span)]
    marks.sort(key=lambda mark: mark[:3])
    stacks: dict[str, list[tuple[Span, str | None]]] = defaultdict(list)
    owners: dict[int, str | None] = {}
    running: dict[str, str] = {}  # the instruction of each busy thread
    spent: dict[str, float] = defaultdict(float)
    now = 0.0
    for time, kind, _, event in marks:
        for instruction in running.values():
            spent[instruction] += (time - now) / len(running)
        now = time
        stack = stacks[event.thread]
        if kind == 1:
            owners[event.piece] = running.get(event.thread)
            continue
        if kind == 2:
            stack.append((event, owners.get(event.piece) if event.instruction is None else event.instruction))
        else:
            stack[:] = [entry for entry in stack if entry[0] is not event]
        running.pop(event.thread, None)
        if stack and stack[-1][1] is not None:
            running[event.thread] = stack[-1][1]
    return dict(spent)


def read_trace(folder: str) -> list[dict[str, float]]:
    """Reads the ns of each instruction from the newest trace in a folder, per device; that of the host if no device
    has any."""
    newest = max(Path(folder).glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    devices = [attribute_time(_device_spans(plane)) for plane in planes if re.fullmatch(r"/device:\w+:\d+", plane.name)]
    host = [attribute_time(*_host_spans(plane)) for plane in planes if plane.name == "/host:CPU"]
    return [spent for spent in devices if spent] or host


def _device_spans(plane) -> list[Span]:
    """Reads the spans of a device. A TPU has one line of instructions; a GPU has a line per stream, and names the
    instructions in the statistics of its kernels."""
    lines = list(plane.lines)
    lines = [line for line in lines if line.name == "XLA Ops"] or lines
    spans = []
    for line in lines:
        for event in line.events:
            name = dict(event.stats).get("hlo_op") or (line.name == "XLA Ops" and _instruction_name(event.name))
            if name:
                spans.append(Span(line.name, event.start_ns, event.end_ns, name))
    return spans


def _instruction_name(text: str) -> str:
    return re.match(r"%?([\w.-]*)", text)[1]


def _host_spans(plane) -> tuple[list[Span], list[Handover]]:
    spans, handovers = [], []
    for line in plane.lines:
        started = None
        for event in sorted(line.events, key=lambda event: event.start_ns):
            kind = event.name.removeprefix("ThreadpoolListener::")
            if kind == "Record":
                handovers.append(Handover(line.name, event.start_ns, dict(event.stats)["_p"]))
            elif kind == "StartRegion":
                started = event.start_ns, dict(event.stats)["_c"]
            elif kind == "StopRegion" and started:
                spans.append(Span(line.name, started[0], event.start_ns, None, started[1]))
                started = None
            elif name := dict(event.stats).get("hlo_op"):
                spans.append(Span(line.name, event.start_ns, event.end_ns, name))
    return spans, handovers
