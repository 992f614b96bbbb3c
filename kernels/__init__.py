"""Triton kernels, installed as scc_fast.kernels.

Empty on purpose: another package is called `kernels`, and `import kernels` would find this file if
the root is on sys.path."""
