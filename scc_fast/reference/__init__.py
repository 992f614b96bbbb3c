"""METHOD.md in plain PyTorch: the specification every faster path is tested against.

Nothing here imports a kernel, the compiled extension or an op: a reference that shares code with
what it judges proves nothing.
"""
