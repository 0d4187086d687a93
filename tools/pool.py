"""Work spread over processes of this machine, which ends with an error if one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from training import startup

Item = TypeVar("Item")
Result = TypeVar("Result")
# Items handed out ahead, per worker: enough that none waits, few enough that results do not pile up.
AHEAD = 4

_held: dict[str, Callable[[Any], Any]] = {}  # the function of a worker; as an argument it would be sent with every item


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Yield the results of a function in the order of its items.

    Args:
        function: what it refers to is sent once to each worker, or inherited where processes are forked.
        items: read as they are handed out.
        workers: number of processes.

    Raises:
        ValueError: a worker was killed.
    """
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(function,))
    submit, rest = partial(pool.submit, _call), iter(items)
    try:
        waiting = deque(map(submit, islice(rest, AHEAD * workers)))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(map(submit, islice(rest, 1)))
            yield result
    except BrokenProcessPool:
        raise ValueError("a worker was killed; fewer --workers need less memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    startup.stop_with_parent()
    _held["function"] = function


def _call(item: Any) -> Any:
    return _held["function"](item)
