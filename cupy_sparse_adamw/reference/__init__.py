"""The specification in code: plain torch, readable first, any device. Slow, and meant to be.

Every operation has the name and signature of its fast counterpart in ``engines``, and one test
runs them on the same cases.
"""

from .adamw import coalesce, prepare_sparse_adamw, segment
from .blocks import gather, scatter_
from .device import copy_to_host, is_capturing, pairs_moments
from .index import delete_, find, find_or_insert_, insert_, rehash_
from .random import init_rows_
from .untouched import catch_up_, gather_current, prepare_extend_rules

__all__ = [
    "catch_up_",
    "coalesce",
    "copy_to_host",
    "delete_",
    "find",
    "find_or_insert_",
    "gather",
    "gather_current",
    "init_rows_",
    "insert_",
    "is_capturing",
    "pairs_moments",
    "prepare_extend_rules",
    "prepare_sparse_adamw",
    "rehash_",
    "scatter_",
    "segment",
]
