"""Keeping freed memory in the process: every micro-batch asks for the same sizes again.

glibc gives large blocks back to the kernel as soon as they are free and fetches them anew, page by page: more time than
the stand-in takes to encode. Knows one call of glibc's; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Blocks up to this many bytes come from the heap; glibc takes no higher figure.
MAX_HEAP_BLOCK_BYTES = 32 * 1024 * 1024
#: Free bytes at the end of the heap that stay there.
KEPT_BYTES = 128 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Whether the allocator took it."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAX_HEAP_BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
