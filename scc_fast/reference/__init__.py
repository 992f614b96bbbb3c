"""Reference: METHOD.md in plain PyTorch, the specification of all faster paths.

It imports no kernel, op or compiled extension, to be independent of what it tests.
"""
