"""The specification in code: plain torch, readable first, any device. Slow, and meant to be.

Every operation has the name and signature of its fast counterpart in ``engines``, and one test
runs them on the same cases.
"""

from .adamw import coalesce, segment, sparse_adamw_
from .blocks import gather, scatter_
from .device import copy_to_host, is_capturing
from .index import delete_, find, find_or_insert_, insert_, rehash_
from .random import init_rows_

__all__ = [
    "coalesce",
    "copy_to_host",
    "delete_",
    "find",
    "find_or_insert_",
    "gather",
    "init_rows_",
    "insert_",
    "is_capturing",
    "rehash_",
    "scatter_",
    "segment",
    "sparse_adamw_",
]
