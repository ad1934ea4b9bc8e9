"""Formats a profile for a terminal of 110 columns."""

import textwrap
from collections.abc import Callable

from sparse_lm.cost.info import format_quantity, format_table
from sparse_lm.profile.measure import Profile, Row

COLUMNS = 110
NAMES = {"feed_forward": "feed-forward", "output": "output and loss", "rest": "all the rest"}
HEADER = (
    "one step",
    "ms",
    "share",
    "forward",
    "backward",
    "FLOPs",
    "FLOP/s",
    "of peak",
    "bytes",
    "roofline",
    "times it",
)


def profile_table(profile: Profile) -> str:
    """Formats the time, FLOPs, bytes and roofline of each part of a step, and the largest gap in words."""
    ms = choose_ms_format(profile)
    rows = [row for row in profile.rows if row.seconds or row.bytes]
    total = Row("all", profile.step, 0.0, sum(row.flops for row in rows), sum(row.bytes for row in rows))
    lines = [HEADER, *(_format_row(profile, row, profile.roofline(row)) for row in rows)]
    lines.append(("nothing runs", ms(profile.idle), _format_share(profile, profile.idle), *[""] * 8))
    lines.append(_format_row(profile, total, sum(profile.roofline(row) for row in rows)))
    head, *body, last = format_table(lines).splitlines()
    rule = "─" * max(map(len, (head, *body, last)))
    notes = (
        textwrap.fill(f"{name:10}{text}", COLUMNS, subsequent_indent=" " * 10)
        for name, text in _write_notes(profile).items()
    )
    return "\n".join((head, rule, *body, rule, last, "", *notes, "", textwrap.fill(largest_gap(profile), COLUMNS)))


def largest_gap(profile: Profile) -> str:
    """Describes the part that takes longest beyond its roofline."""
    ms = choose_ms_format(profile)
    row = max(profile.rows, key=lambda row: row.seconds - profile.roofline(row))
    allowed = profile.roofline(row)
    if profile.idle > row.seconds - allowed:
        return f"Largest gap: in {ms(profile.idle)} of a step's {ms(profile.step)} ms nothing runs."
    bound = "its matrix products" if allowed > row.bytes / profile.machine.bandwidth else "its reading and writing"
    return (
        f"Largest gap: {NAMES.get(row.part, row.part)} takes {ms(row.seconds)} ms, where {bound} at the machine's peak "
        f"would take {ms(allowed)} ms. So a step could be {(row.seconds - allowed) / profile.step:.0%} shorter."
    )


def choose_ms_format(profile: Profile) -> Callable[[float], str]:
    """Chooses a function that formats seconds as ms, with more decimals for a shorter step."""
    decimals = 1 + sum(profile.step < limit for limit in (0.02, 0.002))
    return lambda seconds: f"{seconds * 1e3:,.{decimals}f}"


def _format_row(profile: Profile, row: Row, allowed: float) -> tuple[str, ...]:
    ms = choose_ms_format(profile)
    speed = row.flops / row.seconds if row.seconds else 0.0
    peak = profile.machine.peak_flops(profile.dtype)
    return (
        NAMES.get(row.part, row.part),
        ms(row.seconds),
        _format_share(profile, row.seconds),
        *((ms(row.forward), ms(row.backward)) if row.part not in ("optimizer", "all") else ("", "")),
        *((_format_count(row.flops), _format_count(speed), f"{speed / peak:.0%}") if row.flops else ("", "", "")),
        format_quantity(row.bytes, "B"),
        ms(allowed),
        f"{row.seconds / allowed:.1f}" if allowed else "",
    )


def _write_notes(profile: Profile) -> dict[str, str]:
    ms, machine = choose_ms_format(profile), profile.machine
    more = f"{(profile.profiled - profile.step) * 1e3:+.1f} ms"
    return {
        "time": f"{ms(profile.step)} ms a step without the profiler, the median of {2 * profile.steps}. With it "
        f"{ms(profile.profiled)} ms ({more}), whose shares are applied to the former.",
        "FLOPs": "matrix products, as many as the program runs; of the optimizer all.",
        "bytes": "what each instruction reads and writes: an upper bound that leaves caches out, so that a part which "
        "they serve can be faster than its roofline.",
        "roofline": f"ms, the longer of FLOPs at {_format_count(machine.peak_flops(profile.dtype))}FLOP/s "
        f"({profile.dtype}) and bytes at {format_quantity(machine.bandwidth, 'B')}/s: {machine.name}, "
        f"{machine.source}.",
    } | ({"devices": f"all figures are of 1 device of {profile.devices}."} if profile.devices > 1 else {})


def _format_share(profile: Profile, seconds: float) -> str:
    return f"{seconds / profile.step:.1%}"


def _format_count(value: float) -> str:
    return format_quantity(value, "FLOP").removesuffix("FLOP")
