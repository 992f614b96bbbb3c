"""Data set of an evaluation: batches of pixels and labels, prompts, and facts."""

from __future__ import annotations

import copy
import hashlib
import operator
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from scc_fast.config import shown
from scc_fast.evaluate.data.bundled import EMOJI_SIZE, read_bundled
from scc_fast.evaluate.data.catalogue import Entry, find
from scc_fast.evaluate.data.class_names import knows, resolve
from scc_fast.evaluate.data.protocol import BUNDLED, Preparation, Protocol, find_protocol
from scc_fast.evaluate.data.source import MissingData, Source
from scc_fast.models import VisionLanguage

ROOT_VARIABLE = "SCC_FAST_DATA"


def default_root() -> Path:
    """The folder of the data sets: $SCC_FAST_DATA, else ~/.cache/scc_fast/data."""
    chosen = os.environ.get(ROOT_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "scc_fast" / "data"


def open_dataset(
    name: str,
    model: VisionLanguage,
    *,
    root: Path | None = None,
    split: str | None = None,
    protocol: str = "ttc",
    n_samples: int | None = None,
    seed: int = 0,
    download: bool = False,
) -> Dataset:
    """Open a data set of ``NAMES``, prepared for a model by a protocol.

    Args:
        name: clip-benchmark's or the papers' spelling, in any case.
        model: gives the image size, and for "open_clip" the preprocessing.
        root: the folder of the data sets; None: $SCC_FAST_DATA, else ~/.cache/scc_fast/data.
        split: the data set's name of it; None: the papers' evaluation split.
        protocol: "ttc" (the papers'), "open_clip" (the model's own), see ``PROTOCOLS``. Emoji for a
            model of 64 pixels are always unchanged ("bundled").
        n_samples: number of pictures: the first of
            ``numpy.random.default_rng(seed).permutation(count)``, in that order, or ascending for
            the bundled sets. A smaller draw is part of a larger one. None: all.
        seed: of the draw.
        download: let torchvision download missing files.

    Raises:
        TypeError, ValueError: an invalid argument, or unexpected files, such as too many classes.
        MissingData: no files; says where they were expected and how to get them.
        ImportError: a package for the format is not installed.
    """
    entry = find(name)
    opener = Opener(entry.name, None if root is None else Path(root), split, download)
    if entry.group != "bundled":
        opener = Opener(entry.name, opener.root or default_root(), split, download)
    try:
        source = opener()
    except MissingData as error:
        if root is not None:
            raise
        where = f"${ROOT_VARIABLE}" if os.environ.get(ROOT_VARIABLE) else "the default"
        raise MissingData(
            f"{error}\n(root was not given: {opener.root} is {where}; "
            f"set {ROOT_VARIABLE} or pass root=)"
        ) from error
    again = Opener(entry.name, opener.root, source.split, False)
    return from_source(
        source, model, protocol=protocol, n_samples=n_samples, seed=seed, opener=again
    )


def from_source(
    source: Source,
    model: VisionLanguage,
    *,
    protocol: str = "ttc",
    n_samples: int | None = None,
    seed: int = 0,
    opener: Opener | None = None,
) -> Dataset:
    """Data set of a given source; see :func:`open_dataset`.

    Args:
        source: pictures named after an entry of the catalogue.
        opener: reopens them in another process; None: the source itself is pickled.
    """
    entry = find(source.name)
    chosen = _protocol(entry, protocol, model)
    preparation = chosen.preparation(model)
    cleaned, known = _names(entry, source)
    if not known:
        _warn(f"{entry.name}: unknown class names on disk; prompts use them instead of the paper's")
    classes = chosen.names(cleaned)
    template, prompts = make_prompts(entry, chosen, classes)
    duplicates = _groups(prompts)
    if duplicates:
        first = prompts[duplicates[0][0]]
        _warn(f"{entry.name}: {len(duplicates)} prompts name two classes or more, e.g. {first!r}")
    labels = np.asarray(source.labels, dtype=np.int64)
    valid = np.flatnonzero((labels >= 0) & (labels < entry.n_classes))
    if len(valid) < len(labels):
        _warn(f"{entry.name}: {len(labels) - len(valid)} pictures have no valid label: left out")
    mixed = entry.group == "bundled"
    indices = valid[_draw(len(valid), n_samples, seed, entry.name, mixed)]
    facts = _facts(entry, source, labels[valid], known)
    facts |= {"protocol": chosen.name, **preparation.facts(), "template": template}
    facts |= {"n": len(indices), "sampling_seed": None if mixed and n_samples is None else seed}
    facts |= {"classes": list(classes), "duplicate_prompts": duplicates}
    facts["prompts_sha256"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    data = Dataset(
        name=entry.name,
        split=source.split,
        protocol=chosen.name,
        classes=classes,
        prompts=prompts,
        indices=tuple(indices.tolist()),
        preparation=preparation,
        opener=opener or _Kept(source),
        recorded=facts,
    )
    data._opened.append(source)
    return data


@dataclass(frozen=True)
class Opener:
    """Opens a data set, in any process."""

    name: str
    root: Path | None
    split: str | None
    download: bool = False

    def __call__(self) -> Source:
        if find(self.name).group == "bundled":
            return read_bundled(self.name, self.split)
        from scc_fast.evaluate.data.readers import read

        assert self.root is not None
        return read(self.name, self.root, self.split, self.download)


@dataclass(frozen=True)
class _Kept:
    source: Source

    def __call__(self) -> Source:
        return self.source


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures prepared for one model, with their labels and prompts; :func:`open_dataset`.

    It can be pickled: another process opens the files with its first batch.

    Args:
        name: clip-benchmark's spelling.
        split: the data set's name of it.
        protocol: name of the protocol.
        classes: cleaned names, by label.
        prompts: one per class, by label.
        indices: pictures of the split, in order.
    """

    name: str
    split: str
    protocol: str
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    indices: tuple[int, ...]
    preparation: Preparation
    opener: Callable[[], Source]
    recorded: dict[str, Any]
    _opened: list[Source] = field(default_factory=list, init=False, repr=False)
    _decoded: Decoded = field(default_factory=lambda: Decoded(), init=False, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": [], "_decoded": Decoded()}

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Pictures ``start`` to ``stop`` (exclusive) of ``indices``, each decoded once.

        Returns:
            x (n, 3, H, W) float32 in [0, 1], not normalised, and labels (n,) int64; on the CPU.

        Raises:
            ValueError: not 0 <= start <= stop <= len(self), or the files have changed.
        """
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"start, stop: 0 <= start <= stop <= {len(self)} must hold, got {start}, {stop}"
            )
        source, chosen = self._source(), self.indices[start:stop]
        labels = torch.tensor([int(source.labels[i]) for i in chosen], dtype=torch.int64)
        if not chosen:
            return torch.zeros(0, 3, *self.preparation.own.image_size), labels
        size = self.preparation.own.image_size
        pictures = []
        for i in chosen:
            picture = self._decoded.get(i, size)
            if picture is None:
                picture = self.preparation(source.picture(i))
                self._decoded.put(i, picture)
            pictures.append(picture)
        return torch.stack(pictures), labels

    def facts(self) -> dict[str, Any]:
        """Facts that a result must record of its data, as JSON values.

        ``name``, ``paper`` (its name there), ``split``, ``protocol``, ``resize``, ``crop``,
        ``template``, ``pictures`` on disk, ``pictures_expected`` (None except for the papers'
        split), ``pictures_without_label`` (left out), ``n``, ``sampling_seed`` (None: not drawn),
        ``classes``, ``classes_expected``, ``classes_present`` (with pictures), ``class_names``
        ("of the protocol" or "as on disk"), ``prompts_sha256`` (of the prompts joined by newlines),
        ``reader``, ``duplicate_prompts`` (groups of class indices), ``note``. No folders: copies on
        two machines give equal facts.
        """
        return copy.deepcopy(self.recorded)

    def _source(self) -> Source:
        if not self._opened:
            source = self.opener()
            count = self.recorded["pictures"]
            if len(source) != count:
                raise ValueError(
                    f"dataset: {self.name} had {count} pictures when it was opened, "
                    f"now {len(source)}"
                )
            self._opened.append(source)
        return self._opened[0]


class Decoded:
    """Cache of prepared pictures in a temporary file, one byte per channel.

    Pictures that are not exact in 8 bits are not cached; neither is any on a full disk.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._places: dict[int, int] = {}  # index -> position

    def get(self, index: int, size: tuple[int, int]) -> Tensor | None:
        """Cached picture (3, H, W), float32 in [0, 1], or None."""
        if self._file is None or index not in self._places:
            return None
        self._file.seek(self._places[index] * 3 * size[0] * size[1])
        data = bytearray(self._file.read(3 * size[0] * size[1]))
        return torch.frombuffer(data, dtype=torch.uint8).view(3, *size).float() / 255

    def put(self, index: int, picture: Tensor) -> None:
        """Cache a picture."""
        data = (255 * picture).round().to(torch.uint8)
        if not torch.equal(data.float() / 255, picture):
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (kept open)
            self._file.seek(len(self._places) * data.numel())
            if self._file.write(data.numpy().tobytes()) == data.numel():
                self._places[index] = len(self._places)
        except OSError:
            return


def _facts(entry: Entry, source: Source, labels: np.ndarray, known: bool) -> dict[str, Any]:
    """Facts about the files; ``labels`` are the valid ones."""
    whole = source.split == entry.split or (entry.name == "imagenet1k" and source.split == "test")
    return {
        "name": entry.name,
        "paper": entry.paper,
        "split": source.split,
        "pictures": len(source),
        "pictures_expected": entry.size if whole else None,
        "pictures_without_label": len(source) - len(labels),
        "classes_expected": entry.n_classes,
        "classes_present": len(np.unique(labels)),
        "class_names": "of the protocol" if known else "as on disk",
        "reader": source.reader,
        "note": entry.note,
    }


def _names(entry: Entry, source: Source) -> tuple[list[str], bool]:
    """Cleaned names by label, and whether they are the protocol's."""
    table = entry.table() if entry.table else None
    count, expected = len(source.classes), entry.n_classes
    # Fewer classes are a part of the set if all are known by name
    part = count < expected and (table is None or knows(source.classes, table))
    if count != expected and not (part and count > 1):
        raise ValueError(
            f"dataset: {entry.name} has {expected} classes, but {count} were read from disk "
            f"({source.reader}, split {source.split!r})" + (f"; {entry.note}" if entry.note else "")
        )
    if part:
        _warn(f"{entry.name}: {count} of its {expected} classes are on disk: not comparable")
    try:
        return resolve(source.classes, entry.clean, table)
    except ValueError as error:
        raise ValueError(f"dataset: {entry.name}: {error}") from error


def make_prompts(
    entry: Entry, protocol: Protocol, classes: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Template and prompts of classes: the protocol's template, else the data set's."""
    template = entry.template
    if protocol.template is not None and entry.group != "bundled":
        template = protocol.template
    return template, tuple(template.format(name) for name in classes)


def _protocol(entry: Entry, name: str, model: VisionLanguage) -> Protocol:
    chosen = find_protocol(name)
    if not hasattr(model, "image_size"):
        raise TypeError(
            f"model: a loaded model is needed, got {type(model).__name__}; see scc_fast.load_model"
        )
    if entry.name == "emoji" and tuple(model.image_size) == (EMOJI_SIZE, EMOJI_SIZE):
        return BUNDLED
    if chosen is BUNDLED:
        raise ValueError(
            f"protocol: 'bundled' is for emoji and models of {EMOJI_SIZE} pixels; use 'ttc' or "
            "'open_clip'"
        )
    return chosen


def _draw(count: int, n_samples: int | None, seed: int, name: str, mixed: bool) -> np.ndarray:
    """Indices drawn out of ``count``, ascending for a mixed set.

    The first ones are a fair draw, too.
    """
    if count == 0:
        raise ValueError(f"{name}: none of the pictures found has a valid label")
    n_samples = count if n_samples is None else n_samples
    for argument, value in (("n_samples", n_samples), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{argument}: a whole number is needed, got {shown(value)}")
    if not 1 <= n_samples <= count:
        raise ValueError(
            f"n_samples: {name} has {count} pictures, so 1 to {count}; got {n_samples}"
        )
    if seed < 0:
        raise ValueError(f"seed: must be at least 0, got {seed}")
    drawn = np.random.default_rng(seed).permutation(count)[:n_samples]
    return np.sort(drawn) if mixed else drawn


def _groups(prompts: tuple[str, ...]) -> list[list[int]]:
    """Groups of classes that share a prompt."""
    found: dict[str, list[int]] = {}
    for label, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(label)
    return [labels for labels in found.values() if len(labels) > 1]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
