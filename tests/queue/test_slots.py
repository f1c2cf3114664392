"""Who takes a place next: restarts, hangs, rolling restarts and stops, on a clock and with processes of the test."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import pytest

from embedq.worker.supervision import supervisor as supervisor_module
from embedq.worker.supervision.backoff import CRASH_LOOP_ENDS, CRASH_LOOP_S, FIRST_S, HEALTHY_S, LONGEST_S, Backoff
from embedq.worker.supervision.probe import NO_ANSWER, ChildHealth
from embedq.worker.supervision.slots import Ending, Slot, SlotRules, SlotState
from embedq.worker.supervision.supervisor import Supervisor
from embedq.worker.supervision.tenure import EXTRA_GRACE_S, KILL_HUNG_S, SECOND_SIGNAL_S, STARTING_SILENT_S

READY = ChildHealth(True, True, "ready")
STARTING = ChildHealth(True, False, "starting")
GRACE_S, HANG_S = 25.0, 30.0


@dataclass
class FakeProcess:
    """Ends when the test says so; of itself upon a signal where `obeys`."""

    pid: int
    obeys: bool
    port: int = 1
    status: int | None = None
    words: str = ""
    signals: list[int] = field(default_factory=list)
    latest: ChildHealth = NO_ANSWER
    is_closed: bool = False

    @property
    def name(self) -> str:
        return f"test.{self.pid}"

    def poll(self) -> int | None:
        return self.status

    def send(self, number: int) -> None:
        if self.status is not None:
            return
        self.signals.append(number)
        if number == signal.SIGKILL:
            self.status = -number
        elif self.obeys:
            self.status = 0 if self.latest.is_ready else 128 + number

    def health(self) -> ChildHealth:
        return self.latest

    def last_words(self) -> str:
        return self.words

    def close(self) -> None:
        self.is_closed = True


class World:
    """Slots on a clock of their own. Processes are numbered as they start; those of slot 0 and 1 from 100 and 200."""

    def __init__(self, num_slots: int = 1, *, start_first: bool = True, ends_by_itself: bool = False) -> None:
        self.now = 1000.0
        self.obeys = True
        self.launched: list[list[FakeProcess]] = [[] for _ in range(num_slots)]
        rules = SlotRules(GRACE_S, HANG_S, start_first, ends_by_itself)
        self.supervisor = Supervisor(
            [
                Slot(
                    index,
                    f"cuda:{index}",
                    lambda index=index: self._launch(index),
                    rules,
                    Backoff(lambda *_: 1.0),
                )
                for index in range(num_slots)
            ],
            clock=lambda: self.now,
        )
        self.launch_error: OSError | None = None
        self.supervisor.start(self.now)

    def _launch(self, index: int) -> FakeProcess:
        if self.launch_error is not None:
            raise self.launch_error
        process = FakeProcess(100 * (index + 1) + len(self.launched[index]), self.obeys)
        self.launched[index].append(process)
        return process

    def slot(self, index: int = 0) -> Slot:
        return self.supervisor.slots[index]

    def process(self, index: int = 0) -> FakeProcess:
        """The latest."""
        return self.launched[index][-1]

    def pass_s(self, seconds: float, step_s: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step_s)
            self.supervisor.tick(self.now)

    def say(self, health: ChildHealth, *indexes: int) -> None:
        for index in indexes or range(len(self.launched)):
            self.process(index).latest = health
        self.pass_s(0.3, step_s=0.1)

    def end(self, status: int, words: str = "", index: int = 0) -> None:
        self.process(index).status, self.process(index).words = status, words
        self.pass_s(0.3, step_s=0.1)

    def take(self, number: int) -> None:
        self.supervisor.take(number, self.now)
        self.pass_s(0.3, step_s=0.1)


# --- restarts


def test_a_process_that_was_killed_is_started_again_after_a_pause() -> None:
    world = World()
    world.say(READY)
    assert world.slot().state is SlotState.RUNNING
    world.end(-signal.SIGKILL)
    assert (world.slot().state, world.slot().process) == (SlotState.BACKING_OFF, None)
    assert world.launched[0][0].is_closed
    world.pass_s(FIRST_S + 0.1, step_s=0.1)
    assert world.slot().state is SlotState.STARTING
    assert world.process().pid == 101
    world.say(READY)
    assert world.slot().state is SlotState.RUNNING
    assert world.slot().restarts == {"exit": 1}


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_time_of_health() -> None:
    backoff = Backoff(lambda *_: 1.0)
    pauses = [backoff.pause_s(0, served_s=1.0) for _ in range(9)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 32, LONGEST_S, LONGEST_S]
    assert backoff.pause_s(0, served_s=HEALTHY_S) == FIRST_S


def test_pauses_are_spread_so_that_not_all_come_back_together() -> None:
    spread = {Backoff().pause_s(0, served_s=None) for _ in range(100)}
    assert len(spread) > 90
    assert all(pause is not None and 0.75 * FIRST_S <= pause <= 1.25 * FIRST_S for pause in spread)


def test_ends_before_it_was_ready_are_a_crash_loop_only_if_they_come_fast_and_in_a_row() -> None:
    backoff = Backoff()
    for _ in range(CRASH_LOOP_ENDS - 1):
        assert backoff.pause_s(0, served_s=None) is not None
    assert backoff.pause_s(CRASH_LOOP_S + 1, served_s=None) is not None
    assert backoff.pause_s(CRASH_LOOP_S + 1, served_s=0.1) is not None
    for _ in range(CRASH_LOOP_ENDS - 1):
        assert backoff.pause_s(CRASH_LOOP_S + 1, served_s=None) is not None
    assert backoff.pause_s(CRASH_LOOP_S + 1, served_s=None) is None


def test_a_crash_loop_is_given_up_and_its_last_words_are_the_end_of_all() -> None:
    world = World()
    for number in range(CRASH_LOOP_ENDS):
        world.end(1, f"error: reason {number}")
        world.pass_s(20)
    assert world.slot().state is SlotState.GIVEN_UP
    assert len(world.launched[0]) == CRASH_LOOP_ENDS
    assert world.supervisor.is_over
    assert world.supervisor.ending() == Ending(1, f"reason {CRASH_LOOP_ENDS - 1}")


def test_one_crash_loop_among_two_ends_nothing_else() -> None:
    world = World(2)
    world.say(READY, 1)
    for _ in range(CRASH_LOOP_ENDS):
        world.end(-signal.SIGSEGV)
        world.pass_s(20)
    assert [slot.state for slot in world.supervisor.slots] == [SlotState.GIVEN_UP, SlotState.RUNNING]
    assert not world.supervisor.is_over
    assert "SIGSEGV" in world.slot().describe()
    world.take(signal.SIGTERM)
    assert world.supervisor.is_over
    assert world.supervisor.ending() == Ending(0)


@pytest.mark.parametrize("status", [2, 5, 6])
def test_what_no_restart_can_change_is_not_tried_again(status: int) -> None:
    world = World(2)
    for index in range(2):
        world.end(status, "error: there is no such model", index)
    assert world.supervisor.is_over
    assert world.supervisor.ending() == Ending(status, "there is no such model")
    assert [len(launched) for launched in world.launched] == [1, 1]


def test_a_setting_that_has_worked_once_is_tried_again() -> None:
    world = World()
    world.say(READY)
    world.end(-signal.SIGKILL)
    world.pass_s(2)
    world.end(5, "error: Redis cannot be reached")
    assert world.slot().state is SlotState.BACKING_OFF
    world.pass_s(3)
    assert len(world.launched[0]) == 3


def test_a_system_that_starts_no_process_is_asked_again() -> None:
    world = World()
    world.say(READY)
    world.launch_error = BlockingIOError(11, "Resource temporarily unavailable")
    world.end(-signal.SIGKILL)
    world.pass_s(2)
    assert world.slot().state is SlotState.BACKING_OFF
    world.launch_error = None
    world.pass_s(4)
    assert world.slot().state is SlotState.STARTING
    world.launch_error = FileNotFoundError(2, "No such file or directory")
    for _ in range(CRASH_LOOP_ENDS):
        world.end(1)
        world.pass_s(60)
    assert world.slot().state is SlotState.GIVEN_UP


# --- an end of one's own


def test_all_done_is_the_end_with_0() -> None:
    world = World(2, ends_by_itself=True)
    world.say(READY)
    world.end(0, index=0)
    assert (world.slot(0).state, world.supervisor.is_over) == (SlotState.DONE, False)
    world.end(0, index=1)
    assert world.supervisor.is_over
    assert world.supervisor.ending() == Ending(0)


def test_done_does_not_hide_that_another_was_given_up() -> None:
    world = World(2, ends_by_itself=True)
    world.end(0, index=0)
    world.end(6, "error: no model", index=1)
    assert world.supervisor.ending() == Ending(6, "no model")


def test_without_an_end_of_its_own_a_process_that_somebody_ended_is_replaced() -> None:
    world = World()
    world.say(READY)
    world.end(0)
    world.pass_s(1)
    assert len(world.launched[0]) == 2


# --- hangs


def test_a_process_that_says_it_is_stuck_gets_two_signals_and_is_killed_and_replaced() -> None:
    world = World()
    world.obeys = False
    world.say(READY)
    stuck = world.process()
    stuck.obeys = False
    stuck.latest = ChildHealth(False, False, "jobs in hand have not moved for 181 s")
    world.pass_s(2)
    assert stuck.signals == []
    world.pass_s(2)
    assert stuck.signals == [signal.SIGTERM]
    world.pass_s(SECOND_SIGNAL_S)
    assert stuck.signals == [signal.SIGTERM, signal.SIGTERM]
    world.pass_s(KILL_HUNG_S)
    assert stuck.signals == [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
    world.pass_s(1)
    assert world.process() is not stuck
    assert world.slot().restarts == {"hung": 1}


def test_a_process_that_does_not_answer_is_replaced_after_its_time() -> None:
    world = World()
    world.say(READY)
    silent = world.process()
    silent.latest = ChildHealth(None, False, "no answer: timed out")
    world.pass_s(HANG_S - 1)
    assert silent.signals == []
    world.pass_s(2)
    assert silent.signals[0] == signal.SIGTERM


def test_an_answer_in_between_begins_the_count_anew() -> None:
    world = World()
    for _ in range(3):
        world.say(READY)
        world.say(ChildHealth(None, False, "no answer: timed out"))
        world.pass_s(HANG_S - 1)
    assert world.process().signals == []


def test_time_in_which_the_supervisor_itself_stood_still_does_not_count() -> None:
    world = World()
    world.say(READY)
    world.process().latest = ChildHealth(None, False, "no answer: timed out")
    world.now += 1000
    world.pass_s(1)
    assert world.process().signals == []


def test_a_process_that_loads_its_model_may_be_silent_for_longer() -> None:
    world = World()
    world.pass_s(STARTING_SILENT_S - 1)
    assert world.process().signals == []
    world.pass_s(2)
    assert world.process().signals[0] == signal.SIGTERM


def test_a_process_that_waits_for_redis_may_do_so_for_good() -> None:
    world = World()
    world.say(STARTING)
    world.pass_s(3600)
    assert (world.process().signals, len(world.launched[0])) == ([], 1)


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_ends_all_at_once_and_in_order(number: int) -> None:
    world = World(3)
    world.say(READY, 0, 1)
    world.take(number)
    assert [process.signals for (process,) in world.launched] == [[signal.SIGTERM]] * 3
    assert world.supervisor.is_over
    assert world.supervisor.ending() == Ending(0)


def test_what_outlasts_its_grace_is_killed_and_the_status_says_so() -> None:
    world = World()
    world.say(READY)
    world.process().obeys = False
    world.take(signal.SIGTERM)
    world.pass_s(GRACE_S + EXTRA_GRACE_S - 1)
    assert world.process().signals == [signal.SIGTERM]
    world.pass_s(2)
    assert world.process().signals == [signal.SIGTERM, signal.SIGKILL]
    assert world.supervisor.is_over
    assert world.supervisor.ending().status == 3


def test_the_same_signal_twice_within_a_moment_is_one_and_later_it_means_at_once() -> None:
    world = World()
    world.say(READY)
    world.process().obeys = False
    world.take(signal.SIGINT)
    world.take(signal.SIGINT)
    assert world.process().signals == [signal.SIGTERM]
    world.pass_s(2)
    world.take(signal.SIGINT)
    assert world.process().signals == [signal.SIGTERM] * 2
    world.pass_s(4)
    assert world.process().signals[-1] == signal.SIGKILL
    assert world.supervisor.ending().status == 130


def test_a_pause_is_over_with_the_signal() -> None:
    world = World()
    world.say(READY)
    world.end(-signal.SIGKILL)
    world.take(signal.SIGTERM)
    assert world.supervisor.is_over
    assert len(world.launched[0]) == 1


def test_a_process_that_ends_badly_on_the_way_out_is_not_replaced() -> None:
    world = World(2)
    world.say(READY)
    for index in range(2):
        world.process(index).obeys = False
    world.take(signal.SIGTERM)
    world.end(7, index=0)
    world.end(0, index=1)
    assert world.supervisor.is_over
    assert world.supervisor.ending().status == 7


# --- the rolling restart


def started(world: World) -> list[int]:
    return [len(launched) for launched in world.launched]


def test_sighup_replaces_one_after_the_other_the_new_one_first() -> None:
    world = World(2)
    world.say(READY)
    world.take(signal.SIGHUP)
    old, new = world.launched[0]
    assert (started(world), old.signals) == ([2, 1], [])
    assert world.slot().is_ready
    old.obeys = False
    new.latest = READY
    world.pass_s(1)
    assert (started(world), old.signals) == ([2, 1], [signal.SIGTERM])
    old.status = 0
    world.pass_s(1)
    assert started(world) == [2, 2]
    world.process(1).latest = READY
    world.pass_s(1)
    assert world.launched[1][0].status == 0
    assert [slot.state for slot in world.supervisor.slots] == [SlotState.RUNNING] * 2
    assert [slot.restarts.total() for slot in world.supervisor.slots] == [0, 0]


def test_where_memory_holds_only_one_the_old_one_ends_first() -> None:
    world = World(2, start_first=False)
    world.say(READY)
    world.take(signal.SIGHUP)
    assert (started(world), world.launched[0][0].status) == ([2, 1], 0)
    world.pass_s(5)
    assert started(world) == [2, 1]
    world.say(READY, 0)
    world.pass_s(1)
    assert started(world) == [2, 2]


@pytest.mark.parametrize("start_first", [True, False])
def test_a_replacement_that_does_not_come_up_ends_the_rolling_restart(start_first: bool) -> None:
    world = World(2, start_first=start_first)
    world.say(READY)
    world.take(signal.SIGHUP)
    world.end(1, "error: a broken upgrade")
    world.pass_s(0.1)
    assert world.slot().roll_error is not None
    assert "a broken upgrade" in world.slot().roll_error
    assert started(world)[1] == 1
    assert world.slot().is_ready == start_first
    assert world.slot(1).is_ready


def test_a_process_that_dies_while_its_replacement_starts_leaves_it_the_place() -> None:
    world = World()
    world.say(READY)
    world.take(signal.SIGHUP)
    world.launched[0][0].status = -signal.SIGKILL
    world.pass_s(1)
    assert (started(world), world.slot().state) == ([2], SlotState.STARTING)
    world.say(READY)
    assert (world.slot().state, world.slot().is_rolling) == (SlotState.RUNNING, False)


def test_sighup_gives_what_was_given_up_another_chance() -> None:
    world = World(2)
    world.say(READY, 1)
    world.end(6, "error: no model")
    assert world.slot().state is SlotState.GIVEN_UP
    world.take(signal.SIGHUP)
    world.say(READY, 0)
    world.say(READY)
    assert world.slot().state is SlotState.RUNNING


def test_sigterm_during_a_rolling_restart_ends_the_old_and_the_new() -> None:
    world = World(2)
    world.say(READY)
    world.take(signal.SIGHUP)
    for process in world.launched[0]:
        process.obeys = False
    world.take(signal.SIGTERM)
    assert [process.signals for process in world.launched[0]] == [[signal.SIGTERM]] * 2
    world.launched[0][0].status = 0
    world.pass_s(1)
    assert not world.supervisor.is_over
    world.launched[0][1].status = 143
    world.pass_s(1)
    assert world.supervisor.is_over
    assert started(world) == [2, 1]
    assert world.supervisor.ending() == Ending(0)


# --- the loop


def test_an_error_of_our_own_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def fail() -> None:
        raise RuntimeError("from within")

    monkeypatch.setattr(world.supervisor, "_on_tick", fail)
    with pytest.raises(RuntimeError, match="from within"):
        world.supervisor.run()
    assert all(process.signals[-1] == signal.SIGKILL for process in world.launched[0])


def test_the_end_of_the_terminal_is_an_order_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.say(READY)
    answers = iter([True])
    monkeypatch.setattr(supervisor_module, "has_terminal", lambda: next(answers, False))
    monkeypatch.setattr(supervisor_module.SignalInbox, "wait", lambda _self, _timeout_s: [signal.SIGHUP])
    assert world.supervisor.run() == Ending(0)
    assert world.launched[0][0].signals[0] == signal.SIGTERM


def test_sighup_before_anything_is_ready_still_goes_one_by_one_and_loses_no_process() -> None:
    world = World(2)
    world.say(STARTING)
    world.supervisor.take(signal.SIGHUP, world.now)
    world.pass_s(1)
    assert started(world) == [2, 1]
    # The old one of the first slot becomes ready while its replacement still starts.
    world.launched[0][0].latest = READY
    world.pass_s(1)
    assert started(world) == [2, 1]
    world.supervisor.take(signal.SIGHUP, world.now)
    world.pass_s(1)
    world.supervisor.take(signal.SIGTERM, world.now)
    world.pass_s(GRACE_S + EXTRA_GRACE_S + 1)
    assert world.supervisor.is_over
    assert [process.status for of_slot in world.launched for process in of_slot if process.status is None] == []


def test_a_rolling_restart_that_waits_says_for_what(caplog: pytest.LogCaptureFixture) -> None:
    world = World(1)
    world.say(READY)
    world.supervisor.take(signal.SIGHUP, world.now)
    world.pass_s(1)
    world.process().latest = ChildHealth(True, False, "suspended")
    with caplog.at_level("WARNING", "embedq.supervisor"):
        world.pass_s(supervisor_module.SLOW_ROLL_S + 2)
    assert "still waits for process 0: suspended" in caplog.text
