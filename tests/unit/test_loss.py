"""The head's loss and its gradients, against torch's cross_entropy of all logits."""

import pytest
import torch
import torch.nn.functional as F

from llama2.data.loader import IGNORED
from llama2.train.loss import exponentials, head_loss


def example(*, ignored: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 16, generator=generator, requires_grad=True)
    head = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (23,), generator=generator)
    if ignored:
        targets[[0, 7, 8, 22]] = IGNORED
    return x, head, targets


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("ignored", [True, False])
def test_loss_and_gradients(chunk: int, ignored: bool) -> None:
    x, head, targets = example(ignored=ignored)
    expected = F.cross_entropy(x @ head.T, targets, reduction="sum")
    gradients = torch.autograd.grad(3 * expected, (x, head))
    found = head_loss(x, head, targets, chunk=chunk)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, (x, head)), gradients)


def test_in_autocast_gradients_are_as_good_as_those_of_all_logits() -> None:
    """A nearly certain target is the hard case: its probability less 1 is lost if it is rounded first."""
    x, head, targets = example(ignored=False)
    with torch.no_grad():
        x.mul_(0.2).add_(3 * F.normalize(head[targets]))
    exact = torch.autograd.grad(F.cross_entropy(x @ head.T, targets, reduction="sum"), (x, head))
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.autograd.grad(F.cross_entropy((x @ head.T).float(), targets, reduction="sum"), (x, head))
        found = torch.autograd.grad(head_loss(x, head, targets, chunk=5), (x, head))
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        assert ours.dtype == torch.float32
        # x is rounded once more, divided by the sum of the exponentials.
        assert 0 < (ours - truth).norm() <= 1.3 * (theirs - truth).norm()


def test_nothing_to_learn_is_zero() -> None:
    x, head, targets = example()
    found = head_loss(x, head, torch.full_like(targets, IGNORED), chunk=5)
    assert found.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(found, (x, head)))


def test_all_logits_are_never_held() -> None:
    x, head, targets = example()
    seen = []

    def softmax(logits, targets, group):  # type: ignore[no-untyped-def]
        seen.append(tuple(logits.shape))
        return exponentials(logits, targets, group)

    head_loss(x, head, targets, chunk=10, softmax=softmax)
    assert seen == [(10, 50), (10, 50), (3, 50)]


def test_large_logits() -> None:
    x, head, targets = example()
    expected = F.cross_entropy((1000 * x) @ head.T, targets, reduction="sum")
    torch.testing.assert_close(head_loss(1000 * x, head, targets, chunk=8), expected)
