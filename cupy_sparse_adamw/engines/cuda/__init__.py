"""The CUDA engine: ``cuda_src/*.cu`` compiled by NVRTC at first use, launched through CuPy.

Importing it raises ImportError, with the way out, where CuPy or a GPU is missing.
"""

from .adamw import coalesce, sparse_adamw_
from .device import copy_to_host, is_capturing
from .index import delete_, find, find_or_insert_, gather, insert_, rehash_, scatter_
from .random import init_rows_
from .segment import segment

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
