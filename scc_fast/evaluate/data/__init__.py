"""Data sets of the papers, with their protocols and prompts."""

from __future__ import annotations

from scc_fast.evaluate.data.catalogue import CATALOGUE, NAMES, Entry
from scc_fast.evaluate.data.dataset import Dataset, default_root, from_source, open_dataset
from scc_fast.evaluate.data.protocol import PROTOCOLS, Protocol
from scc_fast.evaluate.data.source import MissingData, Source

__all__ = [
    "CATALOGUE",
    "NAMES",
    "PROTOCOLS",
    "Dataset",
    "Entry",
    "MissingData",
    "Protocol",
    "Source",
    "default_root",
    "from_source",
    "open_dataset",
]
