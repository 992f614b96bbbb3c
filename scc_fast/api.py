"""defend() and Defender."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scc_fast import _classes, ops
from scc_fast._arguments import explained
from scc_fast._plain import plain
from scc_fast._progress import with_progress
from scc_fast._warn import warn
from scc_fast.config import (
    MethodConfig,
    View,
    ViewsConfig,
    method_config,
    one_of,
    python_number,
    shown,
    whole,
)
from scc_fast.defenses import DEFENSES, Defense, Traits, parse_defense
from scc_fast.defenses.scc import OnViews
from scc_fast.engine import drive
from scc_fast.engine.batch import Batch
from scc_fast.engine.choose import ENGINES, PRECISIONS
from scc_fast.engine.cost import Cost
from scc_fast.engine.memory import free_memory
from scc_fast.engine.plan import Plan, ascent_plan
from scc_fast.engine.seeds import Seeds, image_seeds
from scc_fast.engine.session import Session, session_of
from scc_fast.engine.snapshot import snapshot_of
from scc_fast.engine.waterfall import Stage, waterfall
from scc_fast.images import to_batch
from scc_fast.reference.heads import Classes
from scc_fast.reference.ttc import Outcome
from scc_fast.result import DefenseResult

# What nn.Module has, and a Defender has not.
_MOVES = ("to", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "to_empty")


class Defender:
    """A defense prepared once for a model and its classes, and called often.

    Thread-safe: a call shares nothing with another but frozen weights and text embeddings.

    It stands on a snapshot of the model: image tower, text embeddings and logit scale as they are
    now, on every engine, with gradients and without. What is written to the model later does not
    reach it; refresh() takes it anew. That is one more copy of the image tower in memory, which
    Defenders of one model with the same weights share, and a reading of all weights: see
    engine/snapshot.py. A model of the caller's own class that is no adapter of load_model's, but
    has its members, cannot be taken: its encode_image is called as it then is.

    Args:
        model: what load_model() returns, or anything it accepts.
        classes: K >= 2 prompts such as "a photo of a dog", used as they are. Duplicates are
            allowed and never count as each other's negative.
        text_features: (K, D) text embeddings instead of `classes`; scaled to unit length.
        method: one of scc_fast.defenses.DEFENSES: "scc", "ttc", "views", "rn", "none", "tte",
            "anti_adv", "hd", "doc", "r_tpt", "csr", "dbd", "mac" or "extrapolate".
        config: the method's config object or a dict of some of its fields. What is left out is the
            model's own default where it carries one (the bundled one does for "scc"), else the
            published value.
        precision: of the encoder's products: "fp32", "bf16" or "fp16"; δ, the residual stream and
            the heads stay float32. "auto" is that of the model's weights, and on a GPU "bf16" for
            weights in float32. Calls with gradients on are in that of the weights; live() and
            bpda_logits() are in that of the engine.
        backend: who serves the ops: "cpp", "triton", "reference" (plain PyTorch throughout), or
            "auto", for each op the best that is there (scc-fast doctor shows which). Calls with
            gradients on, such as an attacker's, always take the reference, which computes the
            same defense differentiably.
        engine: who runs the encoder: "eager", the model's own modules; "compile", these through
            torch.compile; "runner", ours for the standard vision transformer (open_clip,
            transformers CLIP and SigLIP), without an autograd graph; "graph", the whole defense
            as CUDA graphs, one for each power of two of the batch. "auto" takes graphs of the
            runner on a GPU, the runner on a CPU, and the modules where the runner does not know
            the model. Calls with gradients on are served by the modules; pictures of another size
            than the encoder's are resized outside graphs.
        max_batch: at most this many views at once, an image's counted one by one; larger batches
            are split. (The first pass has each image itself beside them, and one image's views
            are never split.) None: 64 on a CPU; on a GPU 1024, or as many as fit into half of what
            is free.

    Raises:
        ValueError, TypeError: naming the argument, what came and what would be right.
        ValueError: weights, text embeddings or a logit scale that are not finite.
        RuntimeError: an explicitly requested precision, backend or engine is not to be had. A call
            raises it too, where the runner was asked for by name and does not stand for the
            modules any more, because a hook was added or a method replaced.
    """

    @torch.compiler.disable
    @explained
    def __init__(
        self,
        model: Any,
        classes: Sequence[str] | None = None,
        *,
        text_features: Tensor | None = None,
        method: str = "scc",
        config: MethodConfig | dict[str, Any] | None = None,
        precision: str = "auto",
        backend: str | None = "auto",
        engine: str = "auto",
        max_batch: int | None = None,
    ) -> None:
        self._given = model, text_features
        self.model = _classes.as_model(model)
        self.method = one_of("method", method, tuple(DEFENSES))
        _warn_of_views(method, config)
        kind = DEFENSES[self.method]
        self.config: Any = method_config(self.model.defaults, self.method, config, kind.Config)
        one_of("precision", precision, ("auto", *PRECISIONS))
        backend = "auto" if backend is None else backend
        one_of("backend", backend, ("auto", *ops.BACKENDS))
        one_of("engine", engine, ENGINES)
        if engine == "graph" and not kind.captures:
            raise RuntimeError(f"engine='graph' is not to be had of {_not_planned(method)}")
        if max_batch is not None:
            max_batch = whole("max_batch", max_batch, 1, 2**31, " of pictures")
        self._asked = precision, backend, engine, max_batch
        self.classes = _classes.check_prompts(classes)
        self.snapshot = snapshot_of(self.model)
        with plain(self.snapshot.device):
            text = _classes.text_embeddings(self.model, self.snapshot, self.classes, text_features)
            self._classes = Classes(text, *_classes.scale_of(self.snapshot))
        self._judge: Defender | None = None
        original = getattr(self.model, "original", None)
        if original is not None and kind(self.config).judged:
            # Of a fine-tuned encoder the gate looks through the one that it was tuned from (TTC).
            alike: dict[str, Any] = {"precision": precision, "backend": backend, "engine": engine}
            self._judge = Defender(original, text_features=text, method="none", **alike)
        self._build()

    def _build(self) -> None:
        """Make what runs on the snapshot and the classes; it is not copied or pickled."""
        precision, backend, engine, max_batch = self._asked
        self.session: Session = session_of(
            self.model,
            self.snapshot,
            self.classes,
            self._classes,
            engine=engine,
            precision=precision,
            backend=None if backend == "auto" else backend,
            judge=None if self._judge is None else self._judge.session,
        )
        self.backend, self.precision = self.session.served, self.session.precision
        self.defense: Defense = DEFENSES[self.method](self.config)
        self.defense.prepare(self.session)
        self.max_batch = self._default_max_batch() if max_batch is None else max_batch
        self.engine = drive.serves(self.session, self.defense, self.session.size)

    def __getstate__(self) -> dict[str, Any]:
        made = ("session", "defense")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._build()

    def refresh(self) -> None:
        """Take the model's weights, text embeddings and logit scale as they are now.

        What was given to the constructor is given again. Calls of other threads end on the old
        ones.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor; the Defender stays as it was.
        """
        model, text_features = self._given
        precision, backend, engine, max_batch = self._asked
        fresh = Defender(
            model,
            self.classes,
            text_features=text_features,
            method=self.method,
            config=self.config,
            precision=precision,
            backend=backend,
            engine=engine,
            max_batch=max_batch,
        )
        vars(self).update(vars(fresh))

    def __repr__(self) -> str:
        return (
            f"Defender({self.model!r}, {len(self.text_features)} classes, method={self.method!r}, "
            f"engine={self.engine!r}, precision={self.precision!r}, backend={self.backend!r})"
        )

    def __getattr__(self, name: str) -> Any:
        if name in _MOVES:
            raise AttributeError(
                f"Defender has no {name}(): it stays with its model; load that with "
                "load_model(device=, precision=) and make another Defender"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def has_gate(self) -> bool:
        """Whether a gate decides which images are taken as attacked."""
        return self.defense.has_gate

    @property
    def is_randomized(self) -> bool:
        """Whether the method draws noise, so that seeds matter."""
        return self.traits.random

    @property
    def traits(self) -> Traits:
        """What the method costs and needs."""
        return self.defense.traits(self.session)

    @property
    def text_features(self) -> Tensor:
        """The K text embeddings in use, (K, D) float32, unit length."""
        return self.session.classes.text

    @property
    def table(self) -> Classes:
        """The text embeddings with the logit scale and bias."""
        return self.session.classes

    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D), not normalised, of pixels (B, 3, H, W) in [0, 1]: φ, then f."""
        return self.session.reference.encode(pixels)

    def views(self, size: int) -> tuple[View, ...]:
        """The views this method averages over, for images whose shorter side is `size` pixels."""
        if not isinstance(self.defense, OnViews):
            raise RuntimeError(f"views() is not to be had of {_not_planned(self.method)}")
        return self.defense.views(self.session, size)

    @explained
    def __call__(
        self,
        images: Any,
        seeds: Seeds = None,
        *,
        is_normalized: bool = False,
        clamp: bool = False,
    ) -> DefenseResult:
        """Defend a batch.

        Args:
            images: float (B, 3, H, W) in [0, 1], uint8 of the same shape, arrays with channels
                last, PIL images, paths, encoded bytes, binary files, or a list that mixes them.
            seeds: None draws fresh ones; an int seeds image i with (seed, i); or B whole numbers.
            is_normalized: the tensor has been through (x − mean)/std, which is undone first.
            clamp: clamp values outside [0, 1]; else more than 1e-6 outside is refused.

        Returns:
            DefenseResult. Image i depends on its pixels and its seed alone (a matrix product may
            round its logits differently in another batch).
        """
        return drive.call(
            self.session,
            self.defense,
            images,
            seeds,
            max_batch=self.max_batch,
            is_normalized=is_normalized,
            clamp=clamp,
        )

    def serves(self, size: tuple[int, int]) -> str:
        """The engine that serves pictures (height, width)."""
        if self.session.mistrust:
            return "eager"
        return drive.serves(self.session, self.defense, size)

    def pieces(self, x: Tensor, seeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """x and seeds in pieces of at most max_batch pictures, but at least one image."""
        found = drive.pieces(self.session, self.defense, Batch(x, seeds), self.max_batch)
        return [(piece.x, piece.seeds) for piece in found]

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        """The method itself on x (B, 3, H, W) in [0, 1], seeds (B,): unchecked, not split.

        Follows the caller's autograd mode: with gradients on, the logits are differentiable with
        respect to x.
        """
        batch, session, defense = Batch(x, seeds), self.session, self.defense
        if not torch.is_grad_enabled():
            with plain(x.device):
                return drive.run(session.now(), defense, batch)
        with torch.autocast(x.device.type, enabled=False):
            found = defense.reference(session, batch) if len(x) else None
            return drive.live(session, defense, batch).outcome if found is None else found

    def live(self, x: Tensor, seeds: Tensor) -> drive.Live:
        """The method on x (B, 3, H, W), seeds (B,), as a differentiable function of x.

        What it optimises counts as constant (BPDA). It runs on the engine that serves the calls,
        in its precision.
        """
        calm = torch.autocast(x.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), calm:
            x, seeds = (one.clone() if one.is_inference() else one for one in (x, seeds))
            return drive.live(self.session, self.defense, Batch(x, seeds))

    def view_logits(self, x: Tensor, seeds: Tensor, views: Sequence[View] | None = None) -> Tensor:
        """Logits of each view of x itself, no perturbation (L, B, K); differentiable.

        This is what an attacker of the undefended model (views = identity) or one who knows the
        views (None: this method's) works on. It runs on the model's modules.
        """
        batch, session = Batch(x, seeds), self.session
        with torch.autocast(x.device.type, enabled=False):
            if views is None:
                pictures = self.defense.pictures(session, batch)
            else:
                backend = session.backend
                seen = ops.make_views(x, None, seeds, views, fill=session.mean, backend=backend)
                pictures = seen.unflatten(0, (len(views), len(x)))
            parts = pictures.flatten(0, 1).split(256)
            features = torch.cat([session.reference.encode(part) for part in parts])
            return session.logits(features.unflatten(0, pictures.shape[:2]))

    def bpda_logits(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Logits (B, K), differentiable as if the repair were the identity (BPDA)."""
        logits = self.live(x, seeds).logits
        return logits if torch.is_grad_enabled() else logits.detach()

    # ------------------------------------------------------------------ what it costs, and when

    def plan(self, size: tuple[int, int] | None = None) -> Plan:
        """The passes that the method makes for pictures (height, width); None: the encoder's."""
        plan = self.defense.plan(self.session, self._size(size))
        if plan is None:
            raise RuntimeError(f"plan() is not to be had of {_not_planned(self.method)}")
        return plan

    def cost(self) -> Cost:
        """What one picture costs the encoder: FLOPs, bytes of weights, memory."""
        return self.session.cost

    def memory_estimate(self, batch: int, size: tuple[int, int] | None = None) -> int:
        """About how many bytes a call with `batch` images takes at its peak, beyond the weights.

        Args:
            batch: images; more than max_batch allows at once are split, and counted so.
            size: their (height, width); None: the encoder's.
        """
        batch = whole("batch", batch, 0, of=" of images")
        size = self._size(size)
        piece = min(batch, self._piece(size))
        at_once = self.session.memory(self.plan(size), piece, size)
        # Of the images before and after: pixels, δ and logits.
        rest = 4 * (2 * 3 * size[0] * size[1] + len(self.text_features))
        return at_once + (batch - piece) * rest

    def warmup(self, batch: int = 1) -> float:
        """Make the first call like the later ones: compile, capture and fill caches.

        With graphs and a gate every bucket up to `batch` is captured: flagged images alone may
        need the smaller ones. Call it before threads that synchronise the device on their own.
        Compiled kernels stay on disk for the next process (Triton's and Inductor's caches); graphs
        belong to this one.

        Returns:
            The seconds that it took.
        """
        batch = whole("batch", batch, 1, of=" of images")
        began = time.perf_counter()
        largest = min(batch, self._piece(self.session.size))
        sizes = [largest]
        while self.engine == "graph" and self.defense.repairs == "flagged" and sizes[-1] > 1:
            sizes.append((sizes[-1] + 1) // 2)
        for count in with_progress(sizes, "warming up"):
            x = torch.full((count, 3, *self.session.size), 0.5, device=self.model.device)
            self(x, seeds=0)
        return time.perf_counter() - began

    def waterfall(self, images: Any, seeds: Seeds = 0) -> list[Stage]:
        """Where the time of one defense goes: its parts in order, of a batch's first piece.

        Graphs cannot be looked into: with them the same work is timed outside, launches included.

        Raises:
            ValueError, RuntimeError: an empty batch; backend="reference", which has no parts.
        """
        if not isinstance(self.defense, OnViews):
            raise RuntimeError(f"waterfall() is not to be had of {_not_planned(self.method)}")
        if self.backend == "reference":
            raise RuntimeError('waterfall times the engine; backend="reference" does not run it')
        with plain(self.model.device):
            x = to_batch(images, self.model)
            if len(x) == 0:
                raise ValueError("images: an empty batch has no times")
            batch = Batch(x, image_seeds(seeds, len(x), x.device))
            first = next(iter(drive.pieces(self.session, self.defense, batch, self.max_batch)))
            return waterfall(self.session.now(), self.defense, first)

    def _size(self, size: Any) -> tuple[int, int]:
        """(height, width) checked; None is the encoder's."""
        if size is None:
            return self.session.size
        pair = tuple(map(python_number, size)) if isinstance(size, list | tuple) else ()
        if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
            raise ValueError(f"size must be (height, width) in pixels or None, got {shown(size)}")
        return pair[0], pair[1]

    def _piece(self, size: tuple[int, int]) -> int:
        return drive.piece_size(self.session, self.defense, size, self.max_batch)

    def _default_max_batch(self) -> int:
        if self.model.device.type != "cuda":
            return 64
        free, size, pictures = free_memory(self.model.device), self.session.size, 1024
        views = self.defense.width(self.session, size)
        plan = self.defense.plan(self.session, size)
        if plan is None:  # a pass of all that is held together
            plan = ascent_plan(self.method, views, int(self.traits.gradients), 0, False)
        try:
            while free and pictures > views:
                if self.session.memory(plan, pictures // views, size) <= free // 2:
                    break
                pictures //= 2
        except RuntimeError:  # a model whose cost cannot be counted
            return 64
        return pictures


def make_defense(
    spec: str, model: Any, classes: Sequence[str] | None = None, **options: Any
) -> Defender:
    """The Defender of a spec such as "scc" or "ttc:steps=5:tau=0.1".

    Args:
        spec: see scc_fast.defenses.parse_defense.
        model, classes, options: as for Defender.

    Raises:
        ValueError, TypeError: naming the argument, what came and what would be right.
    """
    name, config = parse_defense(spec)
    return Defender(model, classes, method=name, config=config, **options)


@explained
def defend(
    images: Any,
    model: Any = "tiny",
    classes: Sequence[str] | None = None,
    *,
    seeds: Seeds = None,
    is_normalized: bool = False,
    clamp: bool = False,
    **options: Any,
) -> DefenseResult:
    """Defend images in one call; `options` are Defender's.

    Text embeddings are computed once per (model, classes) and kept as long as the model lives.

    Example:
        >>> import scc_fast
        >>> model = scc_fast.load_model("tiny")
        >>> result = scc_fast.defend("dog.png", model, classes=["a dog", "a wolf"])
    """
    defender = Defender(model, classes, **options)
    return defender(images, seeds, is_normalized=is_normalized, clamp=clamp)


def _warn_of_views(method: str, config: Any) -> None:
    """Tell who may still mean the average of SCC's views by "tte"."""
    old = isinstance(config, dict) and not {"views", "sigma"}.isdisjoint(config)
    if method == "tte" and (config is None or old or type(config) is ViewsConfig):
        warn(
            'method="tte" is the published TTE (arXiv 2107.14110); the average of SCC\'s views, '
            'which it was, is method="views"; config={} silences this',
            DeprecationWarning,
        )


def _not_planned(method: str) -> str:
    planned = ", ".join(name for name, kind in DEFENSES.items() if kind.captures)
    return f"method={method!r}, which is no plan of passes; it is of {planned}"
