"""R-TPT, robust test-time prompt tuning: a prompt step, then views weighted by reliability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scc_fast.config import MethodConfig, whole, within
from scc_fast.defenses.augment import BOX_DRAWS, crop_resize, random_boxes
from scc_fast.defenses.augmix import MIX_DRAWS, augmix
from scc_fast.defenses.prompt_tuning import Context
from scc_fast.defenses.scc import no_drift
from scc_fast.engine.batch import Batch
from scc_fast.engine.defense import Defense, State, Traits
from scc_fast.engine.session import Session
from scc_fast.reference import philox

# Philox purpose.
VIEWS = 140
# PyTorch's AdamW defaults, as in the released code.
BETAS, DECAY, TINY = (0.9, 0.999), 0.01, 1e-8


@dataclass(frozen=True)
class RTPTConfig(MethodConfig):
    """R-TPT (CVPR 2025, arXiv 2504.11195); the defaults are the published ones.

    Args:
        view_count: number of views, including the picture.
        selection: share of views, with the lowest entropy, that tune the prompt.
        steps: AdamW steps on the prompt.
        learning_rate: of AdamW.
        context: number of tuned tokens.
        neighbors: k nearest other views for a view's reliability.
        temperature: of the softmax over reliabilities.
        augmix: AugMix after each crop, as for fine-grained sets; else crops alone, as for ImageNet
            and its variants.
        published: drop all similarities >= 1.0, as the released code does (so that rounding decides
            on self-similarities); else drop the diagonal. Without any entry, views have equal
            weights.
    """

    view_count: int = 64
    selection: float = 0.1
    steps: int = 1
    learning_rate: float = 5e-3
    context: int = 4
    neighbors: int = 20
    temperature: float = 0.01
    augmix: bool = True
    published: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("view_count", self.view_count, 2, 1024)
        whole("context", self.context, 1, 64)
        whole("neighbors", self.neighbors, 1, self.view_count - 1)
        within("selection", self.selection, 0.0, 1.0)
        within("learning_rate", self.learning_rate, 0.0, 1.0)

    @property
    def selected(self) -> int:
        """Number of views that tune the prompt."""
        return max(1, int(self.selection * self.view_count))


class RTPT(Defense):
    """Robust test-time prompt tuning.

    Views are the picture and random crops (scale 0.08 to 1, mirrored half the time, then AugMix),
    on float pixels (8 bits in the released code). Per image, the prompts' context of 4 tokens (see
    prompt_tuning.Context) makes one AdamW step on the mean entropy of the 6 most certain views. The
    logits of all views with the tuned prompt are averaged with weights softmax(r_v/T), r_v the mean
    cosine of view v to its k nearest other views.

    View features are computed once: 64F instead of 257F in the released code; the text tower runs
    twice forward and once backward per image, for all classes. `delta` is zero; no gate.

    Raises:
        ValueError: text_features instead of classes, or inaccessible token embeddings.
    """

    name, Config = "r_tpt", RTPTConfig
    config: RTPTConfig

    repairs: Literal["none"] = "none"
    uncaptured = "it tunes prompts: the text tower runs under autograd"

    def prepare(self, session: Session) -> None:
        if session.prompts is None:
            raise ValueError(
                'r_tpt tunes prompts: give classes=["a photo of a dog", …], not text_features'
            )
        self.context = Context(session.model, session.prompts, self.config.context, need="r_tpt")

    def width(self, session: Session, size: tuple[int, int]) -> int:
        return self.config.view_count

    def traits(self, session: Session) -> Traits:
        return Traits(
            forward=self.config.view_count,
            backward=0,
            random=True,
            dynamic=True,
            text=True,
            gradients=False,
            source="arXiv 2504.11195; "
            + ("self-similarities >= 1 dropped" if self.config.published else "diagonal dropped"),
        )

    def first_pass(self, session: Session, batch: Batch) -> State:
        features = session.features(self.pictures(session, batch))
        text = self._tuned(session, features.detach())
        weights = self._reliability(features)[..., None]
        # Once per prompt: equal prompts get equal logits.
        logits = (weights * self._logits(session, features, text)).sum(dim=0)
        return State(no_drift(batch), logits=logits[:, self.context.group])

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        """(V, B, 3, H, W): x, then its random views."""
        x, seeds = batch.x, batch.seeds
        more, each = self.config.view_count - 1, BOX_DRAWS + 1 + MIX_DRAWS
        if len(x) == 0:
            return x.expand(more + 1, *x.shape)
        draws = philox.uniform(seeds, VIEWS, 0, more * each).unflatten(1, (more, each))
        boxes = random_boxes(draws[..., 1 : BOX_DRAWS + 1], (x.shape[-2], x.shape[-1]), (0.08, 1.0))
        crops = crop_resize(x, boxes, draws[..., 0] < 0.5, session.backend)
        if self.config.augmix:
            mix = draws[..., BOX_DRAWS + 1 :].transpose(0, 1).flatten(0, 1)
            crops = augmix(crops.flatten(0, 1), mix, session.backend).view_as(crops)
        return torch.cat([x[None], crops])

    def _tuned(self, session: Session, features: Tensor) -> Tensor:
        """Tuned text embeddings (B, U, D) per image, from features (V, B, D)."""
        config, batch = self.config, features.shape[1]
        offset = self.context.start.repeat(batch, 1, 1)
        first, second = torch.zeros_like(offset), torch.zeros_like(offset)
        text, keep = self.context.base.expand(batch, -1, -1), 1.0
        kept = self._entropy(session, features, text).argsort(dim=0, stable=True)[: config.selected]
        chosen = features.gather(0, kept[..., None].expand(-1, -1, features.shape[-1]))
        for at in range(1, config.steps + 1):
            with torch.enable_grad():
                leaf = text.detach().requires_grad_()
                loss = self._entropy(session, chosen, leaf).mean(dim=0).sum()
                (slope,) = torch.autograd.grad(loss, leaf)
            slope = self.context.pull(offset, slope, keep)
            first = BETAS[0] * first + (1 - BETAS[0]) * slope
            second = BETAS[1] * second + (1 - BETAS[1]) * slope.square()
            root = (second / (1 - BETAS[1] ** at)).sqrt() + TINY
            # Weight decay of embedding and offset.
            less = 1 - config.learning_rate * DECAY
            step = config.learning_rate * first / (1 - BETAS[0] ** at) / root
            offset, keep = less * offset - step, less * keep
            text = self.context.features(offset, keep)
        return text

    def _logits(self, session: Session, features: Tensor, text: Tensor) -> Tensor:
        """s·cos + b: (V, B, D), text (B, U, D) per image → (V, B, U)."""
        cosines = F.normalize(features, dim=-1).transpose(0, 1) @ F.normalize(text, dim=-1).mT
        return session.classes.scale * cosines.transpose(0, 1) + session.classes.bias

    def _entropy(self, session: Session, features: Tensor, text: Tensor) -> Tensor:
        """Entropy of each view's class distribution, nats: (V, B)."""
        logs = self._logits(session, features, text)[..., self.context.group].log_softmax(dim=-1)
        return -(logs.exp() * logs).sum(dim=-1)

    def _reliability(self, features: Tensor) -> Tensor:
        """Weights of views, (V, B, D) → (V, B), with sum 1 over the views."""
        unit = F.normalize(features, dim=-1).transpose(0, 1)
        similar = unit @ unit.mT  # (B, V, V)
        if self.config.published:
            dropped = similar >= 1.0
        else:
            dropped = torch.eye(len(features), dtype=torch.bool, device=features.device)[None]
        nearest = similar.masked_fill(dropped, -torch.inf).topk(self.config.neighbors, dim=-1)
        score = nearest.values.mean(dim=-1)
        lost = (score == -torch.inf).all(dim=-1, keepdim=True)
        score = torch.where(lost, torch.zeros_like(score), score)
        return torch.softmax(score / self.config.temperature, dim=-1).T
