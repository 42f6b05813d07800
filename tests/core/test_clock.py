"""The step clock: by hand, from schedulers, and out of the way of everybody else's."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import mmattn
from mmattn.clock import SchedulerClock, StepClock
from mmattn.errors import ConfigError, ConflictError, DetachConflict


class Scheduler:
    """The two methods that a denoising loop calls."""

    def __init__(self):
        self.timesteps = []
        self.taken = 0

    def set_timesteps(self, num_inference_steps, sigmas=None):
        """Docs stay visible."""
        self.timesteps = list(range(num_inference_steps))[::-1]

    def step(self, output, timestep, sample):
        self.taken += 1
        return sample - output


class Late(Scheduler):
    """One that can begin in the middle of its schedule."""

    def set_begin_index(self, begin_index=0):
        self.begin = begin_index


def observed(scheduler):
    clock = StepClock()
    handle = SchedulerClock(scheduler, clock)
    handle.install()
    return clock, handle


def test_clock_by_hand():
    clock, heard = StepClock(), []
    clock.on_change.append(lambda new_run: heard.append((clock.index, clock.total, new_run)))
    assert clock.index is None and not clock.running
    clock.advance()  # nothing has started
    clock.set(0, 3)
    clock.set(1, 3)
    assert clock.running
    clock.set(0, 2)
    assert heard == [(0, 3, True), (1, 3, False), (0, 2, True)]


@pytest.mark.parametrize(("index", "total"), [(-1, 3), (3, 3), (0, 0), (5, 2)])
def test_clock_refuses_impossible_steps(index, total):
    with pytest.raises(ConfigError, match=f"got {index} of {total}"):
        StepClock().set(index, total)


def test_first_step_set_by_hand_starts_a_run():
    clock, heard = StepClock(), []
    clock.on_change.append(heard.append)
    clock.set(2, 4)
    assert heard == [True]


def test_scheduler_drives_the_clock():
    scheduler = Scheduler()
    clock, handle = observed(scheduler)
    for steps in (3, 5):
        scheduler.set_timesteps(steps)
        for i in range(steps):
            assert (clock.index, clock.total, clock.running) == (i, steps, True)
            assert scheduler.step(1, i, 10) == 9
        assert clock.index == steps and not clock.running
    assert scheduler.taken == 8
    handle.remove()
    assert type(scheduler) is Scheduler and sorted(vars(scheduler)) == ["taken", "timesteps"]
    scheduler.set_timesteps(2)
    assert clock.total == 5
    handle.remove()  # twice is fine


def test_class_looks_like_its_own():
    scheduler = Scheduler()
    _, handle = observed(scheduler)
    cls = type(scheduler)
    assert (cls.__name__, cls.__module__, cls.__doc__) == (
        Scheduler.__name__,
        Scheduler.__module__,
        Scheduler.__doc__,
    )
    assert cls.set_timesteps.__doc__ == "Docs stay visible."
    assert not hasattr(cls, "set_begin_index") and not hasattr(cls, "from_config")
    handle.remove()


def test_run_that_begins_late():
    scheduler = Late()
    clock, handle = observed(scheduler)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert scheduler.begin == 2 and (clock.index, clock.total) == (2, 4)
    scheduler.step(0, 0, 0)
    scheduler.step(0, 0, 0)
    assert not clock.running
    handle.remove()


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_do_not_advance_ours(clone):
    scheduler = Scheduler()
    clock, handle = observed(scheduler)
    scheduler.set_timesteps(3)
    twin = clone(scheduler)
    assert type(twin) is Scheduler and vars(twin) == {"timesteps": [2, 1, 0], "taken": 0}
    twin.step(0, 0, 0)
    assert clock.index == 0
    scheduler.step(0, 0, 0)
    assert clock.index == 1
    handle.remove()


def test_clock_itself_copies_blank():
    clock = StepClock()
    clock.set(1, 3)
    for twin in (copy.deepcopy(clock), pickle.loads(pickle.dumps(clock))):
        assert twin.index is None and twin.on_change == []


def test_instances_of_the_observing_class_are_inert():
    scheduler = Scheduler()
    clock, handle = observed(scheduler)
    other = type(scheduler)()
    other.set_timesteps(9)
    other.step(0, 0, 0)
    assert clock.index is None
    handle.remove()


def test_two_sessions_on_one_scheduler_conflict():
    scheduler = Scheduler()
    clock, handle = observed(scheduler)
    other = SchedulerClock(scheduler, StepClock())
    with pytest.raises(ConflictError, match="from_config"):
        other.raise_if_taken()
    with pytest.raises(ConflictError):
        other.install()
    other.remove()  # must not take the first one's clock away
    scheduler.set_timesteps(2)
    assert clock.total == 2
    handle.remove()
    assert type(scheduler) is Scheduler


def test_foreign_change_of_class_is_reported():
    scheduler = Scheduler()
    _, handle = observed(scheduler)
    ours = type(scheduler)
    scheduler.__class__ = Late
    with pytest.raises(DetachConflict, match="was changed"):
        handle.remove()
    scheduler.__class__ = ours
    handle.remove()
    assert type(scheduler) is Scheduler


class Attention(torch.nn.Module):
    """One head over ``[B, N, C]``."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_step_of_a_session_without_scheduler():
    layer = torch.nn.Sequential(Attention())
    with mmattn.attach(layer, "identity") as session:
        with pytest.raises(ConfigError, match="0 <= index < total"):
            session.step(4, 4)
        session.step(1, 4)
        assert session.clock.running and session.runs[0].timed
        layer(torch.randn(1, 3, 8))
        layer(torch.randn(1, 3, 8))
        assert session.runs[0].branch == 1
        session.step(2, 4)
        layer(torch.randn(1, 3, 8))
        assert session.runs[0].branch == 0
