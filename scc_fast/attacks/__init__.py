"""Attacks, so that a repair is seen against something: oblivious, view-aware and adaptive PGD."""

from scc_fast.attacks.pgd import adaptive, pgd, view_aware

__all__ = ["adaptive", "pgd", "view_aware"]
