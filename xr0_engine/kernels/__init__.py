"""Triton kernels, one op family a file, and the PyTorch oracles beside them. A leaf: it sees nothing of the package."""
