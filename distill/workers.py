"""Threads that prepare data, and end with whoever needed it."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread, main_thread
from typing import Any


class Workers:
    """Threads that do tasks in order, until they are closed or the main thread has ended.

    An executor's would do all that is queued before the interpreter may end, and a daemon's may be
    cut off in the midst of a library.
    """

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[tuple[Future, Callable, tuple]] = SimpleQueue()
        self._closed = Event()
        for _ in range(count):
            Thread(target=self._work, name="conversations").start()

    def submit(self, call: Callable, *args: Any) -> Future:
        future: Future = Future()
        self._tasks.put((future, call, args))
        if self.over():
            self._cancel()
        return future

    def close(self) -> None:
        self._closed.set()

    def over(self) -> bool:
        return self._closed.is_set() or not main_thread().is_alive()

    def _work(self) -> None:
        while not self.over():
            try:
                future, call, args = self._tasks.get(timeout=0.2)
            except Empty:
                continue
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)
            del future, call, args  # rather than hold the last result until the next task
        self._cancel()

    def _cancel(self) -> None:
        """Let nobody wait for what will not be done."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()[0].cancel()
