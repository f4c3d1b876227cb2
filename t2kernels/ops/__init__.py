"""The product x·V·diag(d)·Uᵀ: one reference, several backends, one operator of torch.

``reference.py`` defines it, ``torch_backend.py``, ``native.py``, ``triton/`` and ``cuda.py``
compute it, ``dispatch.py`` chooses, ``library.py`` registers it with torch, ``functional.py`` is
what users call.
"""
