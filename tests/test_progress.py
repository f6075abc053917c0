import io

import pytest

from jaxsem.progress import Progress, duration


class Clock:
    """A clock that each look moves on by a step."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(stream, count, total, clock, **options):
    with Progress(total, "photos", stream=stream, clock=clock, **options) as progress:
        for _ in range(count):
            progress.step()


def test_a_terminal_shows_count_rate_and_time_left_on_one_line():
    stream = Terminal()
    steps(stream, 5, 65, Clock(1.0))
    assert stream.getvalue().startswith("\r1 of 65 photos\r2 of 65 photos, 1.0 photos/s, 1 min 3 s left")
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith(" \r")


def test_a_log_gets_a_line_every_ten_seconds():
    stream = io.StringIO()
    steps(stream, 9, 100, Clock(3.0))
    assert stream.getvalue().splitlines() == ["4 of 100 photos, 3.0 s each, 4 min 48 s left",
                                              "8 of 100 photos, 3.0 s each, 4 min 36 s left"]  # fmt: skip


def test_the_first_step_does_not_spoil_the_rate():
    progress = Progress(10, "photos", stream=io.StringIO(), clock=iter([0.0, 60.0, 61.0, 62.0]).__next__)
    for _ in range(3):
        progress.step()
    assert progress.line(62.0) == "3 of 10 photos, 1.0 photos/s, 7 s left"


def test_quiet_shows_nothing():
    stream = Terminal()
    steps(stream, 5, 65, Clock(1.0), quiet=True)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (74, "1 min 14 s"), (7500, "2 h 5 min"), (-1, "0 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
