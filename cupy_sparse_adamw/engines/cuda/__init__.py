"""The CUDA engine's place: ``cuda_src/*.cu`` through ``cupy.RawModule``. It is not written yet.

It will offer the same operations under the same names and signatures as ``engines.cpu``.
Importing it says so, so that ``functional`` has one way to report an engine that cannot load.
"""

raise ImportError(
    "the CUDA engine is not part of this version yet; keep tables on the CPU "
    "(model.to('cpu'), or HashTable(..., device='cpu'))"
)
