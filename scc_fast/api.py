"""defend(), Defender and DefendedCLIP."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scc_fast import _classes, ops
from scc_fast.config import (
    MethodConfig,
    NoneConfig,
    RNConfig,
    SCCConfig,
    TTCConfig,
    TTEConfig,
    View,
    resolve_views,
)
from scc_fast.engine import eager
from scc_fast.images import to_batch
from scc_fast.models import VisionLanguage
from scc_fast.reference import baselines, heads, philox
from scc_fast.reference.heads import Classes
from scc_fast.reference.scc import scc
from scc_fast.reference.ttc import Outcome, Setting, look, ttc
from scc_fast.reference.views import preprocess
from scc_fast.result import DefenseResult

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
METHODS: dict[str, type[MethodConfig]] = {
    "scc": SCCConfig,
    "ttc": TTCConfig,
    "tte": TTEConfig,
    "rn": RNConfig,
    "none": NoneConfig,
}
Seeds = int | Tensor | None


class Defender:
    """A defense prepared once for a model and its classes, and called often.

    Thread-safe: a call shares nothing with another but frozen weights and text embeddings. The
    weights are taken as they are now: make another Defender after training or moving the model.

    Args:
        model: what load_model() returns, or anything it accepts.
        classes: K >= 2 prompts such as "a photo of a dog", used as they are. Duplicates are
            allowed and never count as each other's negative.
        text_features: (K, D) text embeddings instead of `classes`; scaled to unit length.
        method: "scc", "ttc", "tte", "rn" or "none".
        config: the method's config object or a dict of some of its fields. None takes the
            model's own defaults where it carries some (the bundled one does), else METHOD.md's.
        precision: that of the model's weights ("fp32", unless it was loaded otherwise), or "auto".
        backend: who serves the ops: "cpp", "triton", "reference" (plain PyTorch throughout), or
            "auto", for each op the best that is there (scc-fast doctor shows which). Calls with
            gradients on, such as an attacker's, always take the reference, which computes the
            same defense differentiably.
        engine: who runs the encoder: "eager", the model's own modules; "runner", ours for
            open_clip's standard vision transformers in float32 on a CPU, without an autograd
            graph; "auto", the runner where it can serve. Pictures of another size than the
            encoder's, and calls with gradients on, are served by the modules.
        max_batch: the encoder sees at most this many pictures at once, an image's views counted
            one by one; larger batches are split.

    Raises:
        ValueError, TypeError: naming the argument, what came and what would be right.
        RuntimeError: an explicitly requested precision, backend or engine is not to be had.
    """

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
        max_batch: int = 64,
    ) -> None:
        self.model = _classes.as_model(model)
        self.method = _one_of("method", method, tuple(METHODS))
        self.config = method_config(self.model, method, config)
        dtype = getattr(self.model, "dtype", torch.float32)
        if dtype not in _PRECISIONS:
            raise ValueError(f"model: its dtype must be one of {list(_PRECISIONS)}, got {dtype!r}")
        held = _PRECISIONS[dtype]
        others = tuple(name for name in _PRECISIONS.values() if name != held)
        self.precision = _served("precision", precision, held, others)
        backend = "auto" if backend is None else backend
        _one_of("backend", backend, ("auto", *ops.BACKENDS))
        self.backend = eager.served_by(self.model.device, None if backend == "auto" else backend)
        _one_of("engine", engine, ("auto", "eager", "runner", "compile", "graph"))
        tower = eager.runner_of(self.model, engine, self.backend)
        self.engine = "eager" if tower is None else "runner"
        if type(max_batch) is not int or max_batch < 1:
            raise ValueError(f"max_batch must be a whole number of images >= 1, got {max_batch!r}")
        self.max_batch = max_batch
        self.classes = _classes.checked(classes)
        with torch.inference_mode(False), torch.no_grad():
            text = _classes.embedded(self.model, self.classes, text_features)
            self._classes = Classes(text, self.model.logit_scale, self.model.logit_bias)
            self._mean = torch.tensor(self.model.mean, device=self.model.device)
            self._std = torch.tensor(self.model.std, device=self.model.device)
            table = ops.ClassTable.of(self._classes)
        self._setting = Setting(self.encode, self._classes, self._mean)
        self._fast = eager.Setting(
            self.model, table, self._mean, self._std, None if backend == "auto" else backend, tower
        )

    @property
    def is_randomized(self) -> bool:
        """Whether the method draws noise, so that seeds matter."""
        if self.method in ("none", "tte"):
            return any(view.noise > 0 for view in self.views(32))
        return True

    @property
    def text_features(self) -> Tensor:
        """The K text embeddings in use, (K, D) float32, unit length."""
        return self._classes.text

    def encode(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D), not normalised, of pixels (B, 3, H, W) in [0, 1]: φ, then f."""
        return self.model.encode_image(
            preprocess(pixels, self.model.image_size, self._mean, self._std)
        )

    def views(self, size: int) -> tuple[View, ...]:
        """The views this method averages over, for images whose shorter side is `size`."""
        config = self.config
        if isinstance(config, SCCConfig) and not config.spatial:
            return (View(),)
        if isinstance(config, SCCConfig | TTEConfig):
            flip = self.model.flip if config.flip is None else config.flip
            return resolve_views(config.views, size, flip=flip, sigma=config.sigma)
        return (View(),)

    def __call__(
        self, images: Any, seeds: Seeds = None, *, is_normalized: bool = False
    ) -> DefenseResult:
        """Defend a batch.

        Args:
            images: float (B, 3, H, W) in [0, 1], uint8 of the same shape, PIL image(s), path(s).
            seeds: None draws fresh ones; an int seeds image i with (seed, i); or (B,) int64.
            is_normalized: the tensor has been through (x − mean)/std, which is undone first.

        Returns:
            DefenseResult. Image i depends on its pixels and its seed alone (a matrix product may
            round its logits differently in another batch).
        """
        started = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(self.model.device):
            x = to_batch(images, self.model, is_normalized=is_normalized)
            if isinstance(images, Tensor) and x.data_ptr() == images.data_ptr():
                x = x.clone()  # the result keeps its inputs; the caller may reuse the buffer
            keys = image_seeds(seeds, len(x), x.device)
            if keys is seeds:
                keys = keys.clone()
            loaded = time.perf_counter()
            parts = [
                _result(self, self.run(piece, key), piece, key)
                for piece, key in self.pieces(x, keys)
            ]
        result = DefenseResult.concatenate(parts)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        done = time.perf_counter()
        result.timings.update(input=loaded - started, defense=done - loaded, total=done - started)
        return result

    def pieces(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """x and seeds in pieces of which the encoder sees at most max_batch views at once."""
        views = self.views(min(x.shape[-2:]))
        size = max(1, self.max_batch // len(views))
        return zip(x.split(size), seeds.split(size), strict=True)

    def run(self, x: Tensor, seeds: Tensor) -> Outcome:
        """The method itself on x (B, 3, H, W) in [0, 1], seeds (B,): unchecked, not split.

        Follows the caller's autograd mode: with gradients on, the logits are differentiable with
        respect to x.
        """
        config, setting = self.config, self._setting
        if len(x) == 0:
            rows = x.new_zeros(0)
            return Outcome(x.new_zeros(0, len(self._classes.text)), x, rows, rows.bool())
        views = self.views(min(x.shape[-2:]))
        with _no_autocast(x.device):
            if self.backend != "reference" and not torch.is_grad_enabled():
                return self._run_on_ops(eager.Sight(self._fast, x.contiguous(), seeds, views))
            match config:
                case SCCConfig():
                    return scc(setting, x, seeds, views, config)
                case TTCConfig():
                    return ttc(setting, x, seeds, config)
                case TTEConfig():
                    return baselines.tte(setting, x, seeds, views)
                case RNConfig():
                    return baselines.rn(setting, x, seeds, config)
            return baselines.none(setting, x, seeds)

    def _run_on_ops(self, sight: eager.Sight) -> Outcome:
        match self.config:
            case SCCConfig():
                return eager.scc(sight, self.config)
            case TTCConfig():
                return eager.ttc(sight, self.config)
            case RNConfig():
                return eager.control(sight, self.config)
        return eager.control(sight, None)

    def view_logits(self, x: Tensor, seeds: Tensor, views: Sequence[View] | None = None) -> Tensor:
        """Logits of each view of x itself, no perturbation (L, B, K); differentiable.

        This is what an attacker of the undefended model (views = identity) or one who knows the
        views (None: this method's) works on. A method's own prediction is their mean.
        """
        views = self.views(min(x.shape[-2:])) if views is None else views
        with _no_autocast(x.device):
            if self.backend == "reference":
                features = look(self._setting, x, seeds, views)
            else:
                modules = replace(self._fast, tower=None)  # the runner has no gradient
                features = eager.Sight(modules, x, seeds, views).look(None)
            return heads.logits(features, self._classes)


def defend(
    images: Any,
    model: Any = "tiny",
    classes: Sequence[str] | None = None,
    *,
    seeds: Seeds = None,
    is_normalized: bool = False,
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
    return defender(images, seeds, is_normalized=is_normalized)


def image_seeds(seeds: Seeds, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """The (B,) int64 seeds a call with this `seeds` argument uses."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.shape != (batch,):
            raise ValueError(
                f"seeds must be an int64 tensor of shape ({batch},), one per image; got "
                f"{seeds.dtype} of shape {tuple(seeds.shape)}"
            )
    elif seeds is not None and type(seeds) is not int:
        raise TypeError(f"seeds must be None, an int or an int64 tensor, got {seeds!r}")
    elif seeds is not None and not -(1 << 63) <= seeds < 1 << 64:
        raise ValueError(f"seeds must fit into 64 bits, got {seeds}")
    return philox.image_seeds(seeds, batch, device)


def method_config(
    model: VisionLanguage, method: str, config: MethodConfig | dict[str, Any] | None
) -> MethodConfig:
    """The config a Defender of this model uses for `method`."""
    kind = METHODS[method]
    if isinstance(config, MethodConfig):
        if not isinstance(config, kind):
            raise TypeError(
                f"config must be a {kind.__name__} for method={method!r}, "
                f"got {type(config).__name__}"
            )
        return config
    if config is not None and not isinstance(config, dict):
        raise TypeError(f"config must be a {kind.__name__}, a dict or None, got {config!r}")
    return kind.from_dict({**model.defaults.get(method, {}), **(config or {})})


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def _served(name: str, value: str, only: str, later: tuple[str, ...]) -> str:
    _one_of(name, value, ("auto", only, *later))
    if value in later:
        raise RuntimeError(
            f"{name}={value!r} cannot serve a whole defense in this version; "
            f'use {name}="{only}" or "auto" (scc-fast doctor shows what each op can use)'
        )
    return only


def _result(defender: Defender, outcome: Outcome, x: Tensor, seeds: Tensor) -> DefenseResult:
    size = tuple(defender.model.image_size)
    return DefenseResult(
        logits=outcome.logits,
        delta=outcome.delta,
        inputs=x,
        drift=outcome.drift,
        flagged=outcome.flagged,
        seeds=seeds,
        method=defender.method,
        backend=defender.backend,
        engine=defender.engine if tuple(x.shape[-2:]) == size else "eager",
    )


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


class DefendedCLIP(nn.Module):
    """A defended classifier as a module: images (B, 3, H, W) in [0, 1] -> logits (B, K).

    For AutoAttack, ART or any loop. Attack tools cannot see through a test-time defense by
    themselves, so `gradient` says what they get:

    - "through": the true gradient of the defended logits as they are computed. The sign steps
      have zero derivative almost everywhere, so what remains is the gradient at the defended
      pixels through the projections.
    - "bpda": the gradient at the defended pixels, passed on as if the repair were the identity.
    - "identity": the undefended model's gradient at x, beside defended logits.

    Args:
        defender: the prepared defense.
        gradient: see above.
        seed: an int makes the module a function of the image alone (every image gets this seed);
            None draws fresh noise at every call.
    """

    is_dynamic = True  # it optimises at inference, whether or not a tool can trace that

    def __init__(
        self,
        defender: Defender,
        gradient: Literal["through", "bpda", "identity"] = "through",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.defender = defender
        self.gradient = _one_of("gradient", gradient, ("through", "bpda", "identity"))
        image_seeds(seed, 0)  # refuses what is no seed
        self.seed = seed
        # Registered so that tools which ask for parameters, modes or the device find the encoder.
        self.encoder = getattr(defender.model, "module", None)
        self.eval()

    @property
    def is_randomized(self) -> bool:
        """Whether two calls on the same image can differ."""
        return self.seed is None and self.defender.is_randomized

    def train(self, mode: bool = True) -> DefendedCLIP:
        """Stays in eval mode: attack libraries flip modes, and the encoder must not follow."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> DefendedCLIP:
        """Stays on its model's device and dtype: the encoder is shared with the Defender."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K), differentiable with respect to images where gradients are on."""
        x = to_batch(images, self.defender.model, keep_graph=True)
        if self.seed is None:
            seeds = image_seeds(None, len(x), x.device)
        else:
            seeds = image_seeds(self.seed, 1, x.device).expand(len(x))
        live = torch.is_grad_enabled() and x.requires_grad
        # inference_mode(False) turns gradients on by itself.
        with torch.inference_mode(False), torch.set_grad_enabled(live):
            pieces = self.defender.pieces(x, seeds)
            return torch.cat([self._logits(piece, key, live) for piece, key in pieces])

    def _logits(self, x: Tensor, seeds: Tensor, live: bool) -> Tensor:
        if not live or self.gradient == "through":
            return self.defender.run(x, seeds).logits
        with torch.no_grad():
            outcome = self.defender.run(x.detach(), seeds)
        if self.gradient == "bpda":
            return self.defender.view_logits(x + outcome.delta, seeds).mean(dim=0)
        bare = self.defender.view_logits(x, seeds, (View(),))[0]
        return outcome.logits + (bare - bare.detach())
