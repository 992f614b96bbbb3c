"""A data set as an evaluation sees it: batches of pixels and labels, prompts, and its facts."""

from __future__ import annotations

import copy
import hashlib
import operator
import os
import tempfile
import warnings
from collections.abc import Callable
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
    """Open a data set of ``NAMES``, prepared for a model as a protocol says.

    Args:
        name: as clip-benchmark or the papers spell it, in any case.
        model: whose image size, and for "open_clip" whose preprocessing, the pictures get.
        root: the folder of the data sets; None: $SCC_FAST_DATA, else ~/.cache/scc_fast/data.
        split: as the data set calls it; None: the one that the papers evaluate on.
        protocol: "ttc" (the papers'), "open_clip" (the model's own), see ``PROTOCOLS``. Emoji for a
            model of 64 pixels pass unchanged, whichever is asked for: "bundled".
        n_samples: how many pictures, drawn without replacement: the first ``n_samples`` of
            ``numpy.random.default_rng(seed).permutation(count)``, in that order, for most sets on
            disk are sorted by class; the bundled ones are mixed, and ascend. A smaller
            draw with the same seed is part of a larger one. None: all.
        seed: of that draw.
        download: let torchvision fetch what is missing.

    Raises:
        TypeError, ValueError: an argument that cannot be right, or files that are not what they
            should be: more classes than the data set has, or fewer that cannot be told by name.
        MissingData: no such files; says what was expected where, and how to get it.
        ImportError: a package for the format is not installed; says which.
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
    """A data set of pictures that somebody else has read; see :func:`open_dataset`.

    Args:
        source: its name must be one of the catalogue's.
        opener: reads it again in another process; None: the source itself must be picklable.
    """
    entry = find(source.name)
    chosen = _protocol(entry, protocol, model)
    preparation = chosen.preparation(model)
    cleaned, known = _names(entry, source)
    if not known:
        _warn(f"{entry.name}: unknown class names on disk; prompts use them instead of the paper's")
    classes = chosen.names(cleaned)
    template = entry.template
    if chosen.template is not None and entry.group != "bundled":
        template = chosen.template
    prompts = tuple(template.format(name) for name in classes)
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
    """Reads a data set, in whatever process."""

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

    It can be pickled: another process gets the description, and opens the files itself when it
    first asks for a batch.

    Args:
        name: as clip-benchmark spells it.
        split: as the data set calls it.
        protocol: the name of how it was prepared.
        classes: cleaned names, by label.
        prompts: one per class, by label.
        indices: which pictures of the split, in the order of batches.
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
        """The pictures ``start`` to ``stop`` (exclusive) of ``indices``, each decoded once.

        Returns:
            x (n, 3, H, W) float32 in [0, 1], not normalised, and labels (n,) int64; on the CPU.

        Raises:
            ValueError: not 0 <= start <= stop <= len(self), or files that changed since.
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
        """What a result must say of its data, as JSON values.

        ``name``, ``paper`` (its name there), ``split``, ``protocol``, ``resize``, ``crop``,
        ``template``, ``pictures`` on disk beside ``pictures_expected`` (None for another split than
        the papers'), ``pictures_without_label`` (left out), ``n``, ``sampling_seed`` (None: not
        drawn), ``classes`` beside ``classes_expected``, ``classes_present`` (with pictures),
        ``class_names`` ("of the protocol", or "as on disk" where they are unknown),
        ``prompts_sha256`` (of the prompts joined by newlines), ``reader``,
        ``duplicate_prompts`` (groups of class indices), ``note``. Folders are not among
        them: copies on two machines give equal facts.
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
    """Prepared pictures in a temporary file, a byte a channel: of any number, and out of memory.

    Pictures that bytes do not hold exactly are not kept, nor any where the disk is full.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._places: dict[int, int] = {}  # of each picture, in pictures

    def get(self, index: int, size: tuple[int, int]) -> Tensor | None:
        """The picture (3, H, W), float32 in [0, 1]; None where it is not kept."""
        if self._file is None or index not in self._places:
            return None
        self._file.seek(self._places[index] * 3 * size[0] * size[1])
        data = bytearray(self._file.read(3 * size[0] * size[1]))
        return torch.frombuffer(data, dtype=torch.uint8).view(3, *size).float() / 255

    def put(self, index: int, picture: Tensor) -> None:
        """Keep a picture."""
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
    """What is known of the files; ``labels`` are the valid ones."""
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
    """The cleaned names by label, and whether they are the protocol's."""
    table = entry.table() if entry.table else None
    count, expected = len(source.classes), entry.n_classes
    # Fewer are a part of it where every one can be told by its name
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
    """Places of the pictures that are taken out of ``count``; ascending where they are mixed.

    The first of them are a fair draw, too: whoever can afford no more takes these.
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
    """The classes that share a prompt, by the first of them."""
    found: dict[str, list[int]] = {}
    for label, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(label)
    return [labels for labels in found.values() if len(labels) > 1]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
