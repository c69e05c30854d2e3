"""What is checked in several processes at once: each function below is one check, called by all of them."""

import contextlib
import copy
import io
import json
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import equinorm
import equinorm.quantization

CHECKS: dict[int, dict[str, Callable[[], None]]] = {2: {}, 4: {}}
"""By the number of processes, by name."""


def check(*sizes: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        for size in sizes:
            CHECKS[size][function.__name__] = function
        return function

    return add


def run(rank: int, size: int, folder: str, names: Sequence[str], thorough: bool) -> None:
    """Run checks in one process, and write down what failed."""
    global THOROUGH
    THOROUGH = thorough
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    soon = timedelta(minutes=2)  # so that nobody waits for one that has failed
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=soon)
    failed: dict[str, str] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            CHECKS[size][name]()
        except Exception:
            failed[name] = traceback.format_exc()
            break  # the others may wait for this one
    Path(folder, f"{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """A decoder's block: norms with gains, attention, a gated feed-forward part."""

    def __init__(self, width: int = 8, heads: int = 2, hidden: int = 10) -> None:
        super().__init__()
        self.size = width // heads
        self.norm, self.other = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.other(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(11, 8), nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1))


def convolutional() -> nn.Sequential:
    """A grouped convolution, one of one group for each channel, and a linear layer behind a flattened image."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU()),
        *(nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(81, 5), nn.ReLU(), nn.Linear(5, 3)),
    )


TOKENS = torch.arange(12).reshape(2, 6) % 11
ROWS = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
IMAGES = torch.linspace(-1, 1, 384, dtype=torch.float64).reshape(2, 3, 8, 8)


def unbalanced(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same network in every process, its weights far from balanced."""
    torch.manual_seed(1)
    net = make().to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(torch.exp(torch.randn(len(parameter), *[1] * (parameter.dim() - 1)).to(dtype)))
    return net


# ------------------------------------------------------------------------------------------------------------- sharding


def mesh(*names: str) -> Any:
    size = dist.get_world_size()
    shape = {1: (size,), 2: (2, size // 2)}[len(names)]
    if (names, shape) not in _MESHES:
        _MESHES[names, shape] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _MESHES[names, shape]


_MESHES: dict[Any, Any] = {}


def fsdp(net: nn.Module, over: Any = None, whole: bool = False) -> nn.Module:
    """Wrapped by blocks (layers), and at the root, or at the root alone."""
    over = mesh("dp") if over is None else over
    parts = net.blocks if isinstance(net, Decoder) else net
    for part in () if whole else parts:
        if next(part.parameters(), None) is not None:
            fully_shard(part, mesh=over)
    return fully_shard(net, mesh=over)


def tensor_parallel(net: nn.Module, over: Any = None) -> nn.Module:
    over = mesh("tp") if over is None else over
    if isinstance(net, Decoder):
        columns, rows = ("q", "k", "v", "gate", "up"), ("o", "down")
        plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
        for block in net.blocks:
            parallelize_module(block, over, plan)
        return net
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
    return parallelize_module(net, over, plan)


def both(net: nn.Module) -> nn.Module:
    two = mesh("dp", "tp")
    return fsdp(tensor_parallel(net, two["tp"]), two["dp"])


def whole(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, put together."""
    named = [*net.named_parameters(), *net.named_buffers()]
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach() for name, tensor in named}


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], tol: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        apart = float((tensor.double() - right[name].double()).abs().max() / right[name].double().abs().max().clamp_min(1e-30))
        assert apart <= tol, f"{name}: {apart:.2e}"


def assert_alike(left: list[float], right: list[float], name: str) -> None:
    torch.testing.assert_close(torch.tensor(left), torch.tensor(right), rtol=1e-12, atol=0.0, msg=name)


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of collectives, and the bytes that go into them."""
    found = {"calls": 0, "bytes": 0}
    kinds = {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}

    def counting(kind: Callable) -> Callable:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found["calls"] += 1
            found["bytes"] += tensor.numel() * tensor.element_size()
            return kind(tensor, *args, **kwargs)

        return call

    for name, kind in kinds.items():
        setattr(dist, name, counting(kind))
    try:
        yield found
    finally:
        for name, kind in kinds.items():
            setattr(dist, name, kind)


def refused(function: Callable[[], Any], words: str) -> None:
    """One sentence, in every process."""
    with pytest.raises(equinorm.EquinormError, match=re.escape(words)):
        function()


@dataclass(frozen=True)
class Way:
    """A network, how it is sharded, its inputs, and how it is trained."""

    name: str
    make: Callable[[], nn.Module]
    shard: Callable[[nn.Module], nn.Module]
    args: Tensor
    optimizer: str
    options: dict[str, Any]


SHORT = [
    Way("fsdp of layers", mlp, fsdp, ROWS, "sgd", {"c": 1.1}),
    Way("fsdp of convolutions", convolutional, fsdp, IMAGES, "adam", {"p": math.inf}),
    Way("a tensor parallel block", lambda: Decoder(1), tensor_parallel, TOKENS, "sgd", {"method": "two-level", "cycles": 2}),
]

TWO = [
    Way("fsdp of a decoder", Decoder, fsdp, TOKENS, "adam", {}),
    Way("fsdp at the root", mlp, lambda net: fsdp(net, whole=True), ROWS, "sgd", {"p": 1.0, "biases": True}),
    Way("tensor parallel layers", mlp, tensor_parallel, ROWS, "adam", {"power_of_two": True}),
    Way("a tensor parallel decoder", Decoder, tensor_parallel, TOKENS, "sgd", {}),
]

FOUR = [
    Way("fsdp of layers", mlp, fsdp, ROWS, "sgd", {}),
    Way("both", mlp, both, ROWS, "sgd", {"c": 0.9}),
    Way("both of a decoder", Decoder, both, TOKENS, "adam", {}),
]


def ways() -> list[Way]:
    if dist.get_world_size() == 4:
        return FOUR
    return [*SHORT, *TWO] if THOROUGH else SHORT


THOROUGH = False
"""Is a minute worth it?"""


# --------------------------------------------------------------------------------------------------------------- checks


@check(2)
def powers_of_two_leave_every_bit():
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        spread = fully_shard(unbalanced(mlp, torch.float32), mesh=mesh("dp"), mp_policy=policy)
        outputs = spread(ROWS.float()).detach()
        found = equinorm.symmetries(spread, ROWS.float())
        twos = torch.randint(-3, 4, (found.num_free,), generator=torch.Generator().manual_seed(3))
        found.rescale_(twos * torch.tensor(2.0).double().log())
        assert torch.equal(spread(ROWS.float()), outputs)


@check(2)
def plans_of_one_process_are_applied_to_shards_with_gradients_and_states():
    alone, spread = unbalanced(mlp), fsdp(unbalanced(mlp))
    plan = equinorm.symmetries(alone, ROWS).balance().plan()
    nets = [alone, spread]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-2) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            net(ROWS).square().mean().backward()
            optimizer.step()
        plan.apply_(net, optimizer)
        optimizer.step()  # by the gradients as rescaled
    assert_close(whole(spread), whole(alone), 1e-12)
    refused(lambda: plan.apply_(fsdp(unbalanced(convolutional))), "the plan does not fit")


@check(2)
def what_one_process_refuses_all_refuse():
    spread = fsdp(unbalanced(mlp))
    found = equinorm.symmetries(spread, ROWS)
    before = whole(spread)
    z = torch.full((found.num_free,), 0.1 * dist.get_rank(), dtype=torch.float64)
    refused(lambda: found.rescale_(z), "not the same in every process")
    with torch.no_grad():
        if dist.get_rank() == 1:
            spread[0].weight.to_local()[0, 0] = torch.nan
    words = "holds NaN" if dist.get_rank() == 1 else "process 1 refused"
    refused(lambda: found.rescale_(torch.ones(found.num_free)), words)
    after = whole(spread)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "0.weight")


@check(2, 4)
def rescaled_and_balanced_shards_are_those_of_one_process():
    for way in ways():
        name, args = way.name, way.args
        alone, spread = unbalanced(way.make).eval(), way.shard(unbalanced(way.make)).eval()
        own, found = equinorm.symmetries(alone, args), equinorm.symmetries(spread, args)
        assert found.num_free == own.num_free > 0, name
        outputs = spread(args).detach()  # after which fully_shard has the root whole
        z = torch.randn(own.num_free, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        own.rescale_(z)
        found.rescale_(z)
        assert_close(whole(spread), whole(alone), 1e-15)
        torch.testing.assert_close(spread(args), outputs, rtol=1e-12, atol=1e-12)
        for p in (1.0, 3.0, 2.0) if THOROUGH else (2.0,):
            expected = own.balance(p, tol=1e-13)
            with counted() as collectives:
                balance = found.balance(p, tol=1e-13)
            assert balance.converged, name
            assert balance.cycles == expected.cycles, name
            assert float((balance.log_scales - expected.log_scales).abs().max()) <= 1e-12, name
            assert_alike([balance.norm_before, balance.norm_after], [expected.norm_before, expected.norm_after], name)
            axes = 2 if "both" in name else 1  # of the mesh, along each of which a sum is one call
            assert collectives["calls"] <= axes * (4 * balance.cycles + 13), (name, collectives)
            sides = 2 * sum(sum(scaling.shape[:2]) for scaling in own.scalings)
            assert collectives["bytes"] <= 8 * collectives["calls"] * (sides + own.num_free), (name, collectives)
        balance.apply_()
        expected.apply_()
        refused(balance.apply_, "the weights have changed since")
        assert_close(whole(spread), whole(alone), 1e-12)
        torch.testing.assert_close(spread(args), outputs, rtol=1e-12, atol=1e-12)


@check(2)
def half_the_bits_are_enough_for_half_the_digits():
    for dtype, power_of_two, tol in ((torch.float32, False, 5e-7), (torch.bfloat16, True, 0.0)):
        alone, spread = unbalanced(mlp, dtype), fsdp(unbalanced(mlp, dtype))
        own, found = (equinorm.symmetries(net, ROWS.to(dtype)).balance() for net in (alone, spread))
        assert found.converged
        assert float((found.log_scales - own.log_scales).abs().max()) <= 5e-7
        own.apply_(power_of_two=power_of_two)
        found.apply_(power_of_two=power_of_two)
        assert_close(whole(spread), whole(alone), tol)


@check(2)
def dead_channels_are_found_across_processes():
    def pruned() -> nn.Module:
        net = unbalanced(mlp)
        with torch.no_grad():
            net[0].weight[1] = 0.0  # dead; in one process,
            net[2].weight[5] = 0.0  # in the other,
            net[4].weight[:, 2] = 0.0  # and in both
        return net

    alone, spread = pruned(), fsdp(pruned())
    own, found = (equinorm.symmetries(net, ROWS).balance(tol=1e-13) for net in (alone, spread))
    assert found.dead == own.dead
    assert len(own.dead) == 3
    assert float((found.log_scales - own.log_scales).abs().max()) <= 1e-12


@check(2)
def paths_that_change_processes_are_followed_to_their_end():
    def zigzag() -> nn.Module:
        torch.manual_seed(1)
        net = nn.Sequential(
            *(part for _ in range(5) for part in (nn.Linear(7, 7, bias=False), nn.ReLU())), nn.Linear(7, 2)
        ).double()
        with torch.no_grad():
            net[0].weight[4:] = 0.0  # which the second process holds
            for layer in net[2:10:2]:
                layer.weight[:4, :4] = layer.weight[4:, 4:] = 0.0
            net[8].weight[0] = 0.0
        return net

    inputs = torch.randn(3, 7, dtype=torch.float64)
    own, found = (equinorm.symmetries(net, inputs).balance(tol=1e-13) for net in (zigzag(), fsdp(zigzag())))
    assert found.dead == own.dead
    assert len(own.dead) > 3 * 5
    assert float((found.log_scales - own.log_scales).abs().max()) <= 1e-12


@check(2)
def what_needs_whole_weights_is_refused():
    found = equinorm.symmetries(fsdp(unbalanced(mlp)), ROWS)
    refused(lambda: found.balance(float("inf")), "p = inf looks for single weights")
    refused(lambda: found.balance(method="cyclic"), "method='cyclic'")
    refused(lambda: equinorm.symmetries(found.model, ROWS, opaque="0"), "is sharded, and what opaque modules (0)")
    faint = unbalanced(mlp)
    with torch.no_grad():
        faint[2].weight[0, 1:3] = 1e-6  # of one process, to the 90th power
    words = "entries of 2.weight underflow" if dist.get_rank() == 0 else "process 0 refused"
    refused(lambda: equinorm.symmetries(fsdp(faint), ROWS).balance(90.0), words)


def trained(net: nn.Module, args: Tensor, make: Callable, steps: int = 4, **options: Any) -> tuple[Any, Any, list[float]]:
    """The hook, the optimizer and residuals after some steps on the same numbers in every process."""
    optimizer = make(net.parameters())
    hook = equinorm.ENorm(optimizer, net, args, **options)
    residuals = [hook.residual()]
    for _ in range(steps):
        residuals.append(step(net, optimizer, hook, args))
    return hook, optimizer, residuals


def step(net: nn.Module, optimizer: Any, hook: Any, args: Tensor) -> float:
    optimizer.zero_grad()
    net(args).double().square().mean().backward()
    optimizer.step()
    return hook.residual()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-2)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=1e-2)


OPTIMIZERS = {"sgd": sgd, "adam": adam}


@check(2, 4)
def trajectories_are_those_of_one_process():
    for way in ways():
        name, optimizer = way.name, OPTIMIZERS[way.optimizer]
        alone, spread = unbalanced(way.make), way.shard(unbalanced(way.make))
        _, first, expected = trained(alone, way.args, optimizer, **way.options)
        with counted() as collectives:
            _, second, residuals = trained(spread, way.args, optimizer, **way.options)
        assert residuals[-1] < residuals[0], name
        torch.testing.assert_close(residuals, expected, rtol=1e-9, atol=1e-12, msg=name)
        assert_close(whole(spread), whole(alone), 1e-11)
        for own, other in zip(alone.parameters(), spread.parameters(), strict=True):
            assert_close(_whole_state(second.state[other]), _whole_state(first.state[own]), 1e-10)
        sums = 4 if isinstance(alone, Decoder) else len(expected) - 1  # a cycle; and one for each residual and each step
        most = 4 + 4 * (2 + sums * way.options.get("cycles", 1))
        assert collectives["calls"] <= (2 if "both" in name else 1) * most, (name, collectives)


def _whole_state(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


@check(2)
def float32_trajectories_are_those_of_one_process():
    alone, spread = unbalanced(mlp, torch.float32), fsdp(unbalanced(mlp, torch.float32))
    for net in (alone, spread):
        trained(net, ROWS.float(), sgd)
    assert_close(whole(spread), whole(alone), 2e-6)  # four steps, each rounded otherwise


@check(2)
def training_resumes_from_a_distributed_checkpoint():
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for make in (sgd, adam):
        net = fsdp(unbalanced(mlp))
        hook, optimizer, _ = trained(net, ROWS, make)
        model_state, optimizer_state = get_state_dict(net, optimizer)
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        dcp.save({"model": model_state, "optimizer": optimizer_state, "enorm": hook.state_dict()}, checkpoint_id=folder[0])
        for _ in range(2):
            step(net, optimizer, hook, ROWS)

        again = fsdp(unbalanced(mlp))
        other = make(again.parameters())
        resumed = equinorm.ENorm(other, again, ROWS)
        model_state, optimizer_state = get_state_dict(again, other)
        state = {"model": model_state, "optimizer": optimizer_state, "enorm": resumed.state_dict()}
        dcp.load(state, checkpoint_id=folder[0])
        set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        resumed.load_state_dict(state["enorm"])
        assert resumed.steps == 4
        for _ in range(2):
            step(again, other, resumed, ROWS)
        assert_close(whole(again), whole(net), 1e-13)


@check(2)
def states_of_the_hook_go_from_whole_models_to_shards_and_back():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    shapes = {"whole": lambda net: net, "fsdp": fsdp, "tensor parallel": tensor_parallel}
    for first, second in (("whole", "fsdp"), ("fsdp", "whole"), ("fsdp", "tensor parallel")):
        net = shapes[first](unbalanced(mlp))
        hook, optimizer, _ = trained(net, ROWS, sgd)
        weights, states = copy.deepcopy(get_state_dict(net, optimizer, options=options))
        again = shapes[second](unbalanced(mlp))
        other = sgd(again.parameters())
        resumed = equinorm.ENorm(other, again, ROWS)
        set_state_dict(again, other, model_state_dict=weights, optim_state_dict=states, options=options)
        resumed.load_state_dict(hook.state_dict())
        for _ in range(2):
            step(net, optimizer, hook, ROWS)
            step(again, other, resumed, ROWS)
        assert_close(whole(again), whole(net), 1e-13)


@check(2)
def callbacks_of_trainers_write_whole_states_from_one_process():
    """What the first process writes is what one process alone writes; sharded training resumes from it."""
    from equinorm.integrations.transformers import FILE, ENormCallback

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    state, files = SimpleNamespace(global_step=4), {}
    for kind, sharded in {"alone": lambda net: net, "spread": fsdp}.items():
        net, output = sharded(unbalanced(mlp)), Path(folder[0], kind)
        files[kind] = output / "checkpoint-4" / FILE
        files[kind].parent.mkdir(parents=True, exist_ok=True)
        optimizer, callback = sgd(net.parameters()), ENormCallback(ROWS, c=1.1)
        arguments = {"output_dir": str(output), "save_only_model": False, "resume_from_checkpoint": None}
        arguments = SimpleNamespace(**arguments, should_save=dist.get_rank() == 0)
        callback.on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=net, optimizer=optimizer)
        for _ in range(4):
            step(net, optimizer, callback.hook, ROWS)
        callback.on_save(arguments, state, None, model=net)
        right = _parts(callback.hook.state_dict())
        callback.on_train_end(arguments, state, None)
        dist.barrier()
        resumed = ENormCallback(ROWS, c=1.1)
        resumed.on_train_begin(arguments, state, None, model=net, optimizer=optimizer)
        left = _parts(resumed.hook.state_dict())
        assert left
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    alone, spread = (torch.load(file, weights_only=True) for file in files.values())
    assert_close(_parts(spread["hook"]), _parts(alone["hook"]), 1e-12)


def _parts(state: dict[str, Any]) -> dict[str, Tensor]:
    """The part of each average that is weight decay, whole."""
    parts = {f"{name} {key}": part for name, states in state["decay"].items() for key, part in states.items()}
    return {f"{name} {power}": whole_part for name, found in parts.items() for power, whole_part in _whole_state(found).items()}


@check(2)
def the_page_prints_what_it_says():
    text = (Path(__file__).parents[2] / "docs" / "how-to-sharded.md").read_text("utf-8")
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    scope: dict[str, Any] = {"__name__": "page"}
    printed = io.StringIO()
    own = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *_: None  # these processes are a group already
    try:
        with contextlib.redirect_stdout(printed):
            for kind, block in blocks:
                if kind == "python":
                    exec(block, scope)
    finally:
        dist.init_process_group, dist.destroy_process_group = own
    expected = "".join(block for kind, block in blocks if kind == "text").split()
    words = printed.getvalue().split()
    if dist.get_rank() > 0:
        assert not words
        return
    assert len(words) == len(expected), words
    for word, wanted in zip(words, expected, strict=True):
        with contextlib.suppress(ValueError):
            assert abs(float(word) - float(wanted)) <= 0.03 * abs(float(wanted)) + 1e-5, (word, wanted, words)
            continue
        assert word == wanted, words


@check(2)
def copies_in_every_process_stay_alike():
    from torch.distributed._composable.replicate import replicate

    for wrap in (nn.parallel.DistributedDataParallel, replicate):
        net = wrap(unbalanced(mlp))
        trained(net, ROWS + dist.get_rank(), sgd)
        for tensor in whole(net).values():
            first = tensor.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, tensor), wrap


@check(2)
def two_networks_are_compared_where_they_are_whole():
    pair = fsdp(unbalanced(mlp)), fsdp(unbalanced(mlp))
    said = "0.weight of FSDPSequential is sharded over processes; "
    for compare in (equinorm.equivalence, equinorm.align, lambda a, b, _: equinorm.interpolate(a, b, 0.5)):
        refused(lambda compare=compare: compare(*pair, ROWS), f"{said}a comparison needs whole tensors")
    for copied in (equinorm.balance, equinorm.canonical, equinorm.quantization.prepare):
        refused(lambda copied=copied: copied(pair[0].eval(), ROWS), f"{said}a copy needs whole tensors")


@check(2)
def what_training_cannot_follow_is_refused():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = fsdp(unbalanced(mlp))
    refused(lambda: equinorm.ENorm(sgd(net.parameters()), net, ROWS, compile=True), "compile=True is for models that one")
    refused(lambda: equinorm.ENorm(sgd(net.parameters()), net, ROWS, averages=mlp()), "averages of a sharded model")
    net = nn.parallel.DistributedDataParallel(unbalanced(mlp))
    zero = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam)
    refused(lambda: equinorm.ENorm(zero, net, ROWS), "ZeroRedundancyOptimizer keeps the state of each parameter in one process")


def failures(count: int, names: Sequence[str], thorough: bool = False) -> list[dict[str, str]]:
    """What failed in each of several new processes that run these checks, by name."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (count, folder, names, thorough), count)  # pyright: ignore[reportPrivateImportUsage]
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)]


if __name__ == "__main__":  # number of processes, and parts of names
    size, *parts = sys.argv[1:]
    names = [name for name in CHECKS[int(size)] if not parts or any(part in name for part in parts)]
    for failed in failures(int(size), names, thorough=True):
        sys.stdout.write("\n".join([*failed, *failed.values()] or ["ok"]) + "\n")
