"""Batch and Views: images × views with forward, backward, sign step and heads, on the ops.

Methods are written on `Views`, which runs without autograd. `LiveViews` gives the same numbers,
differentiable once with respect to the images, for attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scc_fast import ops
from scc_fast.config import IDENTITY, View
from scc_fast.engine.encoder import Backward
from scc_fast.engine.opaque import opaque, transformed
from scc_fast.reference import heads, philox, step, warp
from scc_fast.reference.views import from_patches, preprocess, to_patches

if TYPE_CHECKING:
    from scc_fast.engine.session import Session

Undo = Callable[[Tensor, bool], Tensor]  # (gradient, retain) -> gradient


@dataclass(frozen=True, eq=False)
class Batch:
    """Images and their seeds.

    Args:
        x: (B, 3, H, W) float32 in [0, 1].
        seeds: (B,) int64.
    """

    x: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.x.shape[-2], self.x.shape[-1]

    def rows(self, index: Tensor) -> Batch:
        """Batch of some of the images."""
        return Batch(self.x[index], self.seeds[index])

    def still(self) -> Batch:
        """Batch without gradients."""
        return replace(self, x=self.x.detach())


def uniform_start(
    x: Tensor,
    seeds: Tensor,
    epsilon: float,
    purpose: int = philox.DELTA,
    counter: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Π(uniform(−ε, ε)) for x (B, 3, H, W), from each image's Philox stream of `purpose`."""
    numel = x.shape[1:].numel()
    uniform = ops.philox_uniform(seeds, purpose, counter, numel, backend=backend)
    return step.project((2 * uniform.view_as(x) - 1) * epsilon, x, epsilon)


def warped(x: Tensor, matrix: Tensor, backend: str | None = None, **rules: Any) -> Tensor:
    """Views (V, B, 3, H, W) of x through maps (V, B, 3, 3), differentiable in x.

    Args:
        rules: box or fill, and mode="bicubic", as ops.warp_views takes them.
    """
    if (torch.is_grad_enabled() and x.requires_grad) or transformed():
        plain = "mode" not in rules
        size = x.shape[-2], x.shape[-1]
        return (warp.bilinear if plain else warp.warp_views)(x, matrix, size, **rules)
    return ops.warp_views(x, matrix, backend=backend, **rules).unflatten(0, matrix.shape[:2])


def ascend(
    x: Tensor,
    delta: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    *,
    steps: int,
    alpha: float,
    epsilon: float,
) -> Tensor:
    """δ after signed ascent steps in the ball and the box, Π(δ + α·sign(g)).

    Args:
        x, delta: (B, 3, H, W).
        gradient: (δ, t) -> g, shaped like δ.
    """
    for t in range(steps):
        delta = step.pgd_step(delta, gradient(delta, t), x, alpha, epsilon)
    return delta


def gradient_of(objective: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
    """∂/∂δ of the sum of objective(δ), by autograd, at a constant δ."""
    with torch.enable_grad():
        leaf = delta.detach().requires_grad_()
        value = objective(leaf).sum()
    return torch.autograd.grad(value, leaf)[0]


class Views:
    """L views of a batch, bound to a session's encoder and ops."""

    def __init__(self, session: Session, batch: Batch, views: Sequence[View]) -> None:
        self.session, self.batch, self.views = session, batch, views

    def start(self, epsilon: float) -> Tensor:
        """δ⁰ (B, 3, H, W)."""
        batch, backend = self.batch, self.session.backend
        return uniform_start(batch.x.detach(), batch.seeds, epsilon, backend=backend)

    def forward(self, delta: Tensor | None) -> Tensor:
        """f of every view of x + δ, (L, B, D)."""
        pictures, _ = self._pictures(delta)
        self.session.mark("views")
        features = self._stacked(self.session.encoder.forward(pictures))
        self.session.mark("forward")
        return features

    def vjp(
        self, delta: Tensor | None, anchor: bool = False
    ) -> tuple[Tensor, Tensor | None, Backward]:
        """forward(), f(x) if `anchor`, and the backward closure.

        The closure maps ∂J/∂f (L·B, D) to the gradient for `step`.
        """
        pictures, undo = self._pictures(delta)
        beside = None
        if anchor:
            beside = Views(self.session, self.batch, (IDENTITY,))._pictures(None)[0]
        self.session.mark("views")
        features, plain, backward = self.session.encoder.vjp(pictures, beside)
        self.session.mark("forward")
        return self._stacked(features), plain, backward if undo is None else backward.then(undo)

    def pull(self, backward: Backward, slope: Tensor) -> Tensor:
        """Gradient for `step`, from ∂J/∂f (L, B, D)."""
        if self.session.encoder.products == torch.float16:
            # Scale each image by a power of two against underflow: only the sign matters.
            largest = slope.abs().amax(dim=(0, 2), keepdim=True).clamp_min(1e-30)
            slope = slope * torch.exp2(-torch.floor(torch.log2(largest)))
        gradient = backward(slope.flatten(0, 1))
        self.session.mark("backward")
        return gradient

    def answer(self, delta: Tensor, features: Tensor | None, strength: float = 1.0) -> Tensor:
        """Mean logits (B, K) of x + δ, from its features if known."""
        return self.logits(self.forward(delta) if features is None else features, strength)

    def step(
        self,
        delta: Tensor,
        gradient: Tensor,
        config: Any,
        weighted: Tensor | None = None,
        weight: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Step δ in place along the sign of the gradient; add weight · δ to `weighted`."""
        ops.pgd_step_(
            delta,
            gradient,
            self.batch.x,
            self.batch.seeds,
            self.views,
            alpha=config.alpha,
            epsilon=config.epsilon,
            weighted=weighted,
            weight=weight,
            patch=self.session.encoder.patch if self.fits else 0,
            backend=self.session.backend,
        )
        self.session.mark("step")
        return delta, weighted

    # ----------------------------------------------------------------------------------- heads

    def drift(self, features: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Relative drift τ (B,) of the first view, and ∂/∂f of the mean squared drift."""
        found = ops.drift_head(features, anchor, backend=self.session.backend)
        self.session.mark("head")
        return found

    def pseudo_label(self, features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Pseudo-labels ŷ (B,), rows of the session's table, and t_soft (B, D)."""
        session = self.session
        backend = session.backend
        _, label, soft = ops.pseudo_label(features, session.table, temperature, backend=backend)
        return label, soft

    def margin(self, features: Tensor, soft: Tensor, label: Tensor) -> Tensor:
        """∂/∂f of the margin between t_soft and the hardest negative of ŷ, (L, B, D)."""
        session = self.session
        backend = session.backend
        slope = ops.margin_head(features, soft, label, session.table, backend=backend)[1]
        session.mark("head")
        return slope

    def logits(self, features: Tensor, strength: float = 1.0) -> Tensor:
        """ℓ_1 + strength · (ℓ − ℓ_1), (B, K): ℓ the mean of the views' logits, ℓ_1 v_1's."""
        session = self.session
        weights = self._weights(features, strength)
        logits = ops.mean_logits(features, session.table, weights, backend=session.backend)
        session.mark("head")
        return logits

    def extrapolated(
        self, features: Tensor, rule: tuple[float, float, float], slope: float, geodesic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, K), mean cosine (B,) and agreement (B,) of the views (METHOD.md)."""
        session = self.session
        backend = session.backend
        weights, cosine, agreement = ops.view_weights(
            features, *rule, slope=slope, geodesic=geodesic, backend=backend
        )
        logits = ops.mean_logits(features, session.table, weights, unit=True, backend=backend)
        session.mark("head")
        return logits, cosine, agreement

    def _weights(self, features: Tensor, strength: float) -> Tensor | None:
        weights = heads.mean_weights(len(features), strength)
        if weights is None:
            return None
        found = torch.full(features.shape[:2], weights[-1], device=features.device)
        found[0] = weights[0]
        return found

    # -------------------------------------------------------------------------------- pictures

    @property
    def fits(self) -> bool:
        """Whether the images have the encoder's size."""
        return self.batch.size == self.session.size

    def _stacked(self, features: Tensor) -> Tensor:
        return features.unflatten(0, (len(self.views), len(self.batch)))

    def _pictures(self, delta: Tensor | None) -> tuple[Tensor, Undo | None]:
        """Views of x + δ in the encoder's layout, and the adjoint of their resizing, if any."""
        session, batch = self.session, self.batch
        encoder = session.encoder
        options: dict[str, Any] = {"backend": session.backend}
        if self.fits:
            options |= {"mean": session.mean, "std": session.std}
            options |= {"dtype": encoder.dtype, "patch": encoder.patch}
            return ops.make_views(batch.x, delta, batch.seeds, self.views, **options), None
        views = ops.make_views(
            batch.x, delta, batch.seeds, self.views, fill=session.mean, **options
        )
        with torch.enable_grad():
            leaf = views.requires_grad_()
            mean, std = (views.new_tensor(values) for values in (session.mean, session.std))
            sized = preprocess(leaf, session.size, mean, std)
        pictures = sized.detach()
        if encoder.patch:
            pictures = to_patches(pictures, encoder.patch)

        def undo(gradient: Tensor, retain: bool) -> Tensor:
            gradient = gradient.float()
            if encoder.patch:
                gradient = from_patches(gradient, encoder.patch, session.size)
            return torch.autograd.grad(sized, leaf, gradient, retain_graph=retain)[0]

        return pictures.to(encoder.dtype), undo


class LiveViews(Views):
    """Views with a first and a last pass that are differentiable once with respect to the images.

    Steps between them count as constant: BPDA (Athalye et al., arXiv 1802.00420).
    """

    def forward(self, delta: Tensor | None) -> Tensor:
        return self._seen(self.batch.x if delta is None else self.batch.x + delta)

    def vjp(
        self, delta: Tensor | None, anchor: bool = False
    ) -> tuple[Tensor, Tensor | None, Backward]:
        if anchor:  # first pass without a repair
            return self.forward(delta), self.session.encode(self.batch.x), Backward(_not_pulled)
        return self._constant().vjp(delta)

    def step(
        self,
        delta: Tensor,
        gradient: Tensor,
        config: Any,
        weighted: Tensor | None = None,
        weight: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        return self._constant().step(delta, gradient, config, weighted, weight)

    def drift(self, features: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        _, slope = super().drift(features.detach(), anchor.detach())
        return heads.relative_drift(features[0], anchor), slope

    def logits(self, features: Tensor, strength: float = 1.0) -> Tensor:
        weights = self._weights(features, strength)
        return heads.mean_logits(features, self.session.classes, weights)

    def extrapolated(
        self, features: Tensor, rule: tuple[float, float, float], slope: float, geodesic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights, cosine, agreement = heads.view_weights(features, *rule, slope, geodesic)
        logits = heads.mean_logits(features, self.session.classes, weights, unit=True)
        return logits, cosine, agreement

    def answer(self, delta: Tensor, features: Tensor | None, strength: float = 1.0) -> Tensor:
        return self.logits(self.forward(delta), strength)

    def _constant(self) -> Views:
        return Views(self.session, self.batch.still(), self.views)

    def _seen(self, pixels: Tensor) -> Tensor:
        """f of the views of `pixels`, (L, B, D)."""
        session, batch, backend = self.session, self.batch, self.session.backend
        # Clamp with an identity gradient: clamp() has none at 0 and 1.
        inside = pixels + (pixels.clamp(0, 1) - pixels).detach()
        seen = ops.make_views(
            inside, None, batch.seeds, self.views, fill=session.mean, backend=backend
        )
        return self._stacked(session.encode(seen))


def _not_pulled(slope: Tensor, retain: bool) -> Tensor:
    raise RuntimeError("the first pass of an attacker has no repair to go on with")


class Encode:
    """f∘φ: pixels (n, 3, H, W) float32 in [0, 1] to embeddings (n, D), not normalised.

    Differentiable once by autograd, with the encoder's own backward pass.

    Args:
        session: gives encoder and ops.
        at_once: pictures per encoder pass.
    """

    def __init__(self, session: Session, at_once: int = 256) -> None:
        self._session, self._at_once = session, at_once

    def __call__(self, pixels: Tensor) -> Tensor:
        if transformed():
            unused = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)
            return opaque(lambda pixels, _: self(pixels), pixels, unused)
        parts, session = pixels.split(self._at_once), self._session.now()
        if torch.is_grad_enabled() and pixels.requires_grad:
            return torch.cat([_Encoded.apply(part, session) for part in parts])
        with torch.no_grad():
            return torch.cat([_alone(session, part).forward(None)[0] for part in parts])


def _alone(session: Session, pixels: Tensor) -> Views:
    pixels = pixels.detach().float()
    seeds = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device)  # unused: no noise
    return Views(session, Batch(pixels, seeds), (IDENTITY,))


class _Encoded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, session: Session) -> Tensor:
        ctx.views = _alone(session, pixels)
        features, _, ctx.back = ctx.views.vjp(None)
        return features[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        views, session, batch = ctx.views, ctx.views.session, ctx.views.batch
        # Scale each picture's gradient by a power of two against underflow in half precision.
        largest = slope.abs().amax(dim=1).clamp_min(1e-30)
        lift = torch.exp2(-torch.floor(torch.log2(largest)))
        retain = (
            torch._C._autograd._get_current_graph_task_keep_graph()
        )  # the caller's retain_graph
        gradient = ctx.back(slope * lift[:, None], retain=retain)
        if views.fits:
            gradient = ops.make_views_adjoint(
                gradient,
                batch.x,
                None,
                batch.seeds,
                views.views,
                std=session.std,
                patch=session.encoder.patch,
                backend=session.backend,
            )
        return gradient.float() / lift[:, None, None, None], None
