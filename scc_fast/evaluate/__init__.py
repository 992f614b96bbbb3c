"""Accuracy of defenses under attacks: a resumable runner, tables and figures."""
