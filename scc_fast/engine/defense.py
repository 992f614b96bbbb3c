"""What a defense is to the driver, to an evaluation and to an attacker."""

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
    """What a defense costs and needs.

    Args:
        forward, backward: pictures through the image encoder, and of these back to the pixels,
            for one image that it repairs: F and B.
        random: draws noise, so that seeds matter.
        dynamic: optimises at inference.
        text: needs the classes for more than the final prediction.
        gradients: needs the encoder's gradient.
        source: paper, and where a switch departs from it.
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
    """What the first pass leaves: what decides about an image, and what its repair goes on from.

    Args:
        drift: (B,) the gate's measure, NaN without one.
        margin: (B,), how far the measure is on the side of an attack, above 0 there; None without
            a gate.
        logits: (B, K), the answer for an image that is not repaired; None where all are.
        delta: (B, 3, H, W), what has been added to such an image; None: nothing.
        rows: tensors (B, …) that the repair needs.
        views: tensors (L, B, …) that it needs.
        backward: from the gradient at the views' features to their pixels.
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
    """Images after their repair.

    Args:
        logits: (B, K).
        delta: (B, 3, H, W), what was added to x; None: nothing.
    """

    logits: Tensor
    delta: Tensor | None = None


class Defense(ABC):
    """A method with its config: two functions of plain tensors, and what they cost.

    Nothing in the two branches on what a tensor holds: CUDA graphs capture them, and an attacker
    differentiates them, in a session whose views are live. An image's result depends on its pixels
    and its seed alone.

    Args:
        config: of the method's own class.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    captures: ClassVar[bool] = False  # whether CUDA graphs serve it
    uncaptured: ClassVar[str] = "its gradients are autograd's, not tried as a graph"  # why, if not
    has_gate: bool = False  # whether a state has a margin
    judged: bool = False  # whether the gate looks through the encoder that this was tuned from

    def __new__(cls, *given: Any, **options: Any) -> Any:
        """For one release, what was a defense of a model: the Defender that it is now."""
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
        """Make once what depends on model and classes. Raises ValueError where it cannot serve."""

    @property
    @abstractmethod
    def repairs(self) -> Literal["none", "flagged", "all"]:
        """Whose repair the driver asks for after the first pass."""

    @abstractmethod
    def first_pass(self, session: Session, batch: Batch) -> State:
        """What is known of each image after the first pass through the encoder."""

    def after_gate(self, session: Session, batch: Batch, state: State) -> Repaired:
        """The repair of every image in `batch`, which the driver has chosen, and its prediction."""
        raise NotImplementedError(f"{self.name} repairs nothing after its first pass")

    def pictures(self, session: Session, batch: Batch) -> Tensor:
        """(L, B, 3, H, W): what it would look at if it repaired nothing, live in x."""
        return batch.x[None]

    @property
    def guess(self) -> Defense | None:
        """The defense that answers what this one takes as its pseudo-label; None: it takes none."""
        return None

    @property
    def surrogates(self) -> tuple[Defense, ...]:
        """Smoother or simpler defenses whose gradient an attacker may follow instead of its own."""
        return ()

    def reference(self, session: Session, batch: Batch) -> Outcome | None:
        """The method by scc_fast.reference, differentiable; None where it is not there."""
        return None

    def width(self, session: Session, size: tuple[int, int]) -> int:
        """Pictures (height, width) of one image that are held together."""
        return 1

    @abstractmethod
    def traits(self, session: Session) -> Traits:
        """Cost and needs."""

    def plan(self, session: Session, size: tuple[int, int]) -> Plan | None:
        """Its passes for pictures (height, width); None where it is no plan of passes."""
        return None
