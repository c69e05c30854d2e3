"""Images: what is read, held out, cropped and standardised."""

import importlib.util
import pickle
import sys

import numpy as np
import pytest
import torch
from experiment_tools import TINY, digits, write_cifar10

from equinorm.experiments.config import ExperimentError, Run
from equinorm.experiments.datasets import folders, in_memory
from zoo import from_torchvision as zoo_torchvision

CIFAR = Run(data="cifar10")


@pytest.fixture(autouse=True)
def forget():
    in_memory._memory.cache_clear()


def everything(images, size=64, **options):
    parts = list(images.batches(size, **options))
    return torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])


def test_digits():
    data = digits()
    assert (len(data.train), len(data.test), data.shape, data.classes) == (1438, 359, (1, 8, 8), 10)
    images, _ = everything(data.train)
    assert abs(float(images.mean())) < 0.02
    assert float(images.std()) == pytest.approx(1, abs=0.02)


def test_held_out_images_are_apart():
    data = digits()
    rows = torch.cat([data.kept.rows, data.held_out.rows])
    assert torch.equal(rows.sort().values, torch.arange(1438))
    assert len(data.held_out) == 287
    kept, held_out = in_memory.split(50_000)
    assert (len(kept), len(held_out)) == (45_000, 5_000)
    assert not set(kept.tolist()) & set(held_out.tolist())
    assert torch.equal(held_out, in_memory.split(50_000)[1])  # always the same


def test_cifar10_is_read_and_standardised(tmp_path):
    images, labels = write_cifar10(tmp_path)
    data = in_memory.load(CIFAR, tmp_path)
    assert (len(data.train), len(data.test), data.shape, data.classes) == (100, 20, (3, 32, 32), 10)
    found, targets = everything(data.train, size=7)
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (in_memory.CIFAR_MEAN, in_memory.CIFAR_STD))
    expected = (images.double() / 255 - mean) / std
    assert float((found - expected).abs().max()) < 1e-6
    assert torch.equal(targets, labels)
    assert in_memory.load(CIFAR, tmp_path / "cifar-10-batches-py").digest == data.digest


def test_order_decides_what_comes_when():
    data = digits()
    order = torch.randperm(len(data.held_out), generator=torch.Generator().manual_seed(3))
    images, labels = everything(data.held_out, order=order)
    plain, plain_labels = everything(data.held_out)
    assert torch.equal(images, plain[order])
    assert torch.equal(labels, plain_labels[order])


def test_crops_are_windows_of_the_padded_image():
    """Every crop is found, flipped or not, at exactly one place; all 9 × 9 places and both ways occur."""
    torch.manual_seed(0)
    images = torch.randint(1, 256, (400, 3, 32, 32), dtype=torch.uint8)
    found = in_memory.crop(images)
    assert found.shape == (400, 3, 28, 28)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    windows = padded.unfold(2, 28, 1).unfold(3, 28, 1)  # image, channel, row, column, 28, 28
    assert windows.shape[2:4] == (9, 9)
    places = []
    for image, own in zip(found, windows, strict=True):
        for flipped in (False, True):
            target = image.flip(-1) if flipped else image
            hits = (own == target[:, None, None]).all(-1).all(-1).all(0).nonzero()
            places += [(*hit, flipped) for hit in hits.tolist()]
    assert len(places) == 400
    assert {row for row, _, _ in places} == {column for _, column, _ in places} == set(range(9))
    assert 150 < sum(flipped for *_, flipped in places) < 250


def test_scoring_takes_the_middle(tmp_path):
    write_cifar10(tmp_path)
    data = in_memory.load(CIFAR, tmp_path)
    whole, _ = everything(data.test)
    middle, _ = everything(data.test, augment=True)
    assert torch.equal(middle, whole[..., 2:30, 2:30])
    order = torch.arange(len(data.test))
    assert not torch.equal(everything(data.test, order=order, augment=True)[0], middle)


def test_files_that_are_not_cifar10_are_refused(tmp_path):
    with pytest.raises(ExperimentError, match="--data"):
        in_memory.load(CIFAR, None)
    with pytest.raises(ExperimentError, match=r"data_batch_1.*official layout"):
        in_memory.load(CIFAR, tmp_path)
    write_cifar10(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    for content in (b"no pickle", pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}), pickle.dumps([1])):
        batch.write_bytes(content)
        with pytest.raises(ExperimentError, match="data_batch_3"):
            in_memory.load(CIFAR, tmp_path)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_pickles_cannot_run_code(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ExperimentError, match=r"wants to import builtins\.exec"):
        in_memory.load(CIFAR, tmp_path)


# ----------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    zoo_torchvision.import_models()
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((300 + 10 * number, 280, 3), 60 + 120 * label, np.uint8)
                pixels[:150] = random.integers(0, 256, 3)
                image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def test_folders_of_images(folder):
    data = folders.load(Run(data="images", network="resnet18"), folder)
    assert (len(data.train), len(data.kept), len(data.held_out), len(data.test)) == (20, 16, 4, 6)
    assert (data.shape, data.classes) == ((3, 224, 224), 2)
    images, labels = everything(data.test, size=4)
    assert images.shape == (6, 3, 224, 224)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    shade = torch.tensor([(60 + 120 * 0) / 255])
    lowest = (shade - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(images[0, :, -1, 0], lowest, atol=1e-5)  # the last row, standardised with ImageNet's constants
    again, _ = everything(data.test, size=4)
    assert torch.equal(images, again)
    torch.manual_seed(0)
    order = torch.arange(20)
    one, one_labels = everything(data.train, order=order)
    two, two_labels = everything(data.train, order=order)
    assert torch.equal(one_labels, two_labels)
    assert not torch.equal(one, two)  # random crops and flips


def test_folders_need_both_parts(folder):
    for path in sorted((folder / "val" / "dog").iterdir()):
        path.unlink()
    with pytest.raises(ExperimentError, match="val"):
        folders.load(Run(data="images", network="resnet18"), folder)


def test_folders_need_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ExperimentError, match="torchvision"):
        folders.load(Run(data="images", network="resnet18"), tmp_path)


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ExperimentError, match="scikit-learn"):
        in_memory.load(TINY, None)
