"""Networks that run: every layer of every network against torch, weights from files, fusion, the command."""

import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from bench import machine
from bench.__main__ import main
from bench.forward import inputs, maps, profile
from bench.networks import NETWORKS, Model, draw_weights, fuse, get_network, load_weights
from bench.networks.model import count_bytes
from bench.networks.network import INDICES, Draft
from bench.networks.nodes import (
    Activation,
    AdaptivePool,
    Add,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Flatten,
    LayerScale,
    Linear,
    MaxUnpool,
    Pool,
)
from fastconv import reference
from fastconv.borrowing import Loan
from fastconv.problem import ConvError
from tests import torch_twin
from tests.backends import EMULATOR
from tests.compare import assert_bounded, assert_exact, normals
from tests.places import entering

# So that all networks are checked in a minute: inputs of other sizes that they accept, narrower layers.
SMALL = {
    "alexnet": 67, "zfnet": 95, "vgg16": 32, "vgg19": 32, "googlenet": 64, "googlenet_2014": 64,
    "resnet18": 64, "resnet50": 64, "resnet152": 32, "resnext50_32x4d": 32, "mobilenet_v1": 64,
    "convnext_t": 32, "replknet_31b": 32, "yolo_v1": 64, "vit_b16_patches": 64,
}  # fmt: skip
NARROW = {"deconvnet", "unet"}  # their cropping and unpooling ask for their own size


def shrink(network):
    """The same layers, with fewer numbers in them."""
    channels, *spatial = network.input_shape
    spatial = [SMALL.get(network.name, size) for size in spatial]
    layers = [replace(layer, node=narrow(network, layer.node)) for layer in network.layers]
    return replace(network, input_shape=(channels, *spatial), layers=tuple(layers))


def narrow(network, node):
    if isinstance(node, Linear) and node.features == 4096:
        return replace(node, features=256)
    if isinstance(node, Conv) and network.name in NARROW and node.channels >= 64:
        return replace(node, channels=node.channels // 32)
    return node


# Layer by layer -----------------------------------------------------------------------------------


class TorchJudge:
    """Compares every layer with torch on the inputs that the layer had, so that no error is carried on."""

    def __init__(self, torch, network, weights):
        self.torch, self.weights, self.names = torch, weights, []
        self.indices = {}

    def __call__(self, step):
        node, name = step.layer.node, step.layer.name
        ours = [self._tensor(array) for array in step.inputs]
        own = {**node.parameters(step.inputs[0].shape[1:]), **node.buffers(step.inputs[0].shape[1:])}
        arrays = {each: self._tensor(self.weights[f"{name}.{each}"]) for each in own}
        if isinstance(node, MaxUnpool):
            ours.append(self.indices[node.pool])
        expected = torch_twin.compute(self.torch, node, ours, arrays)
        if isinstance(expected, tuple):
            expected, self.indices[name] = expected
        plan = profile.find_plan(step.layer, step.inputs[0])
        algorithm = plan.error_bound() if plan else None
        bound = torch_twin.bound(self.torch, node, ours, arrays, expected, algorithm)
        try:
            assert_bounded(step.output, expected.numpy(), bound.double().numpy(), "float32")
        except AssertionError as error:
            raise AssertionError(f"{name} ({node}): {error}") from None
        self.names.append(name)

    def _tensor(self, array):
        return self.torch.from_numpy(np.ascontiguousarray(array)).double()


def judge(network, batch=1):
    torch = pytest.importorskip("torch", reason="torch, which judges the layers, is not installed")
    weights = draw_weights(network, seed=1)
    x = np.random.default_rng(0).standard_normal((batch, *network.input_shape), np.float32)
    watch = TorchJudge(torch, network, weights)
    output = Model(network, weights).run(x, watch)
    assert watch.names == [layer.name for layer in network.layers]
    assert np.isfinite(output).all()
    assert np.abs(output).max() > 0
    return output


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_that_of_torch(name):
    judge(shrink(NETWORKS[name]))


def test_a_wrong_element_of_one_layer_is_seen(monkeypatch):
    """The comparison can fail: by one element, of a layer in the middle, that is off by a thousandth."""
    bind = Pool.bind

    def bind_wrongly(node, shape, arrays):
        def run(x):
            y = bind(node, shape, arrays)(x)
            y.flat[-1] *= 1.001
            return y

        return run

    monkeypatch.setattr(Pool, "bind", bind_wrongly)
    with pytest.raises(AssertionError, match=r"S2 .*1 of 1176 elements are wrong"):
        judge(get_network("lenet5"))


def test_convolutions_are_those_of_the_reference(rng):
    """Without torch: the convolutions of a small network, with their biases and paddings."""
    network = get_network("keras_mnist")
    weights = draw_weights(network)
    seen = []

    def compare(step):
        if isinstance(step.layer.node, Conv):
            weight, bias = (weights[f"{step.layer.name}.{array}"] for array in ("weight", "bias"))
            factor = profile.find_plan(step.layer, step.inputs[0]).error_bound()
            scale = (
                reference.error_scale(step.inputs[0], weight, reach=factor.reach)
                + np.abs(bias)[:, None, None]
            )
            expected = reference.conv2d(step.inputs[0], weight, bias)
            assert_bounded(step.output, expected, factor.factor * torch_twin.EPS * scale, "float32")
            seen.append(step.layer.name)

    Model(network, weights).run(normals(rng, (3, 1, 28, 28)), compare)
    assert seen == ["conv1", "conv2", "conv3"]


# The run ------------------------------------------------------------------------------------------


def branches():
    """Every way in which layers can be joined: a residual, branches side by side, unpooling, two readers."""
    net = Draft(3, 12, 12)
    net.add("stem", Conv(8, 3, padding=1, bias=False))
    net.add("stem.bn", BatchNorm())
    start = net.add("stem.relu", Activation("relu"))
    net.add("body", Conv(8, 3, padding=1))
    body = net.add("body.scale", LayerScale())
    net.last = start
    shortcut = net.add("shortcut", Conv(8, 1))
    net.add("sum", Add(), body, shortcut)
    left = net.add("sum.relu", Activation("leaky_relu", 0.1))
    pooled = net.add("pool", Pool("max", 2, 2, return_indices=True), left)
    net.add("up", ConvTranspose(8, 3, padding=1, groups=2))
    net.add("up.bn", BatchNorm())
    net.add("whole", ConvTranspose(8, 1, bias=False), pooled)
    net.add("whole.bn", BatchNorm())
    net.add("whole.tanh", Activation("tanh"))
    both = net.add("both", Concat(), "up.bn", "whole.tanh")
    net.add("narrow", Conv(8, 1), both)
    net.add("unpool", MaxUnpool(2, pool="pool"))
    net.add("avgpool", AdaptivePool(1))
    net.add("flatten", Flatten())
    net.add("fc", Linear(5))
    return net.network("branches", "made up")


def test_branches_are_those_of_torch():
    judge(branches(), batch=2)


def outputs(model, x):
    found = {}
    result = model.run(x, lambda step: found.setdefault(step.layer.name, step.output))
    assert found[model.network.layers[-1].name] is result
    return found


def test_a_sample_does_not_depend_on_its_batch(rng):
    """Bit for bit, but for linear layers, whose matrix product is the array library's."""
    model, x = Model(branches(), draw_weights(branches())), normals(rng, (3, 3, 12, 12))
    assert_exact(outputs(model, x)["flatten"][1:2], outputs(model, x[1:2])["flatten"])


def test_what_nobody_reads_any_more_is_freed(rng):
    """The largest maps are 8x12x12; with a residual, at most three of them are there at once."""
    network, live = branches(), []
    Model(network, draw_weights(network)).run(
        normals(rng, (1, 3, 12, 12)), lambda step: live.append(step.live)
    )
    image, whole, fourth = 4 * 3 * 144, 4 * 8 * 144, 4 * 8 * 36
    assert live[:7] == [image + whole, *[2 * whole] * 2, *[2 * whole], 3 * whole, 3 * whole, 3 * whole]
    indices = 2 * fourth
    assert live[8] == whole + fourth + indices
    assert live[-1] == 4 * (8 + 5)


def test_views_take_no_memory_of_their_own():
    array = np.zeros((4, 6), np.float32)
    assert count_bytes([array, array[1:], array.reshape(-1), array.T]) == 96
    assert count_bytes([array, array.copy()]) == 192


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 32, 33), (1, 1, 3, 12, 12)])
def test_input_of_another_shape_is_refused(shape):
    model = Model(branches(), draw_weights(branches()))
    rule = f"branches: input.shape must be (N, 3, 12, 12), got {shape}"
    with pytest.raises(ConvError, match=re.escape(rule)):
        model.run(np.zeros(shape, np.float32))


@pytest.mark.emulator
def test_a_network_runs_on_cupy_arrays(monkeypatch, rng):
    """On the kernels of the GPU, emulated: all that stays of every way to join layers when they are fused."""
    network, weights = fuse(branches(), draw_weights(branches()))
    x = normals(rng, (2, 3, 12, 12))
    expected = outputs(Model(network, weights), x)
    give = Loan.give
    with entering(EMULATOR, monkeypatch) as place:
        # The stand-in's functions return arrays that its kernels do not take; those of CuPy's do.
        monkeypatch.setattr(Loan, "give", lambda loan, result: place.make(place.host(give(loan, result))))
        there = {name: place.make(array) for name, array in weights.items()}
        found = outputs(Model(network, there), place.make(x))
        found = {name: place.host(array) for name, array in found.items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert_bounded(found[name], array, 1e-5 * (1 + np.abs(array)), "float32")


# Fusion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["branches", "resnet18", "googlenet", "mobilenet_v1", "convnext_t", "lenet5"]
)
def test_a_fused_network_agrees(name, rng):
    """Each output that is left is that of before, but for rounding: errors of all layers before add up."""
    network = branches() if name == "branches" else shrink(get_network(name))
    weights, x = draw_weights(network), normals(rng, (1, *network.input_shape))
    expected, (fused, arrays) = outputs(Model(network, weights), x), fuse(network, weights)
    found = outputs(Model(fused, arrays), x)
    assert len(fused.layers) < len(network.layers)
    assert list(found) == [layer.name for layer in fused.layers]
    assert set(arrays) == set(fused.arrays())
    for each, array in found.items():
        assert_bounded(array, expected[each], 1e-4 * np.abs(expected[each]).max(), "float32")


def test_what_is_fused():
    fused, _ = fuse(branches(), draw_weights(branches()))
    found = {
        layer.name: (layer.fused, layer.inputs) for layer in fused.layers if isinstance(layer.node, Conv)
    }
    assert found == {
        "stem.relu": (("stem", "stem.bn", "stem.relu"), ("input",)),
        "sum.relu": (("body", "body.scale", "sum", "sum.relu"), ("stem.relu", "shortcut")),
        "shortcut": ((), ("stem.relu",)),
        "up": ((), ("pool",)),  # a transposed one in groups keeps its batch norm
        "whole.tanh": (("whole", "whole.bn", "whole.tanh"), ("pool",)),
        "narrow": ((), ("both",)),
    }
    assert [layer.name for layer in fused.layers][:3] == ["stem.relu", "shortcut", "sum.relu"]


def test_a_kept_layer_keeps_its_output():
    fused, _ = fuse(branches(), draw_weights(branches()), keep={"stem.bn", "sum"})
    names = [layer.name for layer in fused.layers]
    assert names[:5] == ["stem.bn", "stem.relu", "shortcut", "sum", "sum.relu"]


def test_an_activation_is_not_fused_before_a_sum():
    """relu(conv(x)) + x is not relu(conv(x) + x); and a sum of a map with itself has no residual."""
    net = Draft(4, 6, 6)
    conv = net.add("conv", Conv(4, 3, padding=1))
    relu = net.add("relu", Activation("relu"))
    net.add("sum", Add(), relu, "input")
    conv = net.add("conv2", Conv(4, 1))
    net.add("twice", Add(), conv, conv)
    fused, _ = fuse(net.network("net", ""), draw_weights(net.network("net", "")))
    assert [layer.name for layer in fused.layers] == ["relu", "sum", "conv2", "twice"]


# Weights ------------------------------------------------------------------------------------------


def save_npz(path, arrays):
    np.savez(path, **arrays)


def save_safetensors(path, arrays):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    library.save_file(arrays, path)


SAVE = pytest.mark.parametrize(
    ("suffix", "save"), [("npz", save_npz), ("safetensors", save_safetensors)], ids=["npz", "safetensors"]
)


@SAVE
def test_weights_come_back_from_a_file(tmp_path, suffix, save, rng):
    network = branches()
    weights = draw_weights(network, seed=3)
    counter = {"stem.bn.num_batches_tracked": np.array(7)}
    save(tmp_path / f"net.{suffix}", {**weights, **counter})
    found = load_weights(network, tmp_path / f"net.{suffix}")
    assert list(found) == list(network.arrays())
    for name, array in weights.items():
        assert_exact(found[name], array)


def test_arrays_of_a_batch_norm():
    network = get_network("resnet18")
    assert sum(name.endswith("running_var") for name in network.buffers()) == 20
    assert network.buffers()["bn1.running_mean"] == (64,)
    assert not network.buffers().keys() & network.parameters().keys()
    assert network.arrays().keys() == network.buffers().keys() | network.parameters().keys()


def test_auxiliary_heads_and_matrices_of_checkpoints(tmp_path):
    network = get_network("googlenet")
    small = replace(network, input_shape=(3, 32, 32), layers=network.layers[:3])
    weights = draw_weights(small)
    save_npz(tmp_path / "a.npz", {**weights, "aux1.fc1.weight": np.zeros(3), "aux2.conv.bn.bias": np.zeros(3)})
    assert load_weights(small, tmp_path / "a.npz").keys() == weights.keys()
    pixelwise = Draft(4, 2, 2)
    pixelwise.add("mix", Conv(3, 1))
    matrix = {"mix.weight": np.ones((3, 4), np.float32), "mix.bias": np.ones(3, np.float32)}
    save_npz(tmp_path / "b.npz", matrix)
    found = load_weights(pixelwise.network("net", ""), tmp_path / "b.npz")
    assert_exact(found["mix.weight"], np.ones((3, 4, 1, 1), np.float32))


def broken(weights, kind):
    """What a file holds, and what the error says of it."""
    if kind == "missing":
        kept = {name: array for name, array in weights.items() if not name.startswith("stem.bn.")}
        return kept, "4 missing (stem.bn.weight, stem.bn.bias, stem.bn.running_mean, stem.bn.running_var)"
    if kind == "unknown":
        return {**weights, "head.weight": np.zeros(3)}, "1 unknown (head.weight)"
    if kind == "other network":
        return draw_weights(get_network("mnist1d")), "and 6 unknown (conv1."
    if kind == "shape":
        changed = weights["stem.weight"].transpose(1, 0, 2, 3)
        return {**weights, "stem.weight": changed}, "stem.weight must have shape (8, 3, 3, 3), got (3, 8, 3, 3)"
    changed = weights["fc.bias"].astype(np.float64)
    return {**weights, "fc.bias": changed}, "fc.bias must be of dtype float32, got float64"


@SAVE
@pytest.mark.parametrize("kind", ["missing", "unknown", "other network", "shape", "dtype"])
def test_weights_that_do_not_fit_are_refused(tmp_path, kind, suffix, save):
    arrays, rule = broken(draw_weights(branches()), kind)
    save(tmp_path / f"net.{suffix}", {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with pytest.raises(ConvError, match=rf"^weights: .*{re.escape(rule)}"):
        load_weights(branches(), tmp_path / f"net.{suffix}")


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("net.npz", b"no archive", "net.npz cannot be read as .npz"),
        ("net.npz", b"", "net.npz cannot be read as .npz"),
        ("net.safetensors", b"no header at all", "net.safetensors cannot be read as .safetensors"),
        ("net.pth", b"", "the file must be of type .safetensors or .npz, got net.pth"),
        ("net", None, "the file must exist, got "),
    ],
)
def test_files_without_weights_are_refused(tmp_path, name, content, rule):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConvError, match=f"^weights: {re.escape(rule)}"):
        load_weights(branches(), tmp_path / name)


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # importing it raises ModuleNotFoundError
    (tmp_path / "net.safetensors").write_bytes(b"")
    with pytest.raises(ConvError, match="safetensors is not installed: pip install"):
        load_weights(branches(), tmp_path / "net.safetensors")


def test_a_seed_draws_the_same_weights():
    first, again, other = (draw_weights(branches(), seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first)
    assert all(array.dtype == np.float32 and array.std() > 0 for array in first.values())


def test_drawn_weights_keep_the_size_of_activations(rng):
    """Behind 13 convolutions and their ReLUs the numbers are as large as at the input."""
    network = shrink(get_network("vgg16"))
    found = outputs(Model(network, draw_weights(network)), normals(rng, (1, 3, 32, 32)))
    assert 0.1 < np.sqrt((found["features.27"] ** 2).mean()) < 10
