"""The CUDA sources, read as text and compiled by NVRTC at first use.

No Python code lives here. The folder is a package (``cupy_sparse_adamw.cuda_src`` once installed)
so that a wheel and an editable install both carry the files, and ``importlib.resources`` finds
them in either.
"""
