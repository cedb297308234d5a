"""Batch normalisation over workers: two processes against torch's own in one, with the whole batch."""

import copy

import pytest
import torch
from support.normalised import SHARES, block, images, step, work
from torch import multiprocessing

from raypipe.training import batchnorm


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = str(tmp_path_factory.mktemp("workers"))
    multiprocessing.spawn(work, (folder,), nprocs=len(SHARES))
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(len(SHARES))]


@pytest.mark.usefixtures("one_thread")
def test_two_workers_do_what_one_does_with_all_images(workers):
    whole = step(block(), images())
    for name, expected in whole.items():
        found = [each[name] for each in workers]
        if name in ("outputs", "images"):
            torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)
        elif name.startswith("gradient"):
            scale = float(expected.abs().max())
            if name.endswith(("0.bias",)):  # goes into a normalisation: no gradient but rounding
                scale = float(whole[name.replace("bias", "weight")].abs().max())
            torch.testing.assert_close(sum(found) / scale, expected / scale, rtol=0, atol=2e-5)
        else:
            torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(*found)  # to the last bit, or workers would drift apart


def test_a_worker_can_normalise_alone_while_others_do_not(workers):
    torch.testing.assert_close(workers[1]["alone"], workers[1]["averaged"])
    assert not torch.allclose(workers[1]["alone"], workers[1]["outputs"], atol=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_on_one_worker_it_is_torchs_own():
    layers = block()
    names, keys = [name for name, _ in layers.named_parameters()], list(layers.state_dict())
    spread = batchnorm.across_workers(copy.deepcopy(layers))
    assert [type(each).__module__ for each in spread.modules()].count(batchnorm.__name__) == 2
    assert [name for name, _ in spread.named_parameters()] == names and list(spread.state_dict()) == keys
    for one, other in zip(step(spread, images()).values(), step(layers, images()).values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(spread.eval()(images()), layers.eval()(images()))


def test_spreading_keeps_the_parameters_of_an_optimiser():
    layers = block()
    before = list(layers.parameters())
    after = list(batchnorm.across_workers(layers.eval()).parameters())
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert not any(each.training for each in layers.modules())


@pytest.mark.usefixtures("one_thread")
def test_by_batch_keeps_no_statistics_and_averaged_makes_the_mean_over_its_calls():
    layers = block()
    batches = images().split(SHARES)
    step(layers, images())
    before = copy.deepcopy(layers.state_dict())
    expected = [layers(batch) for batch in batches]
    layers.load_state_dict(before)
    layers.eval()
    with batchnorm.by_batch(layers):
        found = [layers(batch) for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layers.state_dict().items())
    assert not any(each.training for each in layers.modules())
    with batchnorm.averaged(layers):
        for batch in batches:
            layers(batch)
    given = [layers[0](batch) for batch in batches]
    means = torch.stack([each.mean((0, 2, 3)) for each in given]).mean(0)
    variances = torch.stack([each.var((0, 2, 3)) for each in given]).mean(0)
    torch.testing.assert_close(layers[1].running_mean, means)
    torch.testing.assert_close(layers[1].running_var, variances)
    assert layers[1].momentum == 0.1 and not layers[1].training
