"""Defender, a prepared defense, and defend(), one call of it."""

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

# Methods of nn.Module that a Defender lacks.
_MOVES = ("to", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "to_empty")


class Defender:
    """Defense prepared for a model and its classes. Thread-safe.

    It uses a snapshot of the model: image tower, text embeddings and logit scale as they are now.
    Later changes of the model have no effect until refresh(). Defenders of a model with the same
    weights share one snapshot, a copy of the image tower (engine/snapshot.py). A model that is not
    an adapter of load_model() has no snapshot: its encode_image is called directly.

    Args:
        model: a result of load_model(), or anything it accepts.
        classes: K >= 2 prompts such as "a photo of a dog", used as they are. Duplicates are
            allowed and are not each other's negative.
        text_features: (K, D) text embeddings instead of `classes`; normalised.
        method: one of scc_fast.defenses.DEFENSES: "scc", "ttc", "views", "rn", "none", "tte",
            "anti_adv", "hd", "doc", "r_tpt", "csr", "dbd", "mac", "agc" or
            "extrapolate".
        config: the method's config, or a dict of some of its fields. Other fields take the model's
            default (the bundled model has some for "scc"), else the published value.
        precision: of the encoder's products: "fp32", "bf16" or "fp16"; δ, the residual stream and
            the heads are float32. "auto": the weights' precision, but "bf16" for float32 weights
            on a GPU. Calls with gradients use the weights' precision; live() and bpda_logits()
            the engine's.
        backend: of the ops: "cpp", "triton", "reference" (plain PyTorch throughout), or "auto",
            the best available for each op (see scc-fast doctor). Calls with gradients always use
            the differentiable reference.
        engine: of the encoder: "eager", the model's modules; "compile", the same through
            torch.compile; "runner", our vision transformer without autograd (open_clip,
            transformers CLIP and SigLIP); "graph", the whole defense as CUDA graphs, one per power
            of two of the batch. "auto": graphs on a GPU, the runner on a CPU, the modules for
            other models. Calls with gradients use the modules; pictures of another size than the
            encoder's are served without graphs.
        max_batch: number of views in the encoder at once; larger batches are split, but never one
            image's views. (The first pass adds each image itself.) None: 64 on a CPU; on a GPU
            1024, or as many as fit into half of the free memory.

    Raises:
        ValueError, TypeError: an invalid argument.
        ValueError: non-finite weights, text embeddings or logit scale.
        RuntimeError: a precision, backend or engine named here is not available. Calls raise it,
            too, if the named runner no longer matches the modules (a hook was added, a method
            replaced).
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
            raise RuntimeError(f"engine='graph' is not available for {_not_planned(method)}")
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
            # The gate of a fine-tuned encoder uses the original encoder (TTC).
            alike: dict[str, Any] = {"precision": precision, "backend": backend, "engine": engine}
            self._judge = Defender(original, text_features=text, method="none", **alike)
        self._build()

    def _build(self) -> None:
        """Build session and defense, which are not copied or pickled."""
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
        """Take a new snapshot of weights, text embeddings and logit scale.

        Running calls of other threads end on the old one.

        Raises:
            ValueError, TypeError, RuntimeError: as the constructor; the Defender is unchanged.
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
        """Whether a gate decides which images count as attacked."""
        return self.defense.has_gate

    @property
    def is_randomized(self) -> bool:
        """Whether the method draws noise."""
        return self.traits.random

    @property
    def traits(self) -> Traits:
        """Cost and requirements of the method."""
        return self.defense.traits(self.session)

    @property
    def text_features(self) -> Tensor:
        """Text embeddings (K, D), float32, unit length."""
        return self.session.classes.text

    @property
    def table(self) -> Classes:
        """Text embeddings with logit scale and bias."""
        return self.session.classes

    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D), not normalised, of pixels (B, 3, H, W) in [0, 1]: f(φ(x))."""
        return self.session.reference.encode(pixels)

    def views(self, size: int) -> tuple[View, ...]:
        """Views that the method averages, for images with a shorter side of `size` pixels."""
        if not isinstance(self.defense, OnViews):
            raise RuntimeError(f"views() is not available for {_not_planned(self.method)}")
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
            seeds: None: fresh; an int: image i has (seed, i); or B whole numbers.
            is_normalized: the tensor is (x − mean)/std; this is undone first.
            clamp: clamp values outside [0, 1]; else more than 1e-6 outside raises ValueError.

        Returns:
            DefenseResult. Image i depends on its pixels and seed alone, up to the rounding of
            matrix products in another batch.
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
        """Engine for pictures (height, width)."""
        if self.session.mistrust:
            return "eager"
        return drive.serves(self.session, self.defense, size)

    def pieces(self, x: Tensor, seeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split x and seeds by max_batch."""
        found = drive.pieces(self.session, self.defense, Batch(x, seeds), self.max_batch)
        return [(piece.x, piece.seeds) for piece in found]

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        """Run the method on x (B, 3, H, W) in [0, 1], seeds (B,), without checks or splitting.

        With gradients on, the logits are differentiable with respect to x.
        """
        batch, session, defense = Batch(x, seeds), self.session, self.defense
        if not torch.is_grad_enabled():
            with plain(x.device):
                return drive.run(session.now(), defense, batch)
        with torch.autocast(x.device.type, enabled=False):
            found = defense.reference(session, batch) if len(x) else None
            return drive.live(session, defense, batch).outcome if found is None else found

    def live(self, x: Tensor, seeds: Tensor) -> drive.Live:
        """Run the method on x (B, 3, H, W), seeds (B,), differentiably with respect to x.

        The optimised δ counts as constant (BPDA). Uses the engine and precision of calls.
        """
        calm = torch.autocast(x.device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), calm:
            x, seeds = (one.clone() if one.is_inference() else one for one in (x, seeds))
            return drive.live(self.session, self.defense, Batch(x, seeds))

    def view_logits(self, x: Tensor, seeds: Tensor, views: Sequence[View] | None = None) -> Tensor:
        """Logits (L, B, K) of views of x without a perturbation; differentiable.

        For attacks on the undefended model (views = identity) or view-aware ones (None: the
        method's views). Runs on the model's modules.
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
        """Defended logits (B, K), with the repair's gradient taken as the identity (BPDA)."""
        logits = self.live(x, seeds).logits
        return logits if torch.is_grad_enabled() else logits.detach()

    # ---------------------------------------------------------------------------- cost and time

    def plan(self, size: tuple[int, int] | None = None) -> Plan:
        """Passes of the method for pictures (height, width); None: the encoder's size."""
        plan = self.defense.plan(self.session, self._size(size))
        if plan is None:
            raise RuntimeError(f"plan() is not available for {_not_planned(self.method)}")
        return plan

    def cost(self) -> Cost:
        """Cost of one picture in the encoder: FLOPs, bytes of weights, memory."""
        return self.session.cost

    def memory_estimate(self, batch: int, size: tuple[int, int] | None = None) -> int:
        """Estimated peak bytes of a call with `batch` images, beyond the weights.

        Args:
            batch: number of images; split by max_batch.
            size: their (height, width); None: the encoder's.
        """
        batch = whole("batch", batch, 0, of=" of images")
        size = self._size(size)
        piece = min(batch, self._piece(size))
        at_once = self.session.memory(self.plan(size), piece, size)
        # Pixels, δ and logits of the other images.
        rest = 4 * (2 * 3 * size[0] * size[1] + len(self.text_features))
        return at_once + (batch - piece) * rest

    def warmup(self, batch: int = 1) -> float:
        """Compile, capture and fill caches before the first call.

        With graphs and a gate all buckets up to `batch` are captured, for the flagged images. Call
        it before starting threads that synchronise the device. Compiled kernels stay in Triton's
        and Inductor's disk caches; graphs are per process.

        Returns:
            Seconds taken.
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
        """Time of each part of a defense, in order, for a batch's first piece.

        With graphs the same work is timed outside of them, including launches.

        Raises:
            ValueError: empty batch.
            RuntimeError: backend="reference", or a method without a plan.
        """
        if not isinstance(self.defense, OnViews):
            raise RuntimeError(f"waterfall() is not available for {_not_planned(self.method)}")
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
        """(height, width), checked; None: the encoder's."""
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
        if plan is None:  # one pass of all views
            plan = ascent_plan(self.method, views, int(self.traits.gradients), 0, False)
        try:
            while free and pictures > views:
                if self.session.memory(plan, pictures // views, size) <= free // 2:
                    break
                pictures //= 2
        except RuntimeError:  # the model's cost is unknown
            return 64
        return pictures


def make_defense(
    spec: str, model: Any, classes: Sequence[str] | None = None, **options: Any
) -> Defender:
    """Make a Defender from a spec such as "scc" or "ttc:steps=5:tau=0.1".

    Args:
        spec: see scc_fast.defenses.parse_defense.
        model, classes, options: as for Defender.

    Raises:
        ValueError, TypeError: an invalid argument.
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

    Text embeddings are cached with the model.

    Example:
        >>> import scc_fast
        >>> model = scc_fast.load_model("tiny")
        >>> result = scc_fast.defend("dog.png", model, classes=["a dog", "a wolf"])
    """
    defender = Defender(model, classes, **options)
    return defender(images, seeds, is_normalized=is_normalized, clamp=clamp)


def _warn_of_views(method: str, config: Any) -> None:
    """Warn callers who may mean the average of SCC's views by "tte"."""
    old = isinstance(config, dict) and not {"views", "sigma"}.isdisjoint(config)
    if method == "tte" and (config is None or old or type(config) is ViewsConfig):
        warn(
            'method="tte" is the published TTE (arXiv 2107.14110); the average of SCC\'s views, '
            'which it was, is method="views"; config={} silences this',
            DeprecationWarning,
        )


def _not_planned(method: str) -> str:
    planned = ", ".join(name for name, kind in DEFENSES.items() if kind.captures)
    return f"method={method!r}, which has no plan of passes; available for {planned}"
