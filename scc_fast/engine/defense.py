"""Defense: interface for driver, evaluation and attacks."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from scc_fast._warn import warn
from scc_fast.config import MethodConfig
from scc_fast.engine.batch import Batch
from scc_fast.engine.encoder import Backward
from scc_fast.engine.plan import Plan
from scc_fast.engine.session import Session
from scc_fast.reference.ttc import Outcome


@dataclass(frozen=True)
class Traits:
    """Cost and requirements of a defense.

    Args:
        forward, backward: pictures per repaired image through the image encoder, and back to the
            pixels: F and B.
        random: draws noise.
        dynamic: optimises at inference.
        text: uses the classes before the final prediction.
        gradients: needs the encoder's gradient.
        source: paper, and departures from it.
    """

    forward: float
    backward: float
    random: bool
    dynamic: bool
    text: bool
    gradients: bool
    source: str


@dataclass(frozen=True, eq=False)
class State:
    """State after the first pass: input of gate and repair.

    Args:
        drift: (B,) the gate's measure, NaN without a gate.
        margin: (B,) signed distance to the threshold, > 0: attacked; None without a gate.
        logits: (B, K) of images without a repair; None if all are repaired.
        delta: (B, 3, H, W) of images without a repair; None: zero.
        rows: tensors (B, …) for the repair.
        views: tensors (L, B, …) for the repair.
        backward: closure from the views' features to their pixels.
    """

    drift: Tensor
    margin: Tensor | None = None
    logits: Tensor | None = None
    delta: Tensor | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, Tensor] = field(default_factory=dict)
    backward: Backward | None = None


@dataclass(frozen=True, eq=False)
class Repaired:
    """Result of a repair.

    Args:
        logits: (B, K).
        delta: (B, 3, H, W) perturbation; None: zero.
    """

    logits: Tensor
    delta: Tensor | None = None


class Defense(ABC):
    """Method with its config: two functions of plain tensors, and their cost.

    The functions must not branch on tensor values: CUDA graphs capture them, and attacks
    differentiate them in a live session. An image's result depends on its pixels and seed alone.

    Args:
        config: of the class `Config`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    captures: ClassVar[bool] = False  # whether CUDA graphs are supported
    uncaptured: ClassVar[str] = (
        "its gradients are autograd's, not tried as a graph"  # reason, if not
    )
    has_gate: bool = False  # whether State.margin is set
    judged: bool = False  # whether the gate of a fine-tuned encoder uses the original one

    def __new__(cls, *given: Any, **options: Any) -> Any:
        """Deprecated: with a model, make a Defender."""
        if not given or not (isinstance(given[0], str) or hasattr(given[0], "encode_image")):
            return super().__new__(cls)
        warn(
            f"scc_fast.defenses.{cls.__name__}(model, classes) is "
            f"Defender(model, classes, method={cls.name!r}) now",
            DeprecationWarning,
        )
        made = importlib.import_module("scc_fast.api").Defender
        return made(*given, **{"method": cls.name, "config": {}, **options})

    def __init__(self, config: Any) -> None:
        self.config: Any = config

    def prepare(self, session: Session) -> None:  # noqa: B027
        """Precompute what depends on model and classes. Raises ValueError if unsupported."""

    @property
    @abstractmethod
    def repairs(self) -> Literal["none", "flagged", "all"]:
        """Images to repair after the first pass."""

    @abstractmethod
    def first_pass(self, session: Session, batch: Batch) -> State:
        """Run the first pass through the encoder."""

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        """Repair all images of `batch` (chosen by the driver), and predict."""
        raise NotImplementedError(f"{self.name} repairs nothing after its first pass")

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        """Pictures (L, B, 3, H, W) of the final prediction without a repair, live in x."""
        return batch.x[None]

    @property
    def guess(self) -> Defense | None:
        """Defense whose answer is this one's pseudo-label, or None."""
        return None

    @property
    def surrogates(self) -> tuple[Defense, ...]:
        """Smoother or simpler defenses whose gradient an attack may use instead."""
        return ()

    def reference(self, session: Session, batch: Batch) -> Outcome | None:
        """Run scc_fast.reference, differentiably; None if it lacks the method."""
        return None

    def width(self, session: Session, size: tuple[int, int]) -> int:
        """Pictures per image in the encoder at once, for (height, width)."""
        return 1

    @abstractmethod
    def traits(self, session: Session) -> Traits:
        """Cost and requirements."""

    def plan(self, session: Session, size: tuple[int, int]) -> Plan | None:
        """Passes for pictures (height, width); None if not planned."""
        return None
