"""The threads that execute what may block."""

import threading
import weakref

import pytest

from overlayfs_py.engines.native import workers as workers_module
from overlayfs_py.engines.native.workers import Workers


def test_tasks_run_side_by_side_in_as_many_threads_as_there_may_be() -> None:
    used: set[int] = set()
    together = threading.Barrier(3)

    def task() -> None:
        together.wait()
        used.add(threading.get_ident())
        together.wait()

    workers = Workers(3)
    for _ in range(6):
        workers.submit(task)
    workers.close()
    assert len(used) == 3
    assert not together.broken


def wait_for(event: threading.Event) -> None:
    event.wait()


def test_what_finds_all_threads_busy_is_done_later_and_in_order() -> None:
    workers = Workers(1)
    hold = threading.Event()
    done: list[int] = []
    workers.submit(wait_for, hold)
    for number in range(50):
        workers.submit(done.append, number)
    assert done == []
    hold.set()
    workers.close()
    assert done == list(range(50))


def test_a_thread_that_is_idle_is_used_again() -> None:
    workers = Workers(8)
    used: set[int] = set()
    for _ in range(20):
        ended = threading.Event()

        def task(ended: threading.Event = ended) -> None:
            used.add(threading.get_ident())
            ended.set()

        workers.submit(task)
        ended.wait()
        # Until it has said that it is idle.
        while not workers._idle:
            threading.Event().wait(0.001)
    workers.close()
    assert len(used) == 1


def test_where_no_more_threads_can_be_had_those_there_are_do_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    none = Workers(2)
    one = Workers(2)
    hold = threading.Event()
    done: list[int] = []
    one.submit(wait_for, hold)
    monkeypatch.setattr(workers_module, "start_new_thread", refuse)
    with pytest.raises(BlockingIOError):
        none.submit(done.append, 0)
    one.submit(done.append, 1)
    assert done == []
    hold.set()
    one.close()
    none.close()
    assert done == [1]


def test_a_task_that_raises_is_logged_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a mistake")

    workers = Workers(1)
    done: list[int] = []
    workers.submit(fail)
    workers.submit(done.append, 1)
    workers.close()
    assert done == [1]
    assert "ValueError: a mistake" in caplog.text


def test_what_is_not_to_wait_is_refused_where_no_thread_is_free() -> None:
    workers = Workers(1)
    begun, free, done = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        free.wait(30)

    assert workers.submit(hold)
    assert begun.wait(30)
    assert not workers.submit(done.set, or_not=True)
    # What waits for a thread all the same makes it no freer.
    assert workers.submit(done.set)
    free.set()
    assert done.wait(30)
    begun.clear()
    free.clear()
    while not workers.submit(hold, or_not=True):
        pass
    assert begun.wait(30)
    assert not workers.submit(done.set, or_not=True)
    free.set()
    workers.close()


def test_a_thread_without_work_keeps_nothing_of_what_it_had() -> None:
    class Held:
        pass

    workers = Workers(1)
    held = Held()
    kept = weakref.ref(held)
    workers.submit(lambda held: None, held)
    del held
    while not workers._idle:
        threading.Event().wait(0.001)
    assert kept() is None
    workers.close()
