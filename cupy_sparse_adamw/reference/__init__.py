"""The specification in code: plain torch, readable first, any device. Slow, and meant to be.

Every operation has the name and signature of its fast counterpart in ``engines``, and one test
runs them on the same cases.
"""

from .adamw import coalesce, segment, sparse_adamw_
from .index import find, gather, insert_, scatter_
from .random import init_rows_

__all__ = [
    "coalesce",
    "find",
    "gather",
    "init_rows_",
    "insert_",
    "scatter_",
    "segment",
    "sparse_adamw_",
]
