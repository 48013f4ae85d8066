"""Work side by side: one task for a key at a time, failures contained, an end that comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from dicomnode import logs
from dicomnode.deliver.crew import Crew
from dicomnode.errors import PeerAway
from tests.peers import wait_for


class Gate:
    """A task that runs until it is let go."""

    def __init__(self, worked: bool = True) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self.worked = worked
        self.runs = 0

    def __call__(self) -> bool:
        self.runs += 1
        self.began.set()
        assert self.go.wait(20)
        return self.worked


@pytest.fixture
def crew() -> Iterator[Callable[..., Crew]]:
    made: list[Crew] = []

    def make(*arguments: object) -> Crew:
        made.append(Crew(*arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make
    assert all(c.close(10) for c in made)


def test_one_that_stands_still_holds_up_no_other(crew: Callable[..., Crew]) -> None:
    many, slow, quick = crew(2), Gate(), Gate()
    assert many.take("slow", slow) and slow.began.wait(10)
    assert many.take("quick", quick) and quick.began.wait(10)
    assert not many.take("slow", slow), "one at a time for each key"
    assert not many.take("third", quick), "as many as may"
    quick.go.set()
    wait_for(lambda: many.take("third", quick), 10, "a place is free")
    slow.go.set()
    wait_for(lambda: many.take("slow", slow), 10, "its key is free")
    assert slow.runs == 1 or slow.began.is_set()


def test_a_failure_ends_nothing_but_its_task(crew: Callable[..., Crew], capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("test", "debug", "json")
    rung = threading.Event()
    one, after = crew(1, rung.set), Gate()
    after.go.set()
    errors: list[Exception] = [ValueError("Xylocanary"), PeerAway("C-STORE", "peer 'x' is away")]

    def failing() -> bool:
        raise errors.pop()

    for _ in range(2):
        wait_for(lambda: one.take("key", failing), 10, "the thread lives")
    wait_for(lambda: not errors, 10, "both have run")
    assert not rung.is_set(), "who failed is not looked after at once"
    wait_for(lambda: one.take("key", after), 10, "the thread lives")
    assert after.began.wait(10) and rung.wait(10)
    text = capsys.readouterr().err
    assert "peer 'x' is away" in text and "ValueError" in text and "Xylocanary" not in text


def test_only_work_asks_for_another_look(crew: Callable[..., Crew]) -> None:
    rung: list[str] = []
    one, idle, busy = crew(1, lambda: rung.append("")), Gate(worked=False), Gate()
    idle.go.set()
    busy.go.set()
    one.take("key", idle)
    wait_for(lambda: one.take("key", busy), 10, "the first is done")
    wait_for(lambda: rung, 10, "rung")
    assert idle.runs == 1 and len(rung) == 1


def test_close_waits_and_says_when_it_was_in_vain() -> None:
    crew, gate = Crew(3), Gate()
    crew.take("key", gate)
    assert gate.began.wait(10) and not crew.close(0.05)
    assert crew.stopping.is_set() and not crew.take("other", gate)
    gate.go.set()
    assert crew.close(10)


def test_threads_are_kept_and_no_more_than_needed(crew: Callable[..., Crew]) -> None:
    names: set[str] = set()
    three, done = crew(3), threading.Semaphore(0)

    def task() -> bool:
        names.add(threading.current_thread().name)
        done.release()
        return True

    for number in range(60):
        wait_for(lambda n=number: three.take(f"key {n % 5}", task), 10, "taken")  # type: ignore[misc]
    for _ in range(60):
        assert done.acquire(timeout=10)
    assert len(names) <= 3


def test_in_the_callers_thread() -> None:
    ran: list[str] = []

    def task() -> bool:
        ran.append(threading.current_thread().name)
        return True

    assert Crew(0).take("key", task) and ran == [threading.current_thread().name]
    with pytest.raises(ZeroDivisionError):
        Crew(0).take("key", lambda: bool(1 // 0))
