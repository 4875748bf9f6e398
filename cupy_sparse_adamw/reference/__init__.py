"""The specification in code: plain torch, readable first, any device. Slow, and meant to be.

Every operation has the name and signature of its fast counterpart in ``engines``, and one test
runs them on the same cases.
"""

from .adamw import coalesce, segment, sparse_adamw_
from .index import find, find_or_insert_, gather, scatter_
from .random import init_rows_

__all__ = [
    "coalesce",
    "find",
    "find_or_insert_",
    "gather",
    "init_rows_",
    "scatter_",
    "segment",
    "sparse_adamw_",
]
