"""DefendedCLIP: a defended classifier as an nn.Module, for attack tools."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from scc_fast._arguments import explained
from scc_fast._plain import plain
from scc_fast.api import Defender
from scc_fast.config import View, one_of, whole
from scc_fast.engine.drive import not_finite
from scc_fast.engine.opaque import NO_GRAPH, check_caller, opaque, transformed
from scc_fast.engine.seeds import image_seeds
from scc_fast.images import to_batch


class DefendedCLIP(nn.Module):
    """Defended classifier: images (B, 3, H, W) in [0, 1] -> logits (B, K).

    For AutoAttack, ART or any loop. `gradient` chooses the gradient that attack tools get:

    - "through": the true gradient of the defended logits. Sign steps have zero derivative almost
      everywhere, which leaves the gradient at the defended pixels through the projections. Methods
      without a differentiable reference (all but none, rn, views, ttc, scc) treat δ as constant:
      their "through" is "bpda".
    - "bpda": the gradient at the defended pixels, with the repair taken as the identity.
    - "identity": the undefended model's gradient at x, with defended logits.

    torch.compile and torch.func's grad, vjp, jacrev and vmap treat it as one opaque function.
    Changes of `encoder`, the Defender's snapshot (functional_call, pruning, quantisation, hooks),
    take effect with and without gradients. load_state_dict() accepts only the weights it holds.

    Args:
        defender: the prepared defense.
        gradient: see above.
        seed: of every image, for a deterministic module; None: fresh noise at every call.
        clamp: clamp pixels outside [0, 1] with an identity gradient; else more than 1e-6 outside
            raises ValueError.
    """

    is_dynamic = True  # optimises at inference

    @explained
    def __init__(
        self,
        defender: Defender,
        gradient: Literal["through", "bpda", "identity"] = "through",
        seed: int | None = None,
        *,
        clamp: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(defender, Defender):
            raise TypeError(
                f"defender must be a Defender, got {type(defender).__name__}; use "
                "DefendedCLIP(Defender(model, classes))"
            )
        self.defender = defender
        self.gradient = one_of("gradient", gradient, ("through", "bpda", "identity"))
        self.seed = None if seed is None else whole("seed", seed, -(1 << 63), (1 << 64) - 1)
        self.clamp = clamp
        # For tools that look up parameters, modes or the device.
        self.encoder = getattr(defender.snapshot, "module", None)
        self.eval()

    def __repr__(self) -> str:
        return f"DefendedCLIP({self.defender!r}, gradient={self.gradient!r}, seed={self.seed})"

    @property
    def is_randomized(self) -> bool:
        """Whether two calls on the same image can differ."""
        return self.seed is None and self.defender.is_randomized

    def train(self, mode: bool = True) -> DefendedCLIP:
        """Stay in eval mode, whatever attack libraries set."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> DefendedCLIP:
        """Reject another device or dtype: the encoder is shared with the Defender."""
        for held in self.parameters():
            asked = fn(held.new_empty(0))
            if (asked.dtype, asked.device) != (held.dtype, held.device):
                raise TypeError(
                    f"DefendedCLIP stays on {held.device} in {held.dtype}, got {asked.dtype} on "
                    f"{asked.device}: load the model there (load_model(device=, precision=)) and "
                    "make another Defender"
                )
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Reject other weights: the text embeddings do not belong to them."""
        for name, held in self.state_dict().items():
            given = state_dict.get(prefix + name, held)
            if given.shape != held.shape or not torch.equal(given.to(held), held):
                raise ValueError(
                    f"state_dict: {name} is not the Defender's; load it into the model, then make "
                    "another Defender and DefendedCLIP"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __prepare_scriptable__(self) -> Any:  # called by torch.jit.script
        raise TypeError(NO_GRAPH)

    @torch.compiler.disable(reason=NO_GRAPH)
    @explained
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K), differentiable with respect to the images."""
        check_caller(images)
        if transformed():
            x = images[None] if images.ndim == 3 else images
            return opaque(lambda x, seeds: self._answer(self._batch(x), seeds), x, self._seeds(x))
        x = self._batch(images)
        return self._answer(x, self._seeds(x))

    def _batch(self, images: Tensor) -> Tensor:
        return to_batch(images, self.defender.model, clamp=self.clamp, keep_graph=True)

    def _seeds(self, x: Tensor) -> Tensor:
        device = self.defender.model.device
        if self.seed is None:
            return image_seeds(None, len(x), device)
        return image_seeds(self.seed, 1, device).expand(len(x))

    def _answer(self, x: Tensor, seeds: Tensor) -> Tensor:
        live = torch.is_grad_enabled() and x.requires_grad
        with plain(x.device), torch.set_grad_enabled(live):
            pieces = self.defender.pieces(x, seeds)
            logits = torch.cat([self._logits(piece, key, live) for piece, key in pieces])
        if not logits.detach().isfinite().all():
            raise not_finite(logits, self.defender.model, self.defender.precision)
        return logits

    def _logits(self, x: Tensor, seeds: Tensor, live: bool) -> Tensor:
        if not live or self.gradient == "through":
            return self.defender.run(x, seeds).logits
        if self.gradient == "bpda":
            return self.defender.bpda_logits(x, seeds)
        with torch.no_grad():
            outcome = self.defender.run(x.detach(), seeds)
        bare = self.defender.view_logits(x, seeds, (View(),))[0]
        return outcome.logits + (bare - bare.detach())
