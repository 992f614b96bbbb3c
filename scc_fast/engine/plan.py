"""Plan: a method's passes through the encoder, and the floor of their time.

A pass is one batch: all views of a step. f(x) shares the first pass, the pseudo-label the first
semantic step's, the prediction is the last (METHOD.md, SCC).
"""

from __future__ import annotations

from dataclasses import dataclass

from scc_fast.engine.cost import Cost


@dataclass(frozen=True)
class Pass:
    """One batch through the encoder.

    Args:
        name: of the step.
        forward, backward: pictures per image, forward and back to the pixels.
        head: ops between the two.
    """

    name: str
    forward: int
    backward: int
    head: str


@dataclass(frozen=True)
class Plan:
    """Passes for one image, in order.

    Args:
        method, views: name of the method, number of views.
        passes: of a repaired image.
        gate: whether clean images need less; see `clean`.
    """

    method: str
    views: int
    passes: tuple[Pass, ...]
    gate: bool

    @property
    def forward(self) -> int:
        """Pictures forward per image: F in METHOD.md."""
        return sum(one.forward for one in self.passes)

    @property
    def backward(self) -> int:
        """Pictures backward per image: B in METHOD.md."""
        return sum(one.backward for one in self.passes)

    def clean(self) -> Plan:
        """Plan of an image that the gate counts as clean: the first forward pass."""
        first = self.passes[0]
        alone = Pass(first.name, first.forward, 0, "drift_head, mean_logits")
        return Plan(self.method, self.views, (alone,), gate=False)

    def flops(self, cost: Cost, batch: int = 1) -> int:
        """FLOPs of the encoder for a batch."""
        return batch * (self.forward * cost.forward + self.backward * cost.backward)

    def bytes(self, cost: Cost) -> int:
        """Bytes of weights read: once per forward or backward pass."""
        ways = len(self.passes) + sum(one.backward > 0 for one in self.passes)
        return ways * cost.weights

    def floor_ms(
        self, cost: Cost, batch: int, flops_per_s: float, bytes_per_s: float | None
    ) -> float:
        """Lower bound of the time: the larger of FLOPs / matmul rate and bytes / bandwidth.

        `bytes_per_s` None: weights are cached and their bytes do not count.
        """
        memory = 0.0 if bytes_per_s is None else self.bytes(cost) / bytes_per_s
        return 1e3 * max(memory, self.flops(cost, batch) / flops_per_s)

    def describe(
        self,
        cost: Cost,
        batch: int = 1,
        flops_per_s: float | None = None,
        bytes_per_s: float | None = None,
    ) -> str:
        """Table of passes, pictures forward and back, FLOPs, bytes, and the floor, given rates."""
        lines = [f"{self.method}, {self.views} views, batch {batch}"]
        form = "{:<20} {:>4} {:>4} {:>9} {:>9}  {}".format
        lines.append(form("pass", "F", "B", "GFLOP", "MB", "head"))

        def row(name: str, part: Plan, head: str) -> str:
            gflop = f"{part.flops(cost, batch) / 1e9:.2f}"
            return form(
                name, part.forward, part.backward, gflop, f"{part.bytes(cost) / 1e6:.1f}", head
            )

        for one in self.passes:
            part = Plan(self.method, self.views, (one,), gate=False)
            lines.append(row(one.name, part, one.head))
        lines.append(row("together", self, ""))
        if self.gate:
            lines.append(row("clean, by the gate", self.clean(), ""))
        if flops_per_s is not None:
            rates = f"{flops_per_s / 1e9:.0f} GFLOP/s"
            rates += "" if bytes_per_s is None else f", {bytes_per_s / 1e9:.1f} GB/s"
            floor = self.floor_ms(cost, batch, flops_per_s, bytes_per_s)
            lines.append(f"floor {floor:.3g} ms at {rates}")
        return "\n".join(lines)


def single_pass(method: str, views: int, head: str = "mean_logits") -> Plan:
    """Plan of a single forward pass of `views` views."""
    return Plan(method, views, (Pass("predict", views, 0, head),), gate=False)


def ascent_plan(method: str, views: int, warm_up: int, semantic: int, gate: bool) -> Plan:
    """Plan of `warm_up` drift steps, then `semantic` margin steps, on `views` views."""
    steps = [(f"warm-up {t + 1}", views, "drift_head") for t in range(warm_up)]
    steps += [(f"semantic {s + 1}", views, "margin_head") for s in range(semantic)]
    steps += [("predict", 0, "mean_logits")]
    passes = []
    for place, (name, backward, head) in enumerate(steps):
        if name == "semantic 1":
            head = f"pseudo_label, {head}"
        if place == 0:
            name, head = f"f(x), {name}", head if head == "drift_head" else f"drift_head, {head}"
        passes.append(Pass(name, views + (place == 0), backward, head))
    return Plan(method, views, tuple(passes), gate)
