"""The threads that decode images: one pool for each process."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def threads() -> ThreadPoolExecutor:
    """The pool of this process. One that is forked has its parent's pool, but not the pool's threads."""
    return _pool(os.getpid())


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(32, os.cpu_count() or 1))
