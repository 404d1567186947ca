"""Seconds by phase, on a clock that the test turns."""

from __future__ import annotations

import pytest

from kbop_core.phases import PHASES, Phases


class Bench:
    """A clock, and the times at which the device was waited for."""

    def __init__(self) -> None:
        self.now, self.settled = 100.0, list[float]()
        self.phases = Phases(lambda: self.now, lambda: self.settled.append(self.now))

    def work(self, seconds: float) -> None:
        self.now += seconds


def spent(bench: Bench) -> dict[str, float]:
    """Phases that took time."""
    return {name: seconds for name, seconds in bench.phases.take().items() if seconds}


def test_a_phase_has_the_time_of_its_blocks_and_none_of_what_lies_between() -> None:
    bench = Bench()
    for seconds in (1.0, 2.0):
        with bench.phases.phase("forward"):
            bench.work(seconds)
        bench.work(50.0)
    assert spent(bench) == {"forward": 3.0}


def test_a_phase_inside_another_is_not_counted_twice() -> None:
    bench = Bench()
    with bench.phases.phase("backward"):
        bench.work(1.0)
        with bench.phases.phase("communication"):
            bench.work(2.0)
        bench.work(4.0)
    assert spent(bench) == {"backward": 5.0, "communication": 2.0}


def test_a_phase_inside_itself_is_one() -> None:
    bench = Bench()
    with bench.phases.phase("flips"), bench.phases.phase("flips"):
        bench.work(3.0)
    assert spent(bench) == {"flips": 3.0}


def test_taking_starts_anew_and_tells_of_every_phase() -> None:
    bench = Bench()
    with bench.phases.phase("optimizer"):
        bench.work(1.0)
    assert bench.phases.take() == dict.fromkeys(PHASES, 0.0) | {"optimizer": 1.0}
    assert bench.phases.take() == dict.fromkeys(PHASES, 0.0)


def test_an_error_ends_its_phases_and_those_after_it_are_counted_right() -> None:
    bench = Bench()
    with pytest.raises(KeyError), bench.phases.phase("backward"), bench.phases.phase("communication"):
        bench.work(1.0)
        raise KeyError
    bench.work(50.0)
    with bench.phases.phase("flips"):
        bench.work(2.0)
    assert spent(bench) == {"communication": 1.0, "flips": 2.0}


def test_the_device_is_waited_for_at_both_ends_of_a_phase_and_around_phases_within() -> None:
    bench = Bench()
    with bench.phases.phase("flips"):
        bench.work(1.0)
        with bench.phases.phase("communication"):
            bench.work(1.0)
        bench.work(1.0)
    assert bench.settled == [100.0, 101.0, 102.0, 103.0]


def test_within_backward_the_device_is_never_waited_for() -> None:
    bench = Bench()
    with bench.phases.phase("backward"):
        for _ in range(2):
            bench.work(1.0)
            with bench.phases.phase("communication"):
                bench.work(1.0)
    assert bench.settled == [100.0, 104.0]


def test_without_a_clock_nothing_is_measured() -> None:
    phases = Phases()
    with phases.phase("forward"):
        pass
    assert phases.take() == dict.fromkeys(PHASES, 0.0)
