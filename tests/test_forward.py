"""Networks that run: every layer of every network against torch, weights from files, fusion, the command."""

import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console

import fastconv
from bench import machine, show
from bench.__main__ import main
from bench.forward import command, inputs, maps, pictures, profile, tables
from bench.networks import NETWORKS, Model, draw_weights, fuse, get_network, load_weights
from bench.networks.model import count_bytes
from bench.networks.network import Draft
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
    net.add("body", Conv(8, 3, padding=2, dilation=2))
    body = net.add("body.scale", LayerScale())
    net.last = start
    shortcut = net.add("shortcut", Conv(8, 1))
    net.add("sum", Add(), body, shortcut)
    left = net.add("sum.relu", Activation("leaky_relu", 0.1))
    pooled = net.add("pool", Pool("max", 2, 2, return_indices=True), left)
    net.add("up", ConvTranspose(8, 3, padding=2, dilation=2, groups=2))
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


def test_what_does_not_commute_is_not_fused():
    """A sum or a batch norm behind an activation, a batch norm behind a sum, a sum of a map with itself."""
    net = Draft(4, 6, 6)
    conv = net.add("conv", Conv(4, 3, padding=1))
    relu = net.add("relu", Activation("relu"))
    net.add("sum", Add(), relu, "input")
    conv = net.add("conv2", Conv(4, 1))
    net.add("twice", Add(), conv, conv)
    net.add("conv3", Conv(4, 1))
    net.add("relu3", Activation("relu"))
    net.add("relu3.bn", BatchNorm())
    net.add("conv4", Conv(4, 1))
    net.add("sum4", Add(), "conv4", "relu3.bn")
    net.add("sum4.bn", BatchNorm())
    fused, _ = fuse(net.network("net", ""), draw_weights(net.network("net", "")))
    assert [layer.name for layer in fused.layers] == [
        *("relu", "sum", "conv2", "twice"),
        *("relu3", "relu3.bn", "sum4", "sum4.bn"),
    ]


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
    save_npz(
        tmp_path / "a.npz", {**weights, "aux1.fc1.weight": np.zeros(3), "aux2.conv.bn.bias": np.zeros(3)}
    )
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
        return {
            **weights,
            "stem.weight": changed,
        }, "stem.weight must have shape (8, 3, 3, 3), got (3, 8, 3, 3)"
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
        (
            "net.pth",
            b"",
            "the file must be of type .safetensors or .npz, got net.pth: convert it once with "
            'safetensors.torch.save_file(torch.load("net.pth", weights_only=True), "net.safetensors")',
        ),
        ("net.txt", b"", "the file must be of type .safetensors or .npz, got net.txt"),
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


@pytest.mark.parametrize("prefix", ["model.", "module.net.", "_orig_mod."])
def test_a_prefix_that_all_names_have_is_named(tmp_path, prefix):
    """Those of branches, and of a network whose own names begin alike."""
    for network in (branches(), get_network("vgg16")):
        small = replace(network, input_shape=(3, 32, 32), layers=network.layers[:5])
        weights = draw_weights(small)
        save_npz(tmp_path / "net.npz", {f"{prefix}{name}": array for name, array in weights.items()})
        rule = f"all names in the file begin with {prefix!r}: save it without"
        with pytest.raises(ConvError, match=f"^weights: net.npz must hold .*{re.escape(rule)}"):
            load_weights(small, tmp_path / "net.npz")


def test_no_prefix_is_named_where_none_helps(tmp_path):
    save_npz(tmp_path / "net.npz", {"model.other.weight": np.zeros(3), "model.other.bias": np.zeros(3)})
    with pytest.raises(ConvError) as raised:
        load_weights(branches(), tmp_path / "net.npz")
    assert "begin with" not in str(raised.value)


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


# What is shown ------------------------------------------------------------------------------------


def paint(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def test_a_picture_is_cut_from_its_middle_and_normalised(tmp_path):
    """Left red, right blue, 512 x 256: all that is seen of it lies within 224 / 256 of its height."""
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[:, :256, 0] = pixels[:, 256:, 2] = 255
    network = get_network("resnet18")
    shown = inputs.make_input(network, paint(tmp_path / "a.png", pixels), 2)
    assert (shown.x.shape, shown.x.dtype, shown.image.shape) == ((2, 3, 224, 224), np.float32, (224, 224, 3))
    assert_exact(shown.x[0], shown.x[1])
    assert shown.image[0, 0].tolist() == [1, 0, 0]
    assert shown.image[-1, -1].tolist() == [0, 0, 1]
    assert np.abs(shown.image[:, 111, 0] - 1).max() < 0.5 < np.abs(shown.image[:, 112, 0] - 1).min()
    red, blue = ((np.array(colour) - inputs.MEAN) / inputs.DEVIATION for colour in ([1, 0, 0], [0, 0, 1]))
    assert_bounded(shown.x[0, :, 5, 5], red, 1e-6, "float32")
    assert_bounded(shown.x[0, :, 5, -5], blue, 1e-6, "float32")


def test_what_is_cut_away():
    """A frame of 16 of 256 pixels on each side; of the long side what is more."""
    pixels = np.full((256, 300), 0, np.uint8)
    pixels[16:-16, 38:-38] = 255
    found = inputs.cut(Image.fromarray(pixels), 224, 224)
    assert found.shape == (224, 224)
    assert found.min() == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 1000), (1000, 3), (224, 224)])
def test_pictures_of_any_size_fill_the_input(height, width):
    found = inputs.cut(Image.fromarray(np.full((height, width, 3), 255, np.uint8)), 224, 224)
    assert found.shape == (224, 224, 3)
    assert found.min() == 1


def test_a_grey_picture_and_a_picture_with_transparency(tmp_path):
    rgba = np.full((40, 40, 4), 255, np.uint8)
    shown = inputs.make_input(get_network("lenet5"), paint(tmp_path / "a.png", rgba), 1)
    assert (shown.x.shape, shown.image.shape) == ((1, 1, 32, 32), (32, 32))
    assert shown.x.min() == shown.x.max() == 1


def test_a_photograph_stands_as_its_camera_says(tmp_path):
    pixels = np.zeros((60, 60), np.uint8)
    pixels[:30] = 255
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=turned)
    shown = inputs.make_input(get_network("lenet5"), tmp_path / "a.jpg", 1)
    assert shown.image[0].max() < 0.1 < 0.9 < shown.image[-1].min()


def test_signals_are_noise():
    first, again = (inputs.make_input(get_network("mnist1d"), None, 2) for _ in range(2))
    assert first.image is None
    assert first.x.shape == (2, 1, 40)
    assert_exact(first.x, again.x)


# Maps ---------------------------------------------------------------------------------------------

MAPPED = (
    "googlenet",
    "googlenet_2014",
    "resnet18",
    "resnet50",
    "resnet152",
    "resnext50_32x4d",
    "mobilenet_v1",
)


def test_networks_with_a_class_activation_map():
    found = [name for name, network in NETWORKS.items() if maps.find_head(network)]
    assert found == [*MAPPED, "replknet_31b"]
    assert maps.find_head(get_network("resnet50")).maps == "layer4.2.relu3"
    assert maps.find_head(get_network("googlenet")).maps == "inception5b.concat"


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_mean_of_a_class_activation_map_is_the_score(name, rng):
    network = shrink(get_network(name))
    weights, head = draw_weights(network), maps.find_head(network)
    found = outputs(Model(network, weights), normals(rng, (1, *network.input_shape)))
    for chosen in (0, 7, 999):
        activation = maps.map_class(found[head.maps][0], weights["fc.weight"], chosen)
        assert activation.shape == found[head.maps].shape[2:]
        score = found["fc"][0, chosen]
        assert activation.mean() + weights["fc.bias"][chosen] == pytest.approx(score, rel=1e-3, abs=1e-4)


def test_a_map_is_spread_over_the_picture():
    found = maps.spread(np.array([[-1.0, -1], [-1, 3]]), (8, 6))
    assert found.shape == (8, 6)
    assert (found[0, 0], found[-1, -1]) == (0, 1)
    assert maps.spread(np.ones((2, 2)), (4, 4)).max() == 0


def test_maps_are_stretched_one_by_one_and_tiled():
    """Nine maps of 2 x 3 pixels: eight in the first row, white between them."""
    array = np.arange(9 * 6, dtype=float).reshape(9, 2, 3) ** 2
    found = maps.paint_maps(array)
    assert found.shape == (2 + 1 + 2, 8 * 3 + 7, 1)
    for index, (top, left) in enumerate([*((0, 4 * k) for k in range(8)), (3, 0)]):
        part = found[top : top + 2, left : left + 3, 0]
        assert_bounded(part, (array[index] - array[index].min()) / np.ptp(array[index]), 1e-15)
    assert (found[2] == 1).all()
    assert maps.paint_maps(np.zeros((100, 4, 4))).shape == (8 * 5 - 1, 8 * 5 - 1, 1)
    assert maps.paint_maps(np.zeros((100, 40))).shape == (64, 40)


def test_filters_are_painted_in_colours_where_they_see_colours(rng):
    weight = normals(rng, (5, 3, 7, 7))
    found = maps.paint_filters(weight)
    assert found.shape == (7, 5 * 8 - 1, 3)
    span = np.ptp(weight[0])
    assert_bounded(found[:, :7], np.moveaxis((weight[0] - weight[0].min()) / span, 0, -1), 1e-6, "float32")
    assert maps.paint_filters(normals(rng, (5, 1, 7, 7))).shape == (7, 39, 1)
    assert maps.paint_filters(normals(rng, (70, 2, 4))).shape == (64, 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_that_are_shown_unless_others_are_named(name):
    network = NETWORKS[name]
    found = maps.choose_layers(network, ())
    assert 1 <= len(found) <= 5
    assert len({network.shapes[each][1:] for each in found}) == len(found)


def paint_figure(figure):
    """Its pixels in 0 ... 1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


def test_pictures_are_as_large_as_what_is_in_them(rng):
    """Six maps in one row, or 16 in two, leave no page of white; 64 have the height of their width."""
    few = {f"layer{index}": rng.random((6, 14, 14)) for index in range(2)}
    more = {f"layer{index}": rng.random((16, 5, 5)) for index in range(2, 4)}
    for figure in (
        pictures.draw_features("net", {**few, **more}),
        pictures.draw_filters("net", normals(rng, (6, 1, 5, 5))),
    ):
        assert (paint_figure(figure) == 1).all(axis=-1).mean() < 0.6
        assert figure.get_figheight() < 0.5 * figure.get_figwidth()
    whole = pictures.draw_filters("net", normals(rng, (64, 3, 7, 7)))
    assert 1 < whole.get_figheight() / whole.get_figwidth() < 1.15


def test_axes_of_signals_are_named(rng):
    maps_of = pictures.draw_features("net", {"conv": rng.random((15, 19))})
    filters = pictures.draw_filters("net", normals(rng, (15, 1, 3)))
    (left,), (right,) = maps_of.axes, filters.axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("position", "channel")
    assert (right.get_xlabel(), right.get_ylabel()) == ("position", "filter")
    for axis in (left, right):
        assert axis.axison
        assert all(tick == round(tick) for tick in (*axis.get_xticks(), *axis.get_yticks()))


def test_the_hottest_place_is_bright_even_over_black():
    """Hot over the black half, cold over the white one; the scale beside it says which is which."""
    image, activation = np.zeros((40, 40, 3)), np.zeros((40, 40))
    image[:20] = activation[20:] = 1
    figure = pictures.draw_class("net", image, activation)
    pixels = paint_figure(figure)
    box = figure.axes[1].get_window_extent()
    column = pixels[:, round((box.x0 + box.x1) / 2)].mean(axis=-1)[::-1]  # from below
    hot, cold = (column[round(box.y0 + share * box.height)] for share in (0.25, 0.75))
    assert hot > 0.75 > 0.55 > cold
    assert [text.get_text() for text in figure.axes[2].get_yticklabels()] == ["least", "most"]


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Measure the machine not at all and a network twice."""
    monkeypatch.setattr(machine, "total_peak", lambda threads, dtype: 1e11)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda threads: 1e10)
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    monkeypatch.setattr(profile, "FEWEST", 2)


def run(folder, name, *words):
    """What a run leaves: its row, and which pictures."""
    assert main(["network", name, *words, "--output", str(folder)]) == 0
    found = json.loads((folder / f"network-{name}.json").read_text())
    left = {path.name for path in folder.iterdir()}
    assert left == {f"network-{name}.json", *found["pictures"].values()}
    for picture in found["pictures"].values():
        with Image.open(folder / picture) as file:
            assert np.ptp(np.asarray(file)) > 100
    return found


def test_a_run_tells_of_every_layer(quick, tmp_path, capsys):
    found = run(tmp_path, "keras_mnist", "--top", "2")
    shown = capsys.readouterr().out
    fused = [layer["name"] for layer in found["layers"]]
    assert fused == [
        "relu1",
        "pool1",
        "relu2",
        "pool2",
        "relu3",
        "flatten",
        "dense1",
        "relu4",
        "dense2",
        "softmax",
    ]
    first = found["layers"][0]
    assert first["fused"] == ["conv1", "relu1"]
    assert (first["shape"], first["flops"]) == ([1, 32, 26, 26], 2 * 32 * 9 * 26 * 26)
    assert first["algorithm"] in fastconv_algorithms()
    assert first["output_bytes"] == 4 * 32 * 26 * 26
    assert first["live_bytes"] == 4 * (28 * 28 + 32 * 26 * 26)
    assert found["peak_bytes"] == max(layer["live_bytes"] + layer["workspace"] for layer in found["layers"])
    assert all(layer["seconds"] > 0 for layer in found["layers"])
    assert (found["parameters"], found["runs"], found["batch"], found["fused"]) == (93_322, 2, 1, True)
    assert found["flops"] == sum(layer["flops"] for layer in found["layers"])
    assert set(found["pictures"]) == {"filters", "features"}
    assert {"cpu", "threads", "versions", "commit", "peak_gflops"} <= set(found)
    for text in (
        "conv1 .. relu1", f"{first['algorithm']} {first['tile']}", "1x32x26x26", "10 layers",
        "93,322 parameters", "time by kind of layer",
        "weights: random, seed 0: classes and maps mean nothing",
        "no class-activation map: it needs global average pooling",
    ):  # fmt: skip
        assert text in shown
    (index, share), second = found["classes"]
    assert share >= second[1]
    assert f"classes: {index} ({share:.1%}), {second[0]} ({second[1]:.1%})\n" in shown


def narrow_terminal(width=80):
    """A console that writes to a terminal of that many columns; its text is in `file`."""
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, highlight=False)


def test_a_narrow_terminal_loses_columns_and_breaks_no_cell(quick, tmp_path, monkeypatch):
    console = narrow_terminal()
    monkeypatch.setattr(show, "make_console", lambda: console)
    found = run(tmp_path, "googlenet")
    lines = console.file.getvalue().splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "algorithm" in line) : lines.index("")]
    assert all(len(line) <= 80 for line in table)
    assert table[0].split()[:3] == ["layer", "algorithm", "time"]
    assert "workspace" not in table[0]
    rows = [line for line in table if " ms" in line or " us" in line]
    for layer, line in zip(found["layers"], rows):  # each whole, in one line
        assert line.split()[0] == (layer["fused"] or [layer["name"]])[0]
        assert f" {layer['algorithm']} {layer['tile']}".rstrip() in line
        assert f" {show.seconds_text(layer['seconds'])} " in line
    assert "no room for: workspace, live, " in console.file.getvalue()


def test_a_table_too_wide_without_its_spare_columns_is_cut_not_folded():
    console = narrow_terminal(20)
    table = show.make_table("", ("name",), ("time", "live"))
    table.add_row("a name that is long", "12.5 ms", "4 kB")
    show.print_table(console, table, ("live", "no such column"))
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert [line for line in lines if "name" in line] == ["name          time", "a name that…  12.…"]
    assert "no room for: live" in " ".join(lines)


def test_a_pipe_loses_nothing():
    console = Console(file=io.StringIO(), width=20)
    table = show.make_table("", ("name",), ("time", "live"))
    table.add_row("a name that is long", "12.5 ms", "4 kB")
    show.print_table(console, table, ("live",))
    assert "no room" not in console.file.getvalue()
    assert "live" in console.file.getvalue()


def test_what_is_waited_for_is_told_before_it_runs(quick, tmp_path, monkeypatch, capfd):
    """And flushed: through a pipe too the line is there when the network begins to run."""
    seen = []

    def stop(*arguments):
        seen.append(capfd.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "profile", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["network", "lenet5", "--output", str(tmp_path)])
    assert "running lenet5 (the first time its kernels are compiled" in seen[0]


def test_shares_are_of_the_sum_that_is_printed_beside_the_whole_run():
    """Two layers of 1 and 3 ms in runs of 5 ms: 25 % and 75 % of the sum; the run has its own line."""
    layer = profile.LayerRun("a", (), "conv", "conv", (1,), "direct", "", 10**6, 1e-3, 4, 4, 0)
    layers = (layer, replace(layer, name="b", seconds=3e-3))
    found = profile.Profile(layers, 5e-3, 7, np.zeros(1), {})
    table = tables.layer_table("", found, 1.0)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["layer"] == ["a", "b", "sum of 2 layers", "a whole run"]
    assert cells["time"] == ["1 ms", "3 ms", "4 ms", "5 ms"]
    assert cells["of total"] == ["25.0%", "75.0%", "100.0%", ""]
    assert cells["GFLOP/s"] == ["1.0", "0.3", "0.5", "0.4"]


def fastconv_algorithms():
    return {row.name for row in fastconv.algorithms()}


def test_layers_by_themselves_and_samples_together(quick, tmp_path):
    found = run(tmp_path, "lenet5", "--unfused", "--batch", "3", "--layers", "C1,C3.tanh", "--threads", "1")
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in NETWORKS["lenet5"].layers]
    assert all(layer["shape"][0] == 3 for layer in found["layers"])
    assert found["layers"][0]["flops"] == 3 * 2 * NETWORKS["lenet5"].summary()[0].macs
    assert not found["fused"]


def test_a_signal_is_run(quick, tmp_path):
    found = run(tmp_path, "mnist1d")
    assert found["input"] == "normal noise, seed 0"
    assert [layer["algorithm"] != "" for layer in found["layers"]] == [True] * 3 + [False] * 2


def test_weights_and_a_picture_decide_the_class(quick, tmp_path, capsys):
    """Weights that speak for one class only: its map is drawn, and another's if that is asked for."""
    network = get_network("resnet18")
    weights = draw_weights(network, seed=5)
    weights["fc.bias"][321] += 1e9
    save_npz(tmp_path / "net.npz", weights)
    picture = paint(tmp_path / "a.png", np.arange(300 * 300 * 3, dtype=np.uint8).reshape(300, 300, 3))
    words = ("--weights", str(tmp_path / "net.npz"), "--image", str(picture), "--top", "1")
    found = run(tmp_path / "a", "resnet18", *words)
    assert found["classes"] == [[321, 1.0]]
    assert (found["weights"], found["input"]) == (words[1], words[3])
    shown = capsys.readouterr().out
    assert "classes: 321 (100.0%)" in shown
    assert "mean nothing" not in shown
    other = run(tmp_path / "b", "resnet18", *words, "--class", "0")
    assert set(found["pictures"]) == set(other["pictures"]) == {"filters", "features", "cam"}
    cams = [(tmp_path / each / "network-resnet18-cam.png").read_bytes() for each in "ab"]
    assert cams[0] != cams[1]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["resnet51"], "networks: name must be one of lenet5, alexnet,"),
        (
            ["lenet5", "--layers", "C1,C9"],
            "--layers must be of the layers of lenet5 (`python -m bench networks lenet5` lists them), got C9",
        ),
        (
            ["ResNet18"],
            f"networks: name must be one of {', '.join(NETWORKS)}, got 'ResNet18' (did you mean resnet18?)\n",
        ),
        (["x"], f"networks: name must be one of {', '.join(NETWORKS)}, got 'x'\n"),
        (["lenet5", "--layers", "F6"], "--layers must be of layers whose output is a map, got F6"),
        (["mnist1d", "--image", "a.png"], "--image needs a network of pictures, got mnist1d (input 1x40)"),
        (["lenet5", "--image", "a.png"], "--image must be a picture that can be read, got a.png: "),
        (["lenet5", "--image", "."], "--image must be a picture that can be read, got .: "),
        (["lenet5", "--image", __file__], f"--image must be a picture that can be read, got {__file__}: "),
        (["lenet5", "--weights", "a.npz"], "weights: the file must exist, got a.npz"),
        (["lenet5", "--class", "3"], "--class needs a network with a class-activation map: it needs global "),
        (["resnet18", "--class", "1000"], "--class must be from 0 to 999, got 1000"),
    ],
    ids=lambda value: " ".join(value).rpartition("/")[2] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys, words, rule):
    monkeypatch.setattr(machine, "total_peak", lambda threads, dtype: pytest.fail("the machine was measured"))
    assert main(["network", *words, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"python -m bench: {rule}")
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_photograph(capsys):
    with pytest.raises(SystemExit):
        main(["network", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "instead of matplotlib's photograph of Grace Hopper" in shown


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ([], "the following arguments are required: NAME"),
        (["lenet5", "--batch", "0"], "must be a whole number of at least 1, got '0'"),
        (["lenet5", "--class", "-1"], "must be a whole number of at least 0, got '-1'"),
        (["lenet5", "--top", "x"], "must be a whole number of at least 1, got 'x'"),
    ],
)
def test_bad_options_are_refused(capsys, words, rule):
    with pytest.raises(SystemExit) as ended:
        main(["network", *words])
    assert ended.value.code == 2
    assert rule in capsys.readouterr().err
