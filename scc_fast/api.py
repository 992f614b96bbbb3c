"""defend() and Defender."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scc_fast import _classes, ops
from scc_fast._arguments import explained
from scc_fast._plain import plain
from scc_fast._warn import warn
from scc_fast.config import (
    METHODS,
    MethodConfig,
    NoneConfig,
    RNConfig,
    SCCConfig,
    TTCConfig,
    View,
    ViewsConfig,
    method_config,
    one_of,
    resolve_views,
    whole,
)
from scc_fast.engine import calls, methods, serve
from scc_fast.engine.calls import Seeds, image_seeds
from scc_fast.engine.cost import Cost
from scc_fast.engine.differentiable import Encode
from scc_fast.engine.encoder import Modules
from scc_fast.engine.plan import Plan, plan_of
from scc_fast.engine.serve import Engine, Stage
from scc_fast.engine.snapshot import snapshot_of
from scc_fast.images import to_batch
from scc_fast.models import VisionLanguage, with_progress
from scc_fast.reference import baselines, heads, step
from scc_fast.reference.heads import Classes
from scc_fast.reference.scc import scc
from scc_fast.reference.ttc import Outcome, Setting, look, ttc
from scc_fast.reference.views import preprocess
from scc_fast.result import DefenseResult

if TYPE_CHECKING:
    from scc_fast.defenses import Defense

# The methods beside METHODS, by name. scc_fast.defenses stands above and registers them here.
DEFENSES: dict[str, type[Defense]] = {}

# nn.Module's, which a Defender is not.
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
        method: "scc", "ttc", "views", "rn" or "none", which the engine serves pass by pass, or any
            other of scc_fast.defenses, such as "tte" or "r_tpt", on the same encoder.
        config: the method's config object or a dict of some of its fields. What is left out is the
            model's own default where it carries one (the bundled one does for "scc"), else the
            published value.
        precision: of the encoder's products: "fp32", "bf16" or "fp16"; δ, the residual stream and
            the heads stay float32. "auto" is that of the model's weights, and on a GPU "bf16" for
            weights in float32. Calls with gradients on are in that of the weights.
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
        self.method = one_of("method", method, (*METHODS, *DEFENSES))
        _warn_of_views(method, config)
        self.config = self._configured(config)
        one_of("precision", precision, ("auto", *serve.PRECISIONS))
        backend = "auto" if backend is None else backend
        one_of("backend", backend, ("auto", *ops.BACKENDS))
        one_of("engine", engine, serve.ENGINES)
        if max_batch is not None:
            max_batch = whole("max_batch", max_batch, 1, 2**31, " of pictures")
        self._asked = precision, backend, engine, max_batch
        self.classes = _classes.checked(classes)
        self.snapshot = snapshot_of(self.model)
        with plain(self.snapshot.device):
            text = _classes.embedded(self.model, self.snapshot, self.classes, text_features)
            self._classes = Classes(text, *_classes.scale_of(self.snapshot))
        self._judge: Defender | None = None
        original = getattr(self.model, "original", None)
        if original is not None and self.has_gate:
            # Of a fine-tuned encoder the gate looks through the one that it was tuned from (TTC).
            alike: dict[str, Any] = {"precision": precision, "backend": backend, "engine": engine}
            self._judge = Defender(original, text_features=text, method="none", **alike)
        self._build()

    def _build(self) -> None:
        """Make what runs on the snapshot and the classes; it is not copied or pickled."""
        precision, backend, engine, max_batch = self._asked
        model, asked = self.model, None if backend == "auto" else backend
        self.backend = methods.served_by(self.snapshot.device, asked)
        self._engine = Engine(self.snapshot, engine, precision, asked, self.backend)
        self.engine, self.precision = self._engine.name, self._engine.precision
        with plain(self.snapshot.device):
            mean, std = (
                torch.tensor(three, dtype=torch.float32, device=self.snapshot.device)
                for three in (model.mean, model.std)
            )
            table = ops.ClassTable.of(self._classes)
        pixels = Pixels(self.snapshot, model.image_size, mean, std)
        self._reference = Setting(pixels, self._classes, mean)
        insists = engine if engine in ("runner", "graph") else ""
        self.setting = methods.Setting.of(
            model, self._engine.encoder, table, asked, Modules(self.snapshot), insists
        )
        self._defense: Defense | None = None
        self.max_batch = self._default_max_batch() if max_batch is None else max_batch
        self.gate_encoder = None if self._judge is None else Encode(self._judge.setting)
        self._defense = self._made()
        if self._defense is not None:
            if engine == "graph":
                self._refuse("engine='graph'")
            self.engine = self._defense.serves(self.model.image_size)

    def __getstate__(self) -> dict[str, Any]:
        made = ("_engine", "_reference", "setting", "gate_encoder", "_defense")
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

    def variant(self, config: MethodConfig, method: str | None = None) -> Defender:
        """The same encoder and classes with another config, or another method."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))  # copy.copy() would build the engine anew
        other.method = self.method if method is None else method
        other.config = other._configured(config)
        other._defense = other._made()
        return other

    def _configured(self, config: MethodConfig | dict[str, Any] | None) -> MethodConfig:
        kind = DEFENSES[self.method].Config if self.method in DEFENSES else None
        return method_config(self.model.defaults, self.method, config, kind)

    def _made(self) -> Defense | None:
        if self.method not in DEFENSES:
            return None
        bare = self.variant(NoneConfig(), "none")
        return DEFENSES[self.method](self.model, self.classes, config=self.config, bare=bare)

    def _refuse(self, what: str) -> None:
        if self._defense is not None:
            raise RuntimeError(
                f"{what} is not to be had of method={self.method!r}, which is no plan of passes; "
                f"it is of {', '.join(METHODS)}"
            )

    @property
    def has_gate(self) -> bool:
        """Whether TTC's or SCC's gate decides which images are repaired."""
        config = self.config
        return isinstance(config, SCCConfig | TTCConfig) and methods.has_gate(config)

    @property
    def is_randomized(self) -> bool:
        """Whether the method draws noise, so that seeds matter."""
        if self._defense is not None:
            return self._defense.traits.random
        if self.method in ("none", "views"):
            return any(view.noise > 0 for view in self.views(32))
        return True

    @property
    def text_features(self) -> Tensor:
        """The K text embeddings in use, (K, D) float32, unit length."""
        return self._classes.text

    @property
    def table(self) -> Classes:
        """The text embeddings with the logit scale and bias."""
        return self._classes

    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D), not normalised, of pixels (B, 3, H, W) in [0, 1]: φ, then f."""
        return self._reference.encode(pixels)

    def views(self, size: int) -> tuple[View, ...]:
        """The views this method averages over, for images whose shorter side is `size`."""
        self._refuse("views()")
        config = self.config
        if isinstance(config, SCCConfig) and not config.spatial:
            return (View(),)
        if isinstance(config, SCCConfig | ViewsConfig):
            flip = self.model.flip if config.flip is None else config.flip
            return resolve_views(config.views, size, flip=flip, sigma=config.sigma)
        return (View(),)

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
        return calls.call(self, images, seeds, is_normalized=is_normalized, clamp=clamp)

    def serves(self, size: tuple[int, int]) -> str:
        """The engine that serves pictures (height, width)."""
        if self._defense is not None:
            return self._defense.serves(size)
        return "eager" if self.setting.mistrust else self._engine.serves(size)

    def out_of_memory(self, x: Tensor) -> RuntimeError:
        """What a call raises where x, one of its pieces, did not fit."""
        if self._defense is not None:
            return self._defense.out_of_memory(x)
        return serve.out_of_memory(x, len(self.views(min(x.shape[-2:]))), self.memory_estimate)

    def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """x and seeds in pieces of at most max_batch views, but at least one image."""
        size = self._piece((x.shape[-2], x.shape[-1]))
        return zip(x.split(size), seeds.split(size), strict=True)

    def _piece(self, size: tuple[int, int]) -> int:
        together = self._defense.width if self._defense else len(self.views(min(size)))
        piece = max(1, self.max_batch // together)
        # A graph's bucket would be filled up beyond it.
        return 1 << (piece.bit_length() - 1) if self.serves(size) == "graph" else piece

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        """The method itself on x (B, 3, H, W) in [0, 1], seeds (B,): unchecked, not split.

        Follows the caller's autograd mode: with gradients on, the logits are differentiable with
        respect to x.
        """
        config, setting, defense = self.config, self._reference, self._defense
        if len(x) == 0:
            rows = x.new_zeros(0)
            return Outcome(x.new_zeros(0, len(self._classes.text)), x, rows, rows.bool())
        if defense is not None:
            if not torch.is_grad_enabled():
                return defense.run(x, seeds)
            with _no_autocast(x.device):
                found = defense.repair(x, seeds)
                return Outcome(defense.answer(found), found.delta, found.drift, found.flagged)
        if self.gate_encoder is not None and self.has_gate:
            return self._judged(x, seeds, self.gate_encoder)
        views = self.views(min(x.shape[-2:]))
        with _no_autocast(x.device):
            if self.backend != "reference" and not torch.is_grad_enabled():
                return self._engine.run(self.setting, config, x, seeds, views)
            match config:
                case SCCConfig():
                    return scc(setting, x, seeds, views, config)
                case TTCConfig():
                    return ttc(setting, x, seeds, config)
                case ViewsConfig():
                    return baselines.views(setting, x, seeds, views)
                case RNConfig():
                    return baselines.rn(setting, x, seeds, config)
            return baselines.none(setting, x, seeds)

    def _judged(self, x: Tensor, seeds: Tensor, encode: Encode) -> Outcome:
        """The method with τ from another encoder: what it flags is repaired, all else kept."""
        config: Any = self.config
        with torch.no_grad(), _no_autocast(x.device):
            moved = x + step.initial_delta(x, seeds, config.epsilon)
            drift = heads.relative_drift(encode(moved), encode(x))
        flagged = drift < config.tau
        logits, delta = x.new_zeros(len(x), len(self._classes.text)), torch.zeros_like(x)
        for rows, tau in ((flagged, math.inf), (~flagged, 0.0)):
            if rows.any():
                other = self.variant(replace(config, tau=tau))
                other.gate_encoder = None
                found = other.run(x[rows], seeds[rows])
                logits[rows], delta[rows] = found.logits, found.delta
        return Outcome(logits, delta, drift, flagged)

    def view_logits(self, x: Tensor, seeds: Tensor, views: Sequence[View] | None = None) -> Tensor:
        """Logits of each view of x itself, no perturbation (L, B, K); differentiable.

        This is what an attacker of the undefended model (views = identity) or one who knows the
        views (None: this method's) works on. Of METHODS the prediction is their mean.
        """
        if views is None and self._defense is not None:
            with _no_autocast(x.device):
                pictures = self._defense.views(x, seeds)
                return self._defense.logits(self._defense.features(pictures))
        views = self.views(min(x.shape[-2:])) if views is None else views
        with _no_autocast(x.device):
            if self.backend == "reference":
                features = look(self._reference, x, seeds, views)
            else:
                modules = replace(self.setting, encoder=Modules(self.snapshot))  # under autograd
                features = methods.Sight(modules, x, seeds, views).look(None)
            return heads.logits(features, self._classes)

    def bpda_logits(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Logits (B, K), differentiable as if the repair were the identity (BPDA)."""
        if self._defense is not None:
            return self.run(x, seeds).logits
        with torch.no_grad():
            delta = self.run(x.detach(), seeds).delta
        return self.view_logits(x + delta, seeds).mean(dim=0)

    # ------------------------------------------------------------------ what it costs, and when

    def plan(self, size: tuple[int, int] | None = None) -> Plan:
        """The passes that the method makes for pictures (height, width); None: the encoder's."""
        self._refuse("plan()")
        sides = serve.size_of(size, self.model)
        return plan_of(self.config, len(self.views(min(sides))))

    def cost(self) -> Cost:
        """What one picture costs the encoder: FLOPs, bytes of weights, memory."""
        return self._engine.cost

    def memory_estimate(self, batch: int, size: tuple[int, int] | None = None) -> int:
        """About how many bytes a call with `batch` images takes at its peak, beyond the weights.

        Args:
            batch: images; more than max_batch allows at once are split, and counted so.
            size: their (height, width); None: the encoder's.
        """
        batch = whole("batch", batch, 0, of=" of images")
        size = serve.size_of(size, self.model)
        piece = min(batch, self._piece(size))
        at_once = self._engine.memory(self.plan(size), piece, size, len(self._classes.text))
        # Of the images before and after: pixels, δ and logits.
        rest = 4 * (2 * 3 * size[0] * size[1] + len(self._classes.text))
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
        largest = min(batch, self._piece(self.model.image_size))
        sizes = [largest]
        while self.engine == "graph" and self.has_gate and sizes[-1] > 1:
            sizes.append((sizes[-1] + 1) // 2)
        for count in with_progress(sizes, "warming up"):
            x = torch.full((count, 3, *self.model.image_size), 0.5, device=self.model.device)
            self(x, seeds=0)
        return time.perf_counter() - began

    def waterfall(self, images: Any, seeds: Seeds = 0) -> list[Stage]:
        """Where the time of one defense goes: its parts in order, of a batch's first piece.

        Graphs cannot be looked into: with them the same work is timed outside, launches included.

        Raises:
            ValueError, RuntimeError: an empty batch; backend="reference", which has no parts.
        """
        self._refuse("waterfall()")
        if self.backend == "reference":
            raise RuntimeError('waterfall times the engine; backend="reference" does not run it')
        with plain(self.model.device):
            x = to_batch(images, self.model)
            if len(x) == 0:
                raise ValueError("images: an empty batch has no times")
            x, keys = next(iter(self.pieces(x, image_seeds(seeds, len(x), x.device))))
            views = self.views(min(x.shape[-2:]))
            return self._engine.waterfall(self.setting, self.config, x, keys, views)

    def _default_max_batch(self) -> int:
        if self.model.device.type != "cuda":
            return 64
        free = serve.free_memory(self.model.device)
        views, self.max_batch = len(self.views(min(self.model.image_size))), 1024
        try:
            while free and self.max_batch > views:
                if self.memory_estimate(self.max_batch // views) <= free // 2:
                    break
                self.max_batch //= 2
        except RuntimeError:  # a model whose cost cannot be counted
            return 64
        return self.max_batch


@dataclass(frozen=True, eq=False)
class Pixels:
    """A snapshot's encoder as a function of pixels (B, 3, H, W) in [0, 1]: φ, then f."""

    snapshot: VisionLanguage
    size: tuple[int, int]
    mean: Tensor
    std: Tensor

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.snapshot.encode_image(preprocess(pixels, self.size, self.mean, self.std))


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
    if method == "tte" and (config is None or old or isinstance(config, ViewsConfig)):
        warn(
            'method="tte" is the published TTE (arXiv 2107.14110); the average of SCC\'s views, '
            'which it was, is method="views"; config={} silences this',
            DeprecationWarning,
        )


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
