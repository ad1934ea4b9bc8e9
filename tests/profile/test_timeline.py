"""Time of a hand-made trace, against sums done by hand."""

import random

import pytest

from sparse_lm.profile.timeline import Handover, Span, attribute_time


def test_of_nested_spans_the_inner_one_counts():
    spans = [Span("a", 0, 100, "while"), Span("a", 10, 30, "dot"), Span("a", 12, 20, "copy"), Span("a", 40, 60, "dot")]
    assert attribute_time(spans) == {"while": 60, "dot": 32, "copy": 8}


def test_spans_that_begin_or_end_together_nest():
    spans = [Span("a", 0, 10, "inner"), Span("a", 0, 20, "outer"), Span("a", 15, 20, "last"), Span("a", 20, 25, "next")]
    assert attribute_time(spans) == {"inner": 10, "outer": 5, "last": 5, "next": 5}


def test_threads_at_once_share_the_clock():
    spans = [Span("a", 0, 10, "dot"), Span("b", 5, 15, "copy"), Span("b", 20, 30, "dot")]
    assert attribute_time(spans) == {"dot": 5 + 2.5 + 10, "copy": 2.5 + 5}


def test_a_piece_counts_as_what_it_was_handed_over_from():
    spans = [
        Span("a", 0, 10, "dot"),
        Span("b", 2, 12, None, 7),
        Span("b", 4, 6, "copy"),  # b takes up an instruction of its own inside the piece
        Span("c", 10, 14, None, 8),  # handed on by b, while it worked at the piece
        Span("d", 0, 50, None, 99),  # nobody handed this over
    ]
    handed = [Handover("a", 1, 7), Handover("b", 7, 8)]
    assert attribute_time(spans, handed) == pytest.approx({"dot": 4 + 1 + 4 + 4, "copy": 1})


def test_idle_time_is_no_ones():
    assert attribute_time([Span("a", 0, 1, "dot"), Span("a", 100, 101, "dot"), Span("a", 50, 50, "empty")]) == {
        "dot": 2
    }


def test_shares_add_up_to_the_time_in_which_anything_runs():
    """Random nested spans on three threads, against a clock that ticks."""
    chance = random.Random(0)

    def nest(thread, start, stop, depth):
        while start < stop:
            end = chance.randint(start + 1, stop)
            if chance.random() < 0.6:
                spans.append(Span(thread, start, end, chance.choice("uvwxyz")))
                if depth:
                    nest(thread, start, end, depth - 1)
            start = end

    spans = []
    for thread in "abc":
        nest(thread, 0, 300, 3)
    expected = dict.fromkeys("uvwxyz", 0.0)
    for tick in range(300):
        now = {}
        for span in spans:  # outer ones were added before inner ones
            if span.start <= tick < span.end:
                now[span.thread] = span.instruction
        for instruction in now.values():
            expected[instruction] += 1 / len(now)
    assert attribute_time(spans) == pytest.approx(expected)
