"""AdamW for huge embedding tables: only the rows that a batch touches, in one fused pass.

Importing this needs neither a GPU nor CuPy nor Numba; engines load at first use.
"""

from .children import ChildrenInfo
from .hash_table import HashTable
from .hooks import (
    AdmitHook,
    BaseAdmitHookImpl,
    BaseFilterHookImpl,
    FilterHook,
    HashTableFilterHook,
    HashtableHookFactory,
)
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
from .slices import Slice, gen_slice
from .state_dicts import is_hashtable, split_sparse_dense_state_dict
from .tables import filter_out_sparse_param

__version__ = "0.1.0"

__all__ = [
    "AdmitHook",
    "BaseAdmitHookImpl",
    "BaseFilterHookImpl",
    "ChildrenInfo",
    "ConstantInitializer",
    "FilterHook",
    "HashTable",
    "HashTableFilterHook",
    "HashtableHookFactory",
    "Initializer",
    "KaimingNormalInitializer",
    "KaimingUniformInitializer",
    "NormalInitializer",
    "Slice",
    "SparseAdamW",
    "SparseOptimizer",
    "TruncNormalInitializer",
    "UniformInitializer",
    "XavierNormalInitializer",
    "XavierUniformInitializer",
    "__version__",
    "filter_out_sparse_param",
    "gen_slice",
    "is_hashtable",
    "split_sparse_dense_state_dict",
]
