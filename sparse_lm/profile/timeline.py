"""Where the time of a trace goes: which instruction runs at each moment.

On a CPU several threads work at once. One takes an instruction and hands pieces of its work to others: the profiler
records each handing over and each piece. A moment belongs in equal shares to what the busy threads are doing then, so
that the shares add up to time as a clock shows it, not to the sum over threads.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax


class Span(NamedTuple):
    """Work on an instruction, or on a piece of work that another thread has handed over. Times in nanoseconds."""

    thread: str
    start: float
    end: float
    instruction: str | None
    piece: int | None = None


class Handover(NamedTuple):
    """A thread hands over a piece of the work that it is doing."""

    thread: str
    time: float
    piece: int


def attribute_time(spans: Iterable[Span], handed: Iterable[Handover] = ()) -> dict[str, float]:
    """Nanoseconds of each instruction. Of nested spans the innermost counts; of threads at once each counts equally.

    A piece counts as the instruction that it was handed over from; a piece from nowhere is no work.
    """
    marks = [(h.time, 1, 0.0, h) for h in handed]
    for span in spans:
        if span.end > span.start:
            # At one moment what ends goes before what begins, of spans that end together the inner one, of spans that
            # begin together the outer one.
            marks += [(span.end, 0, -span.start, span), (span.start, 2, -span.end, span)]
    marks.sort(key=lambda mark: mark[:3])
    stacks: dict[str, list[tuple[Span, str | None]]] = defaultdict(list)
    owners: dict[int, str | None] = {}
    doing: dict[str, str] = {}  # what the busy threads are doing
    spent: dict[str, float] = defaultdict(float)
    now = 0.0
    for time, kind, _, event in marks:
        for instruction in doing.values():
            spent[instruction] += (time - now) / len(doing)
        now = time
        stack = stacks[event.thread]
        if kind == 1:
            owners[event.piece] = doing.get(event.thread)
            continue
        if kind == 2:
            stack.append((event, owners.get(event.piece) if event.instruction is None else event.instruction))
        else:
            stack[:] = [entry for entry in stack if entry[0] is not event]
        doing.pop(event.thread, None)
        if stack and stack[-1][1] is not None:
            doing[event.thread] = stack[-1][1]
    return dict(spent)


def read_trace(folder: str) -> list[dict[str, float]]:
    """Nanoseconds of each instruction, for each device that the newest trace in a folder tells of; for the host where
    it computes itself."""
    newest = max(Path(folder).glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    devices = [attribute_time(_device_spans(plane)) for plane in planes if re.fullmatch(r"/device:\w+:\d+", plane.name)]
    host = [attribute_time(*_host_spans(plane)) for plane in planes if plane.name == "/host:CPU"]
    return [spent for spent in devices if spent] or host


def _device_spans(plane) -> list[Span]:
    """A TPU has a line of its instructions; a GPU a line for each stream, and names them in the kernels' statistics."""
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
    spans, handed = [], []
    for line in plane.lines:
        begun = None
        for event in sorted(line.events, key=lambda event: event.start_ns):
            kind = event.name.removeprefix("ThreadpoolListener::")
            if kind == "Record":
                handed.append(Handover(line.name, event.start_ns, dict(event.stats)["_p"]))
            elif kind == "StartRegion":
                begun = event.start_ns, dict(event.stats)["_c"]
            elif kind == "StopRegion" and begun:
                spans.append(Span(line.name, begun[0], event.start_ns, None, begun[1]))
                begun = None
            elif name := dict(event.stats).get("hlo_op"):
                spans.append(Span(line.name, event.start_ns, event.end_ns, name))
    return spans, handed
