import threading

import pytest

from etpo.environments.threads import DaemonThread


def test_calls_come_one_after_the_other_in_one_thread():
    thread = DaemonThread("worker")
    jobs = [thread.submit(lambda n: (n, threading.current_thread()), n) for n in range(3)]
    numbers, threads = zip(*(job.result(timeout=30) for job in jobs), strict=True)
    assert numbers == (0, 1, 2)
    (worker,) = set(threads)
    assert worker.daemon
    assert worker is not threading.current_thread()
    assert not thread.busy
    thread.stop()
    worker.join(timeout=30)
    assert not worker.is_alive()


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_a_call_raises_is_raised_where_its_result_is_read(error):
    def fail():
        raise error

    thread = DaemonThread("worker")
    with pytest.raises(error):
        thread.submit(fail).result(timeout=30)
    assert thread.submit(int, "3").result(timeout=30) == 3


def test_a_thread_is_busy_until_its_last_call_returns():
    thread, released = DaemonThread("worker"), threading.Event()
    job = thread.submit(released.wait, 30)
    assert thread.busy
    released.set()
    job.result(timeout=30)
    assert not thread.busy
