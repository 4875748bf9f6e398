"""The CPU engine: Numba loops over blocks of rows, compiled at first use and cached on disk."""

from .adamw import prepare_sparse_adamw
from .device import copy_to_host, is_capturing, pairs_moments
from .index import delete_, find, find_or_insert_, gather, insert_, rehash_, scatter_
from .random import init_rows_
from .rules import prepare_extend_rules
from .segment import segment
from .sums import coalesce
from .untouched import catch_up_, gather_current

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
