"""Triton kernels, one op per file: the module and its function carry the op's name."""
