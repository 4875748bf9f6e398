"""AdamW for huge embedding tables: only the rows that a batch touches, in one fused pass.

Importing this needs neither a GPU nor CuPy nor Numba; engines load at first use.
"""

from .hash_table import HashTable
from .hooks import AdmitHook
from .initializers import (
    ConstantInitializer,
    Initializer,
    KaimingNormalInitializer,
    KaimingUniformInitializer,
    NormalInitializer,
    TruncNormalInitializer,
    UniformInitializer,
    XavierNormalInitializer,
    XavierUniformInitializer,
)
from .optim import SparseAdamW, SparseOptimizer
from .tables import filter_out_sparse_param

__version__ = "0.1.0"

__all__ = [
    "AdmitHook",
    "ConstantInitializer",
    "HashTable",
    "Initializer",
    "KaimingNormalInitializer",
    "KaimingUniformInitializer",
    "NormalInitializer",
    "SparseAdamW",
    "SparseOptimizer",
    "TruncNormalInitializer",
    "UniformInitializer",
    "XavierNormalInitializer",
    "XavierUniformInitializer",
    "__version__",
    "filter_out_sparse_param",
]
