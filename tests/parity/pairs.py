"""Work for parametrised tests, done two at a time: half of it is compiling, on one core."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest


@contextlib.contextmanager
def two_at_a_time(
    request: pytest.FixtureRequest, test: Callable[..., None], work: Callable[[str], Any]
) -> Iterator[dict[str, Future]]:
    """Futures of `work(name)` for every `name` that `test` is selected to run with."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if getattr(item, "function", None) is test
    ]

    def clean(name: str) -> Any:
        result = work(name)
        gc.collect()  # the largest networks hold gigabytes, in cycles
        return result

    pool = ThreadPoolExecutor(2)
    try:
        yield {name: pool.submit(clean, name) for name in names}
    finally:
        pool.shutdown(cancel_futures=True)
