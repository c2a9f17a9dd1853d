"""The threads that execute what may block."""

import threading

import pytest

from overlayfs_py.engines.native.workers import Workers


def test_tasks_run_side_by_side_in_as_many_threads_as_there_may_be() -> None:
    begun: list[str] = []
    workers = Workers(3, lambda: begun.append(threading.current_thread().name))
    together = threading.Barrier(3)
    for _ in range(3):
        workers.submit(together.wait)
    workers.shutdown()
    assert sorted(begun) == ["job_0", "job_1", "job_2"]
    assert not together.broken


def test_what_finds_all_threads_busy_is_done_later_and_in_order() -> None:
    workers = Workers(1, lambda: None)
    hold = threading.Event()
    done: list[int] = []
    workers.submit(hold.wait)
    for number in range(50):
        workers.submit(done.append, number)
    assert done == []
    hold.set()
    workers.shutdown()
    assert done == list(range(50))


def test_a_thread_that_is_idle_is_used_again() -> None:
    workers = Workers(8, lambda: None)
    used = set()
    for _ in range(20):
        ended = threading.Event()

        def task(ended: threading.Event = ended) -> None:
            used.add(threading.current_thread().name)
            ended.set()

        workers.submit(task)
        ended.wait()
        # Until it has said that it is idle.
        while not workers._idle:
            threading.Event().wait(0.001)
    workers.shutdown()
    assert used == {"job_0"}


def test_a_task_that_raises_is_logged_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a mistake")

    workers = Workers(1, lambda: None)
    done: list[int] = []
    workers.submit(fail)
    workers.submit(done.append, 1)
    workers.shutdown()
    assert done == [1]
    assert "ValueError: a mistake" in caplog.text
