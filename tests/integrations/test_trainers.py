"""ENorm in Lightning and in Hugging Face's Trainer: the same steps as in a plain loop, and resumed runs that go on bitwise."""
# ruff: noqa: E402 -- what is imported here depends on what is installed

import copy
import importlib.abc
import importlib.util
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import equinorm
from equinorm.integrations import first_installed

ROOT = Path(__file__).parents[2]
for package in ("lightning", "transformers", "accelerate"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
if importlib.util.find_spec("torchvision") is not None:  # both import it, and it may come without its operators
    from zoo import from_torchvision as zoo_torchvision

    zoo_torchvision.import_models()

import lightning.pytorch as pl
import pytorch_lightning
import transformers

from equinorm.integrations.lightning import ENorm
from equinorm.integrations.transformers import FILE, ENormCallback

# Lightning gives this advice on machines with more than two cores.
pytestmark = pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)

DECAY = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
"""Coupled weight decay in a momentum buffer, which only ENorm's own state can restore."""


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def data(count: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].sin())


def same(one: nn.Module, two: nn.Module) -> bool:
    others = two.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


# ----------------------------------------------------------------------------------------------------------- lightning


def lightning_module(library=pl, **changes):
    class Net(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = body()
            self.example_input_array = torch.zeros(2, 5)

        def forward(self, x):
            return self.body(x)

        def training_step(self, batch, index):
            return (self.body(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self):
            return optim.SGD(self.parameters(), **DECAY)

    return type("Net", (Net,), changes)()


def fit(module, callback, epochs: int = 1, library=pl, checkpoint=None, others=(), **options):
    trainer = library.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=[*others, callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(data(), batch_size=4), ckpt_path=checkpoint)
    return trainer


def averaging() -> dict:
    swa = {"swa_lrs": 1e-30, "swa_epoch_start": 1, "annealing_epochs": 1}
    return {
        "EMA": pl.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9)),
        "SWA": pl.callbacks.StochasticWeightAveraging(**swa),
    }


@pytest.mark.parametrize("kind", averaging())
@pytest.mark.parametrize("name", [None, "body"])
def test_lightning_averages_move_along(kind, name):
    """Without a learning rate all weights are the same network, and so is their average."""
    module = lightning_module(configure_optimizers=lambda self: optim.SGD(self.parameters(), lr=0.0))
    with torch.no_grad():
        module.body[0].weight.mul_(8)
    inputs = torch.randn(64, 5)
    before = module(inputs).detach()
    callback = ENorm(torch.zeros(2, 5), module=name, every=3)
    fit(module, callback, epochs=4, others=[averaging()[kind]])
    torch.testing.assert_close(module(inputs), before, rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(callback)
    assert twin.hook is None
    assert callback.hook.steps > 3


def test_lightning_averages_that_are_not_found(monkeypatch):
    monkeypatch.setattr(pl.callbacks.WeightAveraging, "setup", lambda *_, **__: None)
    with pytest.raises(equinorm.RescaleError, match=r"WeightAveraging averages weights.*ENorm\(averages=\.\.\.\)"):
        fit(lightning_module(), ENorm(), others=[averaging()["EMA"]])


def plain_loop(model: nn.Module, accumulate: int, clip: float, dtype: torch.dtype) -> equinorm.ENorm:
    optimizer = optim.SGD(model.parameters(), **DECAY)
    hook = equinorm.ENorm(optimizer, model, (torch.zeros(2, 5, dtype=dtype),), c=1.1)
    for index, (inputs, targets) in enumerate(DataLoader(data(), batch_size=4)):
        ((model(inputs.to(dtype)) - targets.to(dtype)).square().mean() / accumulate).backward()
        if (index + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return hook


@pytest.mark.parametrize("library", [pl, pytorch_lightning], ids=["lightning", "pytorch_lightning"])
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "32-true"), (3, "64-true")])
def test_lightning_steps_as_a_plain_loop(library, accumulate, precision):
    dtype = torch.float64 if precision == "64-true" else torch.float32

    def forward(self, x):
        assert x.dtype == dtype, "the example must be cast like a batch"
        return self.body(x)

    module, callback, model = lightning_module(library, forward=forward), ENorm(c=1.1), body().to(dtype)
    fit(module, callback, 1, library, accumulate_grad_batches=accumulate, gradient_clip_val=0.1, precision=precision)
    hook = plain_loop(model, accumulate, 0.1, dtype)
    assert same(model, module.body)
    assert callback.hook.steps == hook.steps == 12 // accumulate


@pytest.mark.parametrize("optimizer", [optim.Adam])
def test_lightning_resumes_bitwise(tmp_path, optimizer):
    options = DECAY if optimizer is optim.SGD else {"lr": 0.05, "weight_decay": 0.1}
    change = {"configure_optimizers": lambda self: optimizer(self.parameters(), **options)}
    whole = lightning_module(**change)
    fit(whole, ENorm(every=5), 3)
    first = lightning_module(**change)
    fit(first, ENorm(every=5), 1).save_checkpoint(tmp_path / "one.ckpt")
    assert not same(first, whole)
    resumed, callback = lightning_module(**change), ENorm(every=5)
    fit(resumed, callback, 3, checkpoint=tmp_path / "one.ckpt")
    assert same(resumed, whole)
    assert callback.hook.steps == 36
    again = lightning_module(**change)
    fit(again, callback, 3)  # a callback starts afresh in training that starts afresh
    assert same(again, whole)


def test_lightning_removes_the_hook():
    module, callback = lightning_module(), ENorm()
    optimizer = fit(module, callback).optimizers[0]
    assert callback.hook.optimizers == (optimizer,)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks

    def fail(self, batch, index):
        raise ZeroDivisionError

    module, callback = lightning_module(training_step=fail), ENorm()
    with pytest.raises(ZeroDivisionError):
        fit(module, callback)
    assert not callback.hook.optimizers[0]._optimizer_step_post_hooks


def test_lightning_with_several_optimizers():
    def both(self):
        return [optim.SGD(self.parameters(), lr=0.0), optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)]

    def step(self, batch, index):
        loss = (self.body(batch[0]) - batch[1]).square().mean()
        self.manual_backward(loss)
        self.optimizers()[0].step()

    changes = {"configure_optimizers": both, "training_step": step, "automatic_optimization": False}
    with pytest.raises(equinorm.RescaleError, match="Net has 2 optimizers; choose one"):
        fit(lightning_module(**changes), ENorm())
    with pytest.raises(equinorm.RescaleError, match="optimizer=2, but Net has 2"):
        fit(lightning_module(**changes), ENorm(optimizer=2))
    callback, module = ENorm(optimizer=0, cycles=2), lightning_module(**changes)
    fit(module, callback)
    assert callback.hook.steps == 12
    assert callback.hook.residual() < 1e-6  # of float32
    assert equinorm.deviation(module.body, body(), (torch.ones(2, 5),)) < 1e-5
    assert ENorm(optimizer=0).state_key != ENorm(optimizer=1).state_key


def test_lightning_with_several_optimizers_of_one_model():
    def two(net):
        matrices, vectors = ([p for p in net.parameters() if (p.dim() > 1) == flag] for flag in (True, False))
        return [optim.SGD(matrices, **DECAY), optim.Adam(vectors, 0.01)]

    def step(self, batch, index):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward((self.body(batch[0]) - batch[1]).square().mean())
        for optimizer in optimizers:
            optimizer.step()

    changes = {"configure_optimizers": two, "training_step": step, "automatic_optimization": False}
    callback, module = ENorm(optimizer=[0, 1]), lightning_module(**changes)
    fit(module, callback)
    net = body()
    optimizers = two(net)
    hook = equinorm.ENorm(optimizers, net, (torch.zeros(2, 5),))
    for inputs, targets in DataLoader(data(), batch_size=4):
        net.zero_grad()
        (net(inputs) - targets).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert callback.hook.steps == hook.steps == 12
    assert same(module.body, net)
    with pytest.raises(equinorm.RescaleError, match=r"optimizer=\[0, 2\], but Net has 2"):
        fit(lightning_module(**changes), ENorm(optimizer=[0, 2]))


def test_lightning_example_inputs_and_submodules():
    def forward(self, x, scale):
        assert scale == 2.0, "the example's own"
        return self.body(x * scale)

    def impossible(self, x):
        return self.body(x) if x.sum() > 0 else x

    named = {"x": torch.zeros(2, 5), "scale": 2.0}
    plain = lightning_module()
    fit(plain, ENorm())
    for changes, callback in (
        ({"forward": forward}, ENorm(kwargs=named)),
        ({"forward": forward}, ENorm((torch.zeros(2, 5), 2.0))),
        ({"forward": impossible}, ENorm(torch.zeros(2, 5), module="body")),
    ):
        module = lightning_module(**changes)
        module.example_input_array = None
        fit(module, callback)
        assert same(module, plain)
    module = lightning_module(forward=forward)
    module.example_input_array = named
    fit(module, ENorm())
    assert same(module, plain)
    module.example_input_array = None
    with pytest.raises(equinorm.ExportError, match="no example inputs for Net"):
        fit(module, ENorm())
    bare = lightning_module(forward=pl.LightningModule.forward)
    bare.example_input_array = None
    with pytest.raises(equinorm.ExportError, match=r"Net has no forward of its own.*as in ENorm\(module='body'\), or write"):
        fit(bare, ENorm(torch.zeros(2, 5)))
    with pytest.raises(equinorm.ExportError, match="branches on the value of a tensor"):
        fit(lightning_module(forward=impossible), ENorm())


# -------------------------------------------------------------------------------------------------------- transformers


class Regression(nn.Module):
    """What the Trainer takes: a loss and outputs."""

    def __init__(self):
        super().__init__()
        self.body = body()

    def forward(self, x, labels=None):
        outputs = self.body(x)
        return {"logits": outputs} if labels is None else {"loss": (outputs - labels).square().mean(), "logits": outputs}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def train(model, callback, folder, steps=6, optimizer=None, resume=None, rows=None, **options):
    rows = [{"x": x, "labels": y} for x, y in data()] if rows is None else rows
    settings = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **{**settings, **options},
    )
    optimizers = (None if optimizer is None else optimizer(model), None)
    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=optimizers, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sgd(model):
    return optim.SGD(model.parameters(), **DECAY)


def language_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, **none)
        )
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, max_position_embeddings=8, **sizes))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_trainer_steps_as_a_plain_loop(kind, tmp_path):
    """AdamW, the Trainer's own; the hook follows steps, not the batches that a step accumulates.

    The Trainer divides one sum of losses, the loop adds means, both in float32, hence 1e-5. With this ε AdamW does not blow up
    the rounding errors that are the gradients of GPT-2's biases of keys.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for ids in torch.randint(16, (32, 6), generator=generator):
        rows.append({"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])})  # nothing predicts the first
    model, callback = language_model(kind).double(), ENormCallback(c=1.1)
    plain = copy.deepcopy(model)
    options = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-4, "save_strategy": "no"}
    train(model, callback, tmp_path, 4, rows=rows, **options)
    optimizer = optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.0)
    example = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": False}
    hook = equinorm.ENorm(optimizer, plain, (), example, c=1.1)
    start = hook.residual()
    for step in range(4):
        for part in range(2):
            few = rows[8 * step + 4 * part :][:4]
            batch = {name: torch.stack([row[name] for row in few]) for name in few[0]}
            (plain(**batch, use_cache=False).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert callback.hook.steps == 4
    assert callback.hook.residual() == pytest.approx(hook.residual(), rel=1e-3)
    assert hook.residual() < start / 2
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [None], ids=["AdamW"])
def test_trainer_resumes_bitwise(tmp_path, optimizer):
    def callback():
        return ENormCallback(torch.zeros(2, 5), every=2)

    whole = Regression()
    train(whole, callback(), tmp_path / "whole", 6, optimizer)
    first = Regression()
    train(first, callback(), tmp_path / "parts", 3, optimizer)
    assert not same(first, whole)
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    resumed, hooked = Regression(), callback()
    train(resumed, hooked, tmp_path / "parts", 6, optimizer, resume=True)
    assert same(resumed, whole)
    assert hooked.hook.steps == 6
    moved = tmp_path / "elsewhere" / "checkpoint-3"
    shutil.copytree(checkpoint, moved)
    resumed = Regression()
    named = {"resume": str(moved), "resume_from_checkpoint": str(moved)}
    train(resumed, callback(), tmp_path / "new", 6, optimizer, **named)
    assert same(resumed, whole)


def test_trainer_resumes_without_a_state_and_never_with_a_wrong_one(tmp_path):
    def callback():
        return ENormCallback(torch.zeros(2, 5), every=2)

    whole = Regression()
    train(whole, callback(), tmp_path / "whole", 6)
    train(Regression(), callback(), tmp_path / "parts", 3)
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    state = torch.load(checkpoint / FILE)
    torch.save({**state, "weights": state["weights"] + 1}, checkpoint / FILE)
    with pytest.raises(equinorm.RescaleError, match="saved with other weights"):
        train(Regression(), callback(), tmp_path / "parts", 6, resume=True)
    (checkpoint / FILE).unlink()
    resumed = Regression()
    train(resumed, callback(), tmp_path / "parts", 6, resume=True)
    assert same(resumed, whole)  # AdamW's averages hold no weight decay: the number of steps is enough
    train(Regression(), callback(), tmp_path / "sgd", 3, sgd)
    (tmp_path / "sgd" / "checkpoint-3" / FILE).unlink()
    with pytest.raises(equinorm.RescaleError, match="load its state_dict"):
        train(Regression(), callback(), tmp_path / "sgd", 6, sgd, resume=True)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 5), (torch.zeros(2, 5),), [torch.zeros(2, 5)]])
def test_trainer_removes_the_hook_and_writes_nothing_without_checkpoints(tmp_path, inputs):
    callback = ENormCallback(inputs)
    train(Regression(), callback, tmp_path, 2, save_strategy="no")
    assert callback.hook.steps == 2
    assert not callback.hook.optimizers[0]._optimizer_step_post_hooks
    train(Regression(), callback, tmp_path, 3, save_only_model=True)
    assert callback.hook.steps == 3
    assert not list(tmp_path.rglob(FILE))


def test_trainer_without_example_inputs(tmp_path):
    with pytest.raises(equinorm.ExportError, match="no example inputs for Regression"):
        train(Regression(), ENormCallback(), tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": 0} for _ in range(8)]
    with pytest.raises(equinorm.ExportError, match="no example inputs for ViTForImageClassification"):
        train(model, ENormCallback(), tmp_path, rows=images)
    callback = ENormCallback(kwargs={"pixel_values": torch.zeros(1, 3, 8, 8)})
    train(model, callback, tmp_path, 2, rows=images)
    assert callback.hook.steps == 2
    assert callback.hook.symmetries.num_free >= 16


# ------------------------------------------------------------------------------------------------ packages and the page


def test_missing_packages_are_named():
    assert (
        first_installed(["equinorm_missing.part", "equinorm.rescaling.model_guard"], "x")
        is sys.modules["equinorm.rescaling.model_guard"]
    )
    with pytest.raises(ImportError, match=re.escape("needs no_such or nor_this: pip install 'equinorm[lightning]'")):
        first_installed(["no_such.part", "nor_this"], "lightning")


@pytest.mark.parametrize("module", ["lightning", "transformers"])
def test_integrations_without_their_package(module, monkeypatch):
    for name in (f"equinorm.integrations.{module}", "lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    with pytest.raises(ImportError, match=re.escape(f"pip install 'equinorm[{module}]'")):
        importlib.import_module(f"equinorm.integrations.{module}")


class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("lightning", "pytorch_lightning", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_page_on_training_loops(monkeypatch, tmp_path):
    """Every Python block of the page runs, one after the other."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "training-loops.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 12
    one_process = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # as torchrun sets them
    names: dict = {}
    for block in blocks:
        with monkeypatch.context() as patched:
            for name, value in one_process.items() if "init_process_group" in block else ():
                patched.setenv(name, value)
            exec(compile(block, "training-loops.md", "exec"), names)
    assert names["hook"].steps == 1
    assert names["trainer"].state.global_step == 4


@pytest.mark.parametrize("callback", [ENorm, ENormCallback])
def test_options_are_checked_when_a_callback_is_made(callback):
    callback(torch.zeros(2, 5), p=1.0, c=1.1, every=2)
    with pytest.raises(TypeError, match=r"ENorm takes no 'cycle'\. It takes p, c, cycles, every, "):
        callback(torch.zeros(2, 5), cycle=3)
