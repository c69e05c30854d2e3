"""One training run against a plain loop, and what a run must record."""

import errno
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiment_tools import TINY, digits, write_cifar10
from torch import nn

import equinorm
from equinorm.experiments import networks, trainer, unfinished
from equinorm.experiments.config import METHODS, ExperimentError, Run
from equinorm.experiments.datasets import in_memory
from equinorm.experiments.path_norms import kappa
from equinorm.experiments.thumbnails import decode
from equinorm.experiments.trainer import train
from equinorm.reporting.files import OutputError

DATA = digits()


def plain_loop(run, adjust=lambda model: None, after=lambda model: None):
    """Weights, accuracy and mean losses of SGD written out: schedule, clipping, decay, momentum."""
    torch.manual_seed(run.seed)
    model = networks.build(run, DATA.shape, DATA.classes)
    trained, scored = (DATA.kept, DATA.held_out) if run.held_out else (DATA.train, DATA.test)
    images, labels = next(trained.batches(len(trained)))
    order = torch.Generator().manual_seed(run.seed)
    per_epoch = math.ceil(len(images) / run.batch)
    total, step, losses = per_epoch * run.epochs, 0, []
    buffers = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(run.epochs):
        places, mean = torch.randperm(len(images), generator=order), 0.0
        for part in places.split(run.batch):
            rate = run.lr * (1 - step / total)
            if run.warmup:
                rate *= min(1, (step + 1) / (run.warmup * per_epoch))
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            loss.backward()
            adjust(model)
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    gradient = p.grad * min(1, run.clip / norm) if run.clip else p.grad
                    gradient = gradient + run.weight_decay * p
                    buffers[name] = run.momentum * buffers[name] + gradient
                    p -= rate * buffers[name]
            after(model)
            step += 1
            mean += float(loss.detach()) / per_epoch
        losses.append(mean)
    images, labels = next(scored.batches(len(scored)))
    return model, float((model(images).argmax(1) == labels).double().mean()), losses


def norms(model):
    return {name: float(layer.weight.detach().norm()) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def agrees(run, model, accuracy, losses):
    found = train(run, DATA)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-9)
    assert found.curves.loss == pytest.approx(losses, rel=1e-4)  # float32, another order of sums
    assert {name: values[-1] for name, values in found.curves.norms.items()} == pytest.approx(norms(model), rel=1e-4)
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"momentum": 0.9, "lr": 0.02}, {"clip": 0.5}, {"warmup": 1.5}, {"held_out": True, "seed": 3}, {"biases": True}],
)
def test_a_run_is_the_plain_loop(changes):
    run = replace(TINY, weight_decay=0.01, **changes)
    found = agrees(run, *plain_loop(run))
    sizes = (len(DATA.kept), len(DATA.held_out)) if run.held_out else (len(DATA.train), len(DATA.test))
    assert found.images == sizes
    assert found.steps == 2 * math.ceil(sizes[0] / 128)


def test_path_sgd_is_the_plain_loop():
    run = replace(TINY, method="path_sgd", lr=0.05)
    unit = []

    def adjust(model):
        found = kappa(model, DATA.shape)
        if not unit:
            unit.append(torch.cat([part.flatten() for part in found.values()]).mean())
        for name, parameter in model.named_parameters():
            parameter.grad *= unit[0] / found[name]

    agrees(run, *plain_loop(run, adjust))


def test_enorm_is_the_plain_loop_with_algorithm_1():
    """Layer by layer on current weights: D = √(R / cL), W_k ← W_k D, W_{k+1} ← D⁻¹ W_{k+1}."""
    run = replace(TINY, method="enorm", c=1.2)

    @torch.no_grad()
    def cycle(model):
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        for before, after in itertools.pairwise(layers):
            scale = (after.weight.norm(dim=0) / (run.c * before.weight.norm(dim=1))).sqrt()
            before.weight.mul_(scale[:, None])
            after.weight.div_(scale)

    agrees(run, *plain_loop(run, after=cycle))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    found = train(replace(TINY, method=method, epochs=6), DATA)
    assert found.accuracy > 0.6
    assert not found.diverged
    assert found.accuracy == found.curves.accuracy[-1]
    assert len(found.curves.loss) == len(found.curves.accuracy) == 6
    assert {len(values) for values in found.curves.norms.values()} == {7}
    assert list(found.curves.norms) == list(found.curves.norms)
    assert found.source["torch"] == torch.__version__
    assert found.source["threads"] == torch.get_num_threads()


def test_balancing_balances():
    baseline, exact = (train(replace(TINY, method=method), DATA).curves.residuals for method in ("baseline", "enorm_exact"))
    assert baseline[0] == exact[0] > 0.01  # the same weights at the start
    assert baseline[-1] > 0.01
    assert exact[-1] < 1e-5
    assert len(baseline) == len(exact) == 3


def test_initialisations():
    start = {
        method: train(replace(TINY, method=method), DATA).curves.residuals[0] for method in ("baseline", "balanced", "pathcond")
    }
    assert start["balanced"] < 1e-6 < start["baseline"]
    assert start["pathcond"] not in (start["balanced"], start["baseline"])


def test_batch_norm_and_enorm_use_the_statistics():
    """The weights in front of the normalization move too: the first layer's, which nothing else could move."""
    found = train(replace(TINY, method="enorm_bn", cycles=20, lr=1e-4), DATA)
    before, *_, after = found.curves.norms["1"]
    assert abs(after - before) > 0.1 * before
    assert found.curves.residuals[-1] < 0.1 * found.curves.residuals[0]


def test_runs_repeat_exactly():
    one, other = train(TINY, DATA), train(TINY, DATA)
    assert (one.curves, one.accuracy) == (other.curves, other.accuracy)
    assert one.curves.loss != train(replace(TINY, seed=1), DATA).curves.loss


def interrupted(run, data, folder, monkeypatch, epoch=2):
    """What comes of a run that ends behind an epoch, and goes on as a new one."""
    monkeypatch.setattr(unfinished, "SAVED_EVERY", 0.0)

    def progress(number, *_):
        if number == epoch + 1:  # of what this epoch did nothing has been saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, data, progress=progress, unfinished=folder)
    (kept,) = folder.iterdir()
    assert run.method in kept.name
    seen = []
    found = train(run, data, progress=lambda number, *_: seen.append(number), unfinished=folder)
    assert seen == [*range(epoch + 1, run.epochs + 1)]
    return found


DEEP = replace(TINY, epochs=4, momentum=0.9, weight_decay=0.01, lr=0.02)


@pytest.mark.parametrize(
    "run",
    [
        replace(DEEP, method="bn"),
        replace(DEEP, method="path_sgd", path_every=7),
        replace(DEEP, method="enorm", biases=True, c=1.4, c_end=1.0, every=3),
        replace(DEEP, method="balanced", held_out=True),
        Run(data="cifar10", network="conv", method="enorm_bn", width=8, batch=25, epochs=4, lr=0.01, augment=True),
    ],
    ids=lambda run: run.method,
)
def test_a_run_that_was_interrupted_ends_the_same(run, tmp_path, monkeypatch):
    data = DATA
    if run.data == "cifar10":
        write_cifar10(tmp_path)
        data = in_memory._memory.__wrapped__("cifar10", tmp_path, "cpu")
    parts, whole = interrupted(run, data, tmp_path / "unfinished", monkeypatch), train(run, data)
    times = {"seconds": 0.0, "images_per_second": 0.0}
    assert parts.seconds > 0
    assert replace(parts, **times) == replace(whole, **times)


def test_an_unfinished_run_of_something_else_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "unfinished"
    interrupted(DEEP, DATA, folder, monkeypatch)
    monkeypatch.setattr(torch, "__version__", "9.0")
    with pytest.raises(ExperimentError, match=r"was begun with torch 2\..* here it is 9\.0.* Delete the file to start over"):
        train(DEEP, DATA, unfinished=folder)
    (kept,) = folder.iterdir()
    for content in (b"", b"broken", kept.read_bytes()[:-100]):
        kept.write_bytes(content)
        with pytest.raises(ExperimentError, match=r"cannot read the unfinished run .*Delete it to start over"):
            train(DEEP, DATA, unfinished=folder)
    kept.unlink()
    train(DEEP, DATA, unfinished=folder)


def test_a_run_is_saved_where_another_program_has_just_finished_it(tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "SAVED_EVERY", 0.0)
    mine, other = (unfinished.Unfinished(tmp_path / "unfinished", TINY) for _ in range(2))
    make_folder, removals = unfinished.make_folder, iter([other.remove])

    def make(path):
        make_folder(path)
        next(removals, lambda: None)()

    monkeypatch.setattr(unfinished, "make_folder", make)
    mine.save(lambda: {"maker": {}, "steps": 3})
    assert other.load("cpu", {}) == {"maker": {}, "steps": 3}

    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*: No space left on device"):
        mine.save(lambda: {"maker": {}, "steps": 4})
    assert other.load("cpu", {}) == {"maker": {}, "steps": 3}


@pytest.mark.parametrize("method", ["baseline", "enorm", "bn"])
def test_divergence_is_a_result(method):
    found = train(replace(TINY, method=method, lr=1e30, epochs=5), DATA)
    assert found.diverged
    assert found.accuracy == 0.1
    assert found.steps < 5 * math.ceil(len(DATA.train) / 128)
    assert found.pictures == {}


def test_errors_are_not_divergence(monkeypatch):
    def broken(*args, **kwargs):
        raise equinorm.RescaleError("broken")

    monkeypatch.setattr("equinorm.training.step.Step.run_cycles", broken)
    with pytest.raises(equinorm.RescaleError, match="broken"):
        train(replace(TINY, method="enorm"), DATA)


def test_asymmetry_over_time(monkeypatch):
    seen = []

    def epoch(self, *args):
        seen.append(self.hook.c)
        return original(self, *args)

    original = trainer.Trainer.epoch
    monkeypatch.setattr(trainer.Trainer, "epoch", epoch)
    train(replace(TINY, method="enorm", c=1.4, c_end=1.0, epochs=3), DATA)
    assert seen == pytest.approx([1.4, 1.2, 1.0])


def test_pictures_are_the_weights():
    run = Run(data="digits", depth=1, width=20, batch=128, epochs=1, lr=0.01)
    found = train(run, DATA)
    torch.manual_seed(0)
    start = networks.build(run, DATA.shape, DATA.classes)
    assert list(found.pictures) == ["1", "3", "5"]
    before, after = (decode(text) for text in found.pictures["3"])
    assert torch.allclose(torch.from_numpy(before).float(), start[3].weight.abs(), rtol=2e-3)
    assert (before != after).any()
    assert train(replace(run, seed=1), DATA).pictures == {}


def test_centralised_gradients_leave_the_mean_of_each_neuron():
    """Without weight decay the mean of each hidden neuron's weights never changes; the first's does. `centred` keeps it 0."""
    run = Run(method="enorm", depth=2, width=8, epochs=1, lr=0.1, c=1.2, batch=64, centred=True)
    model = networks.build(run, DATA.shape, DATA.classes)
    trainer.Trainer(run, model, DATA.train, DATA.test, DATA, "cpu").train(lambda *_: None)
    first, *inner, last = [float(p.detach().mean(1).abs().max()) for p in model.parameters()]
    assert min(first, last) > 1e-3
    assert max(inner) < 1e-7
    results = {}
    for centralise in (False, True):
        run = Run(depth=2, width=8, epochs=2, lr=0.1, weight_decay=0.0, batch=64, centralise=centralise)
        torch.manual_seed(run.seed)
        model = networks.build(run, DATA.shape, DATA.classes)
        before = [p.detach().mean(1) for p in model.parameters()]
        trainer.Trainer(run, model, DATA.train, DATA.test, DATA, "cpu").train(lambda *_: None)
        after = [p.detach().mean(1) for p in model.parameters()]
        results[centralise] = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    assert min(results[False]) > 1e-4
    assert results[True][0] > 1e-4
    assert max(results[True][1:]) < 1e-6


@pytest.mark.parametrize("identity", [False, True])
def test_skips_that_start_at_the_identity_are_not_centred(identity):
    run = Run(network="resnet18c", method="enorm", width=2, epochs=1, lr=0.01, batch=512, centred=True, identity=identity)
    model = networks.build(run, DATA.shape, DATA.classes)
    trainer.Trainer(run, model, DATA.train, DATA.test, DATA, "cpu").train(lambda *_: None)
    means = {name: float(p.detach().mean((1, 2, 3)).abs().max()) for name, p in model.named_parameters() if p.dim() == 4}
    assert means["stem.0.weight"] > 1e-4
    assert all((value < 1e-6) == (".branch." in name or not identity) for name, value in means.items() if "blocks" in name)


def test_bfloat16_is_for_products_while_training():
    run = Run(depth=1, width=8, epochs=1, batch=512, bfloat16=True)
    model, seen = networks.build(run, DATA.shape, DATA.classes), set()
    model[1].register_forward_hook(lambda layer, _, out: seen.add((layer.training, layer.weight.dtype, out.dtype)))
    trainer.Trainer(run, model, DATA.train, DATA.test, DATA, "cpu").train(lambda *_: None)
    assert seen == {(True, torch.float32, torch.bfloat16), (False, torch.float32, torch.float32)}


def test_the_head_starts_smaller():
    weights = []
    for head in (1.0, 0.1):
        torch.manual_seed(0)
        weights.append(list(networks.build(Run(depth=2, width=8, head=head), DATA.shape, DATA.classes).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(weights[0][:-1], weights[1][:-1], strict=True))
    torch.testing.assert_close(weights[0][-1] * 0.1, weights[1][-1])


SEVERAL = ["baseline", "bn", "path_sgd", "pathcond", "enorm", "enorm_exact", "enorm_bn", "enorm_gn"]
PAIRS = [*((network, method) for network in ("conv", "resnet18") for method in SEVERAL)]
PAIRS += [("resnet18c", "path_sgd"), ("resnet18c", "enorm"), ("resnet18c", "enorm_bn"), ("resnet50", "enorm_bn")]


@pytest.mark.parametrize(("network", "method"), PAIRS)
def test_convolutional_networks_train(network, method, tmp_path):
    """8 channels: with 4, in channels-last memory, PyTorch 2.13 itself crashes in the backward pass on some AVX2 processors."""
    write_cifar10(tmp_path)
    data = in_memory._memory.__wrapped__("cifar10", tmp_path, "cpu")
    run = Run(data="cifar10", network=network, method=method, width=8, batch=25, epochs=2, lr=0.01, momentum=0.9, augment=True)
    found = train(run, data)
    assert not found.diverged
    assert found.steps == 8
    assert found.num_free > 0
    if method == "enorm_exact":
        assert found.curves.residuals[-1] < 1e-3 * found.curves.residuals[0]


def test_adaptive_clipping_bounds_each_hidden_neuron():
    """No neuron's weights change by more than rate × agc × norm in a step; only those behind larger gradients change less."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 2))
    weight.data[0] = 0
    weight.grad = torch.randn(4, 3, 2)
    weight.grad[1] = 0
    weight.grad[2] *= 1e-3
    before = weight.grad.clone()
    networks.clip_units_(weight, 0.01)
    limits = 0.01 * weight.detach().flatten(1).norm(dim=1).clamp(min=1e-3)
    torch.testing.assert_close(weight.grad.flatten(1).norm(dim=1)[[0, 3]], limits[[0, 3]])
    assert torch.equal(weight.grad[1:3], before[1:3])
    one, other = (Run(depth=1, width=8, epochs=1, lr=0.1, weight_decay=0.0, batch=2000, agc=agc) for agc in (0.01, 0.0))
    steps = [_first_steps(run) for run in (one, other)]
    (*clipped, last), (*free, same) = steps
    assert all((step <= 1.001 * 0.1 * 0.01).all() for step in clipped)
    assert all((step > 1.001 * 0.1 * 0.01).any() for step in free)
    torch.testing.assert_close(last, same)  # the last layer is not clipped


def _first_steps(run):
    """How far the first step moves each neuron of each layer, over its norm."""
    torch.manual_seed(run.seed)
    model = networks.build(run, DATA.shape, DATA.classes)
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer.Trainer(run, model, DATA.train, DATA.test, DATA, "cpu").epoch(torch.arange(len(DATA.train)), 0, 1)
    pairs = zip(before, model.parameters(), strict=True)
    return [(after.detach() - weight).norm(dim=1) / weight.norm(dim=1) for weight, after in pairs]
