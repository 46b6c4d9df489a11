"""One model in two threads, and copies of it: replicas, deep copies, pickles."""

import copy
import pickle
import sys
import threading
from unittest import mock

import torch
from torch import Tensor, nn

from ..frame import trial
from ..methods import Method
from ..reference import TIGHT, assert_close, assert_same_gradients, by_hand, compare_steps, gradients
from .passes import ALL, Mixed, image_loss, rows

replicating = sys.modules["torch.nn.parallel.replicate"]  # its package has a function of that name


@trial("torch", "two threads on one model, one of them without gradients")
def threads(method: Method) -> None:
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    reference = by_hand(method, base, model)
    images = rows(4, 3, 6, 6)
    expected = reference(images)
    inside, checked = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def wait(*_: object) -> None:
        if torch.is_grad_enabled():
            inside.set()
            checked.wait(10)

    # One thread stands in the middle of its pass while the other runs a whole one.
    hook = model.get_base_model().mlp[1].register_forward_hook(wait)

    def train() -> None:
        try:
            output = model(images)
            assert_close(output, expected, TIGHT, "output of the training thread")
            output.square().mean().backward()
        except BaseException as error:
            failures.append(error)
            inside.set()

    thread = threading.Thread(target=train)
    thread.start()
    inside.wait(10)
    try:
        with torch.no_grad():
            assert_close(model(images), expected, TIGHT, "output of the thread without gradients")
    finally:
        checked.set()
        thread.join(10)
        hook.remove()
    if failures:
        raise failures[0]
    reference(images).square().mean().backward()
    assert_same_gradients(gradients(method, model), gradients(method, reference), TIGHT)


@trial("torch", "nn.DataParallel: replicas for two devices (made on a CPU), forward and backward")
def data_parallel(method: Method) -> None:
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    reference = by_hand(method, base, model)

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    with mock.patch.object(replicating, "_broadcast_coalesced_reshape", copies):
        replicas = replicating.replicate(model, [0, 1])
    parts = rows(4, 3, 6, 6).chunk(2)
    output = torch.cat([replica(part) for replica, part in zip(replicas, parts, strict=True)])
    expected = reference(rows(4, 3, 6, 6))
    assert_close(output, expected, TIGHT)
    output.square().mean().backward()
    expected.square().mean().backward()
    assert_same_gradients(gradients(method, model), gradients(method, reference), TIGHT)
    assert_close(model(rows(4, 3, 6, 6)), expected, TIGHT, "output after replication")


def _copied(method: Method, how) -> None:
    """Copies made before, in the middle of and after a pass compute for themselves."""
    base = Mixed()
    model = method.wrap(copy.deepcopy(base), ALL)
    copies = []
    before = how(model)
    image_loss(model).backward()
    after = how(model)

    def copy_now(*_: object) -> None:
        hook.remove()
        copies.append(how(model))

    hook = model.get_base_model().mlp[1].register_forward_hook(copy_now)
    with torch.no_grad():
        image_loss(model)
    for copied in (before, after, *copies):
        with torch.no_grad():
            for parts in method.parameters(copied).values():
                for part in parts.values():
                    part.mul_(1.25)
        compare_steps(method, copied, by_hand(method, base, copied), image_loss)
    model.zero_grad()
    compare_steps(method, model, by_hand(method, base, model), image_loss)


@trial("torch", "deepcopy of an adapted model, also in the middle of a pass")
def deep_copies(method: Method) -> None:
    _copied(method, copy.deepcopy)


@trial("torch", "pickle of an adapted model, also in the middle of a pass")
def pickles(method: Method) -> None:
    _copied(method, lambda model: pickle.loads(pickle.dumps(model)))


@trial("torch", "torch.save and torch.load of a whole adapted model")
def whole_saves(method: Method) -> None:
    def through_file(model: nn.Module) -> nn.Module:
        torch.save(model, "model.pt")
        return torch.load("model.pt", weights_only=False)

    _copied(method, through_file)
