"""DefendedCLIP: a defended classifier as a module, for attack tools and any loop."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from scc_fast._arguments import explained
from scc_fast.api import Defender, image_seeds
from scc_fast.config import View, one_of, whole
from scc_fast.images import to_batch


class DefendedCLIP(nn.Module):
    """A defended classifier as a module: images (B, 3, H, W) in [0, 1] -> logits (B, K).

    For AutoAttack, ART or any loop. Attack tools cannot see through a test-time defense by
    themselves, so `gradient` says what they get:

    - "through": the true gradient of the defended logits as they are computed. The sign steps
      have zero derivative almost everywhere, so what remains is the gradient at the defended
      pixels through the projections. Methods of scc_fast.defenses beside Defender's own five hold
      what they optimised constant, so that this is their "bpda", too.
    - "bpda": the gradient at the defended pixels, passed on as if the repair were the identity.
    - "identity": the undefended model's gradient at x, beside defended logits.

    Args:
        defender: the prepared defense.
        gradient: see above.
        seed: an int makes the module a function of the image alone (every image gets this seed);
            None draws fresh noise at every call.
        clamp: clamp pixels outside [0, 1], whose gradient passes as if they were not; else more
            than 1e-6 outside is refused.
    """

    is_dynamic = True  # it optimises at inference, whether or not a tool can trace that

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
        x = to_batch(images, self.defender.model, clamp=self.clamp, keep_graph=True)
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
        if self.gradient == "bpda":
            return self.defender.bpda_logits(x, seeds)
        with torch.no_grad():
            outcome = self.defender.run(x.detach(), seeds)
        bare = self.defender.view_logits(x, seeds, (View(),))[0]
        return outcome.logits + (bare - bare.detach())
