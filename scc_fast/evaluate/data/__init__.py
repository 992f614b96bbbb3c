"""Labelled pictures: the papers' data sets, the protocols they are prepared with, and prompts."""
