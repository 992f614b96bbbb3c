"""Triton kernels, installed as scc_fast.kernels. Imports nothing and defines nothing on purpose:
another package is also called `kernels`, and with this folder on sys.path it is this file that
`import kernels` finds."""
