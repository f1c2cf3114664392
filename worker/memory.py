"""Memory for a process that does the same thing all day: every micro-batch asks for the same sizes again.

glibc gives large blocks back to the kernel as soon as they are free and fetches them anew, page by page: more time than
the stand-in takes to encode. Python looks for cycles after every 700 new objects, and now and then through all there
are; a micro-batch makes tens of thousands without a cycle. Knows one call of glibc's, elsewhere not made.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Blocks up to this many bytes come from the heap; glibc takes no higher figure.
MAX_HEAP_BLOCK_BYTES = 32 * 1024 * 1024
#: Free bytes at the end of the heap that stay there.
KEPT_BYTES = 128 * 1024 * 1024


#: New objects after which Python looks for cycles among them, and such looks until it goes through older ones.
GC_THRESHOLDS = (50_000, 20, 50)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """While the block runs, Python's collector leaves alone what is there now, and looks at the rest less often."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def keep_freed_memory() -> bool:
    """Whether the allocator took it."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAX_HEAP_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
