"""The field's tools on a DefendedCLIP: they attack it, and what they see are its logits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from scc_fast import DefendedCLIP, Defender, tiny
from toys import model_of

EPSILON = 8 / 255
IMAGES = 4


@functools.cache
def robust_of(method: str) -> DefendedCLIP:
    return DefendedCLIP(Defender(model_of("tiny"), tiny.prompts(), method=method), "bpda", seed=0)


@functools.cache
def drawn() -> tuple[Tensor, Tensor]:
    """Pictures that the bare model has right, and their labels."""
    x, labels = tiny.generate("test", range(8))
    right = robust_of("none")(x).argmax(dim=-1) == labels
    return x[right][:IMAGES], labels[right][:IMAGES]


def assert_attacked(adversarial: Tensor) -> None:
    """In the ball and the box, and the bare model has fewer right than the half."""
    x, labels = drawn()
    assert len(x) == IMAGES
    assert (adversarial - x).abs().max() <= EPSILON + 1e-6
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    right = robust_of("none")(adversarial).argmax(dim=-1) == labels
    assert right.sum() < IMAGES / 2


def assert_defended(logits: Tensor) -> None:
    """Those of the Defender, which are not the bare model's."""
    x, _ = drawn()
    seeds = robust_of("ttc")._seeds(x)
    torch.testing.assert_close(logits, robust_of("ttc").defender(x, seeds).logits)
    assert (logits - robust_of("none")(x)).abs().max() > 0.1


def test_torchattacks() -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="[tools-test] is not installed")
    x, labels = drawn()
    attack = torchattacks.PGD(robust_of("none"), eps=EPSILON, alpha=2 / 255, steps=10)
    assert_attacked(attack(x, labels))
    seen = torchattacks.FGSM(robust_of("ttc"), eps=EPSILON)
    assert_defended(seen.get_logits(x))
    attacked = seen(x[:2], labels[:2])
    assert (attacked != x[:2]).any()


def test_foolbox() -> None:
    foolbox = pytest.importorskip("foolbox", reason="[tools-test] is not installed")
    x, labels = drawn()
    model = foolbox.PyTorchModel(robust_of("none"), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.25)
    _, adversarial, success = attack(model, x, labels, epsilons=EPSILON)
    assert_attacked(adversarial)
    assert success.sum() > IMAGES / 2
    defended = foolbox.PyTorchModel(robust_of("ttc"), bounds=(0, 1), device="cpu")
    assert_defended(defended(x))


def test_adversarial_robustness_toolbox() -> None:
    pytest.importorskip("art", reason="[tools-test] is not installed")
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    x, labels = drawn()

    def classifier(method: str) -> Any:
        return PyTorchClassifier(
            robust_of(method),
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=len(tiny.prompts()),
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )

    attack = ProjectedGradientDescent(
        classifier("none"), eps=EPSILON, eps_step=2 / 255, max_iter=10, verbose=False
    )
    assert_attacked(torch.from_numpy(attack.generate(x.numpy(), labels.numpy())))
    assert_defended(torch.from_numpy(classifier("ttc").predict(x.numpy())))


def test_captum() -> None:
    pytest.importorskip("captum", reason="[tools-test] is not installed")
    from captum.attr import IntegratedGradients, Saliency
    from captum.robust import PGD

    x, labels = drawn()
    attack = PGD(robust_of("none"), lower_bound=0.0, upper_bound=1.0)
    options: dict[str, Any] = {"radius": EPSILON, "step_size": 2 / 255, "step_num": 10}
    assert_attacked(attack.perturb(x, target=labels, **options))
    robust, leaf = robust_of("ttc"), x.clone().requires_grad_()
    logits = robust(leaf)
    assert_defended(logits.detach())
    (slope,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), leaf)
    found = Saliency(robust).attribute(x.clone(), target=labels, abs=False)
    torch.testing.assert_close(found, slope)
    # Of the bare model the attributions come to what its logit has changed since a black picture.
    bare = robust_of("none")
    ways, missing = IntegratedGradients(bare).attribute(
        x[:2], target=labels[:2], n_steps=32, return_convergence_delta=True
    )
    total = (bare(x[:2]) - bare(torch.zeros_like(x[:2]))).gather(1, labels[:2, None])[:, 0]
    assert (missing.abs() < 0.1 * total.abs()).all()
    torch.testing.assert_close(ways.sum(dim=(1, 2, 3)), total + missing.float(), atol=1e-2, rtol=0)
