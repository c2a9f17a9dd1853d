"""The threads that execute what may block."""

import contextlib
import os
import threading
import time
import weakref

import pytest

from overlayfs_py.engines.native import workers as workers_module
from overlayfs_py.engines.native.workers import Workers
from tests.support.waiting import wait_until


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


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


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


def test_what_comes_after_the_end_is_refused_and_all_before_it_is_done() -> None:
    workers = Workers(4)
    begun, free = threading.Event(), threading.Event()
    done: list[int] = []

    def hold() -> None:
        begun.set()
        free.wait(30)

    workers.submit(hold)
    assert begun.wait(30)
    closing = threading.Thread(target=workers.close, daemon=True)
    closing.start()
    refused = 0
    # Some come before the end begins, with threads of their own; then none is to be had any more.
    for number in range(10_000):
        try:
            workers.submit(done.append, number)
        except BlockingIOError:
            refused = number
            break
        time.sleep(0.001)
    assert not workers.submit(done.append, -1, or_not=True)
    free.set()
    closing.join(30)
    assert not closing.is_alive()
    assert sorted(done) == list(range(refused))
    with pytest.raises(BlockingIOError):
        workers.submit(done.append, -1)


def test_a_thread_that_begins_as_the_end_does_is_no_reason_to_wait_for_ever() -> None:
    """Whoever hands in work is let in between what close() does under its lock and what it does after."""
    workers = Workers(2)
    done: list[int] = []
    assert workers.submit(done.append, 0)

    class Late:
        """The lock of the workers, which has somebody hand in work as soon as it is released."""

        def __init__(self) -> None:
            self.lock = workers._lock
            self.late = True

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            if threading.current_thread() is closing and self.late:
                self.late = False
                with contextlib.suppress(BlockingIOError):
                    workers.submit(time.sleep, 0.01)

    closing = threading.Thread(target=workers.close, daemon=True)
    workers._lock = Late()  # type: ignore[assignment]
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert done == [0]


def test_threads_beyond_those_to_keep_end_when_they_are_without_work() -> None:
    before = threads()
    workers = Workers(20, 2)
    for _ in range(3):
        together, free = threading.Barrier(21), threading.Event()
        used: set[int] = set()

        def task(together: threading.Barrier = together, free: threading.Event = free, used: set[int] = used) -> None:
            used.add(threading.get_ident())
            together.wait(30)
            free.wait(30)

        for _ in range(20):
            workers.submit(task)
        together.wait(30)
        assert len(used) == 20
        free.set()
        wait_until(lambda: workers._idle == 2 == workers._threads)
        wait_until(lambda: threads() <= before + 2)
        done = threading.Event()
        workers.submit(done.set)
        assert done.wait(30)
    workers.close()


def test_the_end_waits_for_every_thread_that_has_something_to_do() -> None:
    for _ in range(50):
        workers = Workers(8, 1)
        done: list[int] = []

        def task(number: int, done: list[int] = done) -> None:
            time.sleep(0.001 * (number % 3))
            done.append(number)

        for number in range(20):
            workers.submit(task, number)
        workers.close()
        assert sorted(done) == list(range(20))


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
