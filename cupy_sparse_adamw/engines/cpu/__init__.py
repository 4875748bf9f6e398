"""The CPU engine: Numba loops over blocks of rows, compiled at first use and cached on disk."""

from .adamw import coalesce, sparse_adamw_
from .index import find, gather, insert_, scatter_
from .random import init_rows_
from .segment import segment

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
