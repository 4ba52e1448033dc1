"""The networks against what is published of them: counts, sizes and receptive fields."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bench.networks import NETWORKS, ConvLayer, get_network, print_summary
from bench.networks.network import Draft
from bench.networks.nodes import (
    Activation,
    AdaptivePool,
    Add,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Crop,
    Flatten,
    Linear,
    MaxUnpool,
    Node,
    Pool,
    Reshape,
)
from fastconv.problem import ConvError, output_size

ALL = pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))


def rows(name):
    return {row.name: row for row in get_network(name).summary()}


def convolution_rows(network):
    return [row for row, layer in zip(network.summary(), network.layers) if isinstance(layer.node, Conv)]


# Counts -------------------------------------------------------------------------------------------

PARAMETERS = {
    "lenet5": 61_706,
    "alexnet": 61_100_840,  # torchvision's documentation, as for VGG, GoogLeNet, ResNet
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "googlenet": 6_624_904,
    "googlenet_2014": 6_998_552,  # the Caffe model without its auxiliary heads
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "mobilenet_v1": 4_231_976,
    "convnext_t": 28_589_128,
    "yolo_v1": 271_703_550,
    "unet": 31_030_658,
    "vit_b16_patches": 590_592,
    "keras_mnist": 93_322,
    "mnist1d": 2_050,
    "mamba": 7_680,
}

GIGAMACS = {  # torchvision's "GFLOPS" count multiply-adds
    "alexnet": 0.714,
    "vgg16": 15.470,
    "vgg19": 19.632,
    "googlenet": 1.498,
    "resnet18": 1.814,
    "resnet50": 4.089,
    "resnet152": 11.514,
    "resnext50_32x4d": 4.230,
    "mobilenet_v1": 0.569,  # Howard et al. 2017, table 8
    "convnext_t": 4.456,
    "replknet_31b": 15.354,  # 15.3 in the official README
}

CONVOLUTIONS = {
    "lenet5": 3, "alexnet": 5, "zfnet": 5, "vgg16": 13, "vgg19": 16, "googlenet": 57, "googlenet_2014": 57,
    "resnet18": 20, "resnet50": 53, "resnet152": 155, "resnext50_32x4d": 53, "mobilenet_v1": 27,
    "convnext_t": 58, "replknet_31b": 130, "yolo_v1": 24, "deconvnet": 30, "unet": 23, "vit_b16_patches": 1,
    "keras_mnist": 3, "mnist1d": 3, "mamba": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name):
    assert sum(row.parameters for row in rows(name).values()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "millions"), [("zfnet", 62.4), ("deconvnet", 252), ("replknet_31b", 79.5)])
def test_published_parameters_in_millions(name, millions):
    total = sum(row.parameters for row in rows(name).values())
    assert total / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("name", GIGAMACS)
def test_published_multiply_adds(name):
    assert round(sum(row.macs for row in rows(name).values()) / 1e9, 3) == GIGAMACS[name]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("lenet5", [156, 2_416, 48_120, 10_164, 850]),
        ("keras_mnist", [320, 18_496, 36_928, 36_928, 650]),
        ("mnist1d", [60, 690, 690, 610]),
    ],
)
def test_published_parameters_of_every_layer(name, counts):
    assert [row.parameters for row in rows(name).values() if row.parameters] == counts


def test_one_kernel_on_an_image():
    image = ConvLayer("example", "kernel", 1, 2, 3, (512, 512), 1, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert image.macs == 7_077_888
    assert image.output_spatial == (512, 512)


def test_multiply_adds_of_a_transposed_convolution():
    """Each input pixel meets each weight: 512 x 28 x 28 pixels, 1,024 of them x 512 x 2 x 2 weights."""
    assert rows("unet")["up4"].macs == 28 * 28 * 1024 * 512 * 4


@ALL
def test_counts_of_equal_layers_add_up(network):
    layers = network.convolutions()
    assert sum(layer.count for layer in layers) == CONVOLUTIONS[network.name]
    assert len({replace(layer, name="", count=1) for layer in layers}) == len(layers)
    macs = sum(row.macs for row in convolution_rows(network))
    assert sum(layer.count * layer.macs for layer in layers) == macs


@ALL
def test_merged_layers_keep_the_first_name_and_its_shape(network):
    order = [row.name for row in convolution_rows(network)]
    layers = network.convolutions()
    assert [layer.name for layer in layers] == sorted((layer.name for layer in layers), key=order.index)
    assert len({layer.label for layer in layers}) == len(layers)
    for layer in layers:
        assert network.shapes[layer.name] == (layer.K, *layer.output_spatial)
        assert network.parameters()[f"{layer.name}.weight"] == layer.weight_shape


def test_layers_ready_for_benchmarking():
    layers = {layer.name: layer for layer in get_network("vgg16").convolutions()}
    assert layers["features.24"].count == 3
    assert layers["features.24"].label == "vgg16 features.24 512->512 3x3 @14x14"
    assert layers["features.24"].input_shape(8) == (8, 512, 14, 14)
    depthwise = get_network("mobilenet_v1").convolutions()[3]
    assert (depthwise.groups, depthwise.weight_shape, depthwise.stride) == (64, (64, 1, 3, 3), (2, 2))
    assert depthwise.label == "mobilenet_v1 conv3.dw 64->64 3x3/2 g64 @112x112"
    up = next(layer for layer in get_network("unet").convolutions() if layer.transposed)
    assert (up.op, up.weight_shape, up.output_spatial) == ("conv_transpose2d", (1024, 512, 2, 2), (56, 56))
    assert up.label == "unet up4 1024->512 2x2/2 transposed @28x28"
    assert get_network("mnist1d").convolutions()[0].op == "conv1d"
    (causal,) = get_network("mamba").convolutions()
    assert (causal.op, causal.kernel, causal.padding, causal.groups) == ("conv1d", (4,), ((3, 0),), 1536)
    assert causal.output_spatial == causal.spatial == (2048,)


@pytest.mark.parametrize(
    ("network", "found"),
    [  # (channels, kernel, map, how many) in the official code
        ("replknet_31b", [(128, 31, 56, 2), (256, 29, 28, 2), (512, 27, 14, 18), (1024, 13, 7, 2)]),
        ("convnext_t", [(96, 7, 56, 3), (192, 7, 28, 3), (384, 7, 14, 9), (768, 7, 7, 3)]),
    ],
)
def test_large_kernels_per_channel(network, found):
    large = [layer for layer in get_network(network).convolutions() if layer.kernel[0] > 4]
    assert [(layer.groups, layer.kernel[0], layer.spatial[0], layer.count) for layer in large] == found
    assert all(layer.groups == layer.C == layer.K for layer in large)
    assert all(layer.output_spatial == layer.spatial for layer in large)


# Sizes --------------------------------------------------------------------------------------------

OUTPUTS = {
    "lenet5": {"C1": (6, 28, 28), "S2": (6, 14, 14), "C3": (16, 10, 10), "S4": (16, 5, 5), "C5": (120, 1, 1)},
    "alexnet": {"features.0": (64, 55, 55), "features.2": (64, 27, 27), "features.12": (256, 6, 6)},
    "zfnet": {
        "conv1": (96, 110, 110), "pool1": (96, 55, 55), "conv2": (256, 26, 26), "pool2": (256, 13, 13),
        "conv5": (256, 13, 13), "pool5": (256, 6, 6), "fc8": (1000,),
    },
    "vgg16": {"features.30": (512, 7, 7), "classifier.6": (1000,)},
    "googlenet_2014": {  # Szegedy et al. 2015, table 1
        "conv1.conv": (64, 112, 112), "maxpool1": (64, 56, 56), "conv3.conv": (192, 56, 56),
        "maxpool2": (192, 28, 28), "inception3a.concat": (256, 28, 28), "inception3b.concat": (480, 28, 28),
        "maxpool3": (480, 14, 14), "inception4a.concat": (512, 14, 14), "inception4d.concat": (528, 14, 14),
        "inception4e.concat": (832, 14, 14), "maxpool4": (832, 7, 7), "inception5b.concat": (1024, 7, 7),
    },
    "resnet50": {  # He et al. 2016, table 1
        "conv1": (64, 112, 112), "layer1.2.add": (256, 56, 56), "layer2.3.add": (512, 28, 28),
        "layer3.5.add": (1024, 14, 14), "layer4.2.add": (2048, 7, 7), "avgpool": (2048, 1, 1),
    },
    "resnext50_32x4d": {  # Xie et al. 2017, table 1
        "conv1": (64, 112, 112), "layer1.2.relu2": (128, 56, 56), "layer1.2.add": (256, 56, 56),
        "layer4.2.relu2": (1024, 7, 7), "layer4.2.add": (2048, 7, 7),
    },
    "mobilenet_v1": {"conv1": (32, 112, 112), "conv14.pw": (1024, 7, 7)},
    "convnext_t": {"features.0.0": (96, 56, 56), "features.7.2.add": (768, 7, 7)},
    "replknet_31b": {"stem.3.nonlinear": (128, 56, 56), "stages.3.blocks.3.add": (1024, 7, 7)},
    "mamba": {"mixer.act": (1536, 2048)},
    "yolo_v1": {
        "conv1": (64, 224, 224), "pool1": (64, 112, 112), "pool2": (192, 56, 56), "pool3": (512, 28, 28),
        "pool4": (1024, 14, 14), "conv24": (1024, 7, 7), "fc25": (4096,), "grid": (30, 7, 7),
    },
    "deconvnet": {  # Noh et al. 2015, the table of the configuration
        "pool5": (512, 7, 7), "fc6": (4096, 1, 1), "fc7": (4096, 1, 1), "deconv-fc6": (512, 7, 7),
        "unpool5": (512, 14, 14), "deconv4-3": (256, 28, 28), "deconv3-3": (128, 56, 56),
        "deconv2-2": (64, 112, 112), "deconv1-2": (64, 224, 224), "output": (21, 224, 224),
    },
    "unet": {  # Ronneberger et al. 2015, figure 1
        "down1.conv2": (64, 568, 568), "down2.conv1": (128, 282, 282), "down3.conv2": (256, 136, 136),
        "bottom.conv2": (1024, 28, 28), "up4.concat": (1024, 56, 56), "up3": (256, 104, 104),
        "up2.conv2": (128, 196, 196), "up1": (64, 392, 392), "output": (2, 388, 388),
    },
    "vit_b16_patches": {"conv_proj": (768, 14, 14)},
    "keras_mnist": {"conv1": (32, 26, 26), "conv2": (64, 11, 11), "conv3": (64, 3, 3), "softmax": (10,)},
    "mnist1d": {"conv1": (15, 19), "conv2": (15, 9), "conv3": (15, 4), "fc": (10,)},
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_published_output_sizes(name):
    found = {row.name: row.output_shape for row in get_network(name).summary()}
    assert {layer: found[layer] for layer in OUTPUTS[name]} == OUTPUTS[name]


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposed_convolution_undoes_the_size_of_its_convolution(kernel, stride):
    for size in range(1, 12):
        large = ConvTranspose(1, kernel, stride, padding=kernel // 2).output_shape((1, size + 3))[1]
        assert output_size(large, kernel, stride, kernel // 2, kernel // 2, 1) == size + 3


def torch_twin(torch, node, shape):
    ndim, empty = len(shape) - 1, torch.empty(1, *shape, device="meta")
    if isinstance(node, Conv):
        kind = getattr(torch.nn, f"Conv{'Transpose' * node.transposed}{ndim}d")
        options = {"dilation": node.dilation, "groups": node.groups, "bias": node.bias, "device": "meta"}
        padding = node.padding
        if isinstance(padding, tuple) and isinstance(padding[0], tuple):  # torch's modules pad alike
            empty, padding = torch.nn.functional.pad(empty, sum(reversed(padding), ())), 0
        module = kind(shape[0], node.channels, node.kernel, node.stride, padding, **options)
    else:
        kind = getattr(torch.nn, f"{node.mode.capitalize()}Pool{ndim}d")
        module = kind(node.kernel, node.stride, node.padding, ceil_mode=node.ceil_mode)
    return tuple(module(empty).shape[1:]), {name: tuple(p.shape) for name, p in module.named_parameters()}


NODES = [
    Conv(8, 3, (2, 1), (1, 2), dilation=(1, 3), groups=4),
    Conv(8, (3, 4), (2, 1), ((2, 0), (1, 5))),
    ConvTranspose(8, (3, 4), (2, 3), padding=1, dilation=(2, 1), groups=2, bias=False),
    *(Pool("max", *options, ceil_mode=True) for options in [(2, 2), (3, 2), (3, 2, 1), (2, 3, 1), (2, 4, 1)]),
    Pool("avg", (3, 2), (1, 2), (1, 0)),
]  # fmt: skip


@pytest.mark.parametrize("size", range(8, 16))
@pytest.mark.parametrize("node", NODES, ids=str)
def test_shapes_of_nodes_are_those_of_torch(node, size):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shape = (4, size, size + 5)
    assert (node.output_shape(shape), node.parameters(shape)) == torch_twin(torch, node, shape)


@ALL
def test_shapes_of_networks_are_those_of_torch(network):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for layer in network.layers:
        if isinstance(layer.node, Conv | Pool):
            shape = network.shapes[layer.inputs[0]]
            twin = torch_twin(torch, layer.node, shape)
            assert (network.shapes[layer.name], layer.node.parameters(shape)) == twin


# Receptive fields ---------------------------------------------------------------------------------


def strided_first(network):
    """The ResNet of the paper, whose bottlenecks stride in their first 1x1 convolution."""
    layers = list(network.layers)
    places = {layer.name: index for index, layer in enumerate(layers)}
    for name, index in places.items():
        if name.endswith(".conv1"):
            other = places[f"{name[:-1]}2"]
            stride = layers[other].node.stride
            layers[index] = replace(layers[index], node=replace(layers[index].node, stride=stride))
            layers[other] = replace(layers[other], node=replace(layers[other].node, stride=1))
    return replace(network, layers=tuple(layers))


@pytest.mark.parametrize(
    ("network", "layer", "field", "jump"),
    [  # from the table of Araujo et al. 2019; the ResNets there are those of the paper
        (get_network("alexnet"), "features.12", 195, 32),
        (get_network("vgg16"), "features.30", 212, 32),
        (get_network("mobilenet_v1"), "conv14.pw", 315, 32),
        (strided_first(get_network("resnet50")), "layer4.2.add", 483, 32),
        (strided_first(get_network("resnet152")), "layer4.2.add", 1507, 32),
        # Version 1.5 strides one layer later: three 3x3 convolutions reach 8, 16 and 32 pixels less far.
        (get_network("resnet50"), "layer4.2.add", 483 - 8 - 16 - 32, 32),
        (get_network("vgg16"), "classifier.0", 212 + 6 * 32, 0),  # a linear layer sees all 7 x 7 pixels
        (get_network("vit_b16_patches"), "conv_proj", 16, 16),
        (get_network("lenet5"), "C5", 32, 4),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_published_receptive_fields(network, layer, field, jump):
    row = {row.name: row for row in network.summary()}[layer]
    assert row.receptive_field == (field, field)
    assert row.jump == (jump, jump)


def positions_read(node, o, size):
    """The positions of an input of that size that output position `o` of a node depends on, by definition."""
    if isinstance(node, ConvTranspose):
        taps = [node.dilation * t - node.padding for t in range(node.kernel)]
        return [i for i in range(size) if o - i * node.stride in taps]
    if isinstance(node, Conv | Pool):
        dilation = getattr(node, "dilation", 1)
        before = node.padding[0][0] if isinstance(node.padding, tuple) else node.padding
        return [o * node.stride - before + dilation * t for t in range(node.kernel)]
    if isinstance(node, MaxUnpool):
        return [o // node.size]
    if isinstance(node, AdaptivePool):
        return range(o * size // node.size, -(-(o + 1) * size // node.size))
    if isinstance(node, Crop):
        return [o + (size - node.size) // 2]
    if isinstance(node, Flatten):
        return range(size)
    return [o]


def traced_extents(network):
    """Extent of what each layer sees along one axis, by following every single pixel through the network."""
    seen = {"input": np.eye(network.input_shape[1], dtype=bool)}
    for layer in network.layers:
        sizes = [len(seen[name]) for name in layer.inputs]
        sees = np.zeros(((*network.shapes[layer.name], 1)[1], network.input_shape[1]), bool)
        for name, size in zip(layer.inputs, sizes):
            for o in range(len(sees)):
                for position in positions_read(layer.node, o, size):
                    if 0 <= position < size:
                        sees[o] |= seen[name][position]
        seen[layer.name] = sees
    return {
        name: max(int(np.ptp(np.flatnonzero(line))) + 1 for line in sees if line.any())
        for name, sees in seen.items()
        if name != "input"
    }


def strange_network(*nodes, skip=None):
    net = Draft(1, 240)
    for index, node in enumerate(nodes):
        net.add(f"layer{index}", node)
    if skip:
        short = net.add("skip", skip, "input")
        net.add("sum", Add(), f"layer{len(nodes) - 1}", short)
        net.add("conv", Conv(1, 3))
    return net.network("strange", "")


@pytest.mark.parametrize(
    "network",
    [
        get_network("unet"),
        get_network("mnist1d"),
        get_network("keras_mnist"),
        get_network("lenet5"),
        strange_network(Conv(1, 4, 3, 1), Conv(1, 2, dilation=3), ConvTranspose(1, 5, 2, 1), Conv(1, 2)),
        strange_network(Pool("max", 2, 2), Pool("max", 3, 3), MaxUnpool(3, "layer1"), Conv(1, 2)),
        strange_network(Conv(1, 5), AdaptivePool(59), Conv(1, 3), Flatten()),
        strange_network(ConvTranspose(1, 3, 2), ConvTranspose(1, 3, 3), Conv(1, 7, 6), Conv(1, 3)),
        strange_network(Conv(1, 3, 2, 1), ConvTranspose(1, 2, 2), skip=Conv(1, 9, padding=4)),
        strange_network(Conv(1, 4, padding=((3, 0),)), Conv(1, 5, 2), skip=Conv(1, 7, 2, ((1, 0),))),
    ],
    ids=lambda network: f"{network.name}{len(network.layers)}",
)  # fmt: skip
def test_receptive_fields_are_those_of_pixels_traced_one_by_one(network):
    found = {row.name: row.receptive_field[0] for row in network.summary()}
    assert found == traced_extents(network)


def test_jump_after_upsampling():
    network = strange_network(ConvTranspose(1, 3, 2), Conv(1, 3))
    assert [row.jump[0] * 2 for row in network.summary()] == [1, 1]


# Structure ----------------------------------------------------------------------------------------


@ALL
def test_graph_is_ready_to_execute(network):
    """Names are unique, inputs come first, all but the last are used, unpoolings know their pooling."""
    known: dict[str, Node | None] = {"input": None}
    used = set()
    for layer in network.layers:
        assert layer.name not in known
        assert set(layer.inputs) <= set(known)
        assert len(layer.inputs) == 1 or isinstance(layer.node, Add | Concat)
        if isinstance(layer.node, MaxUnpool):
            size = layer.node.size
            assert known[layer.node.pool] == Pool("max", size, size, return_indices=True)
        used.update(layer.inputs)
        known[layer.name] = layer.node
    assert set(known) - used == {network.layers[-1].name}
    assert network.source


@ALL
def test_parameters_by_name_are_those_of_the_summary(network):
    shapes = network.parameters()
    assert sum(map(math.prod, shapes.values())) == sum(row.parameters for row in network.summary())


def test_parameters_have_the_names_of_torchvision():
    resnet = get_network("resnet50").parameters()
    assert resnet["layer2.0.downsample.0.weight"] == (512, 256, 1, 1)
    assert resnet["layer2.0.downsample.1.bias"] == (512,)
    assert get_network("resnext50_32x4d").parameters()["layer1.0.conv2.weight"] == (128, 4, 3, 3)
    convnext = get_network("convnext_t").parameters()
    assert convnext["features.1.0.layer_scale"] == (96, 1, 1)
    assert convnext["features.5.8.block.2.weight"] == (384,)
    assert convnext["features.2.1.weight"] == (192, 96, 2, 2)
    assert convnext["classifier.2.weight"] == (1000, 768)
    assert "layer2.0.conv1.bias" not in resnet
    assert get_network("googlenet").parameters()["inception3a.branch3.1.conv.weight"] == (32, 16, 3, 3)
    assert get_network("alexnet").parameters()["classifier.1.weight"] == (4096, 9216)
    assert get_network("vit_b16_patches").parameters()["conv_proj.bias"] == (768,)


def test_unknown_network_lists_the_known_ones():
    with pytest.raises(ConvError, match=r"must be one of lenet5, alexnet, .*, mamba, got 'resnet5'"):
        get_network("resnet5")


@pytest.mark.parametrize(
    ("node", "shapes", "message"),
    [
        (Add(), [(8, 4), (8, 5)], "add: input shapes"),
        (Concat(), [(8, 4), (8, 5)], "concat: spatial sizes"),
        (Linear(10), [(8, 4, 4)], "linear: input rank"),
        (Reshape((3, 3)), [(8,)], "reshape: elements"),
    ],
)
def test_nodes_that_do_not_fit_say_so(node, shapes, message):
    with pytest.raises(ConvError, match=message):
        node.output_shape(*shapes)


def test_network_whose_maps_vanish_says_so():
    with pytest.raises(ConvError, match="output extents of layer1 must be at least 1"):
        _ = strange_network(Pool("max", 200, 1), Conv(1, 50)).shapes


# Table --------------------------------------------------------------------------------------------


def test_summary_as_a_table(capsys):
    pytest.importorskip("rich", reason="rich is not installed")
    print_summary(get_network("resnet18"))
    lines = capsys.readouterr().out.splitlines()
    cells = next(line.split() for line in lines if line.split()[:1] == ["layer2.0.conv1"])
    assert cells == ["layer2.0.conv1", "conv", "3x3/2", "128x28x28", "73,728", "57,802,752", "51x51", "8x8"]
    assert any("11,689,512" in line and "1,814,073,344" in line and "69 layers" in line for line in lines)
    assert any("He et al. 2016" in line for line in lines)


def test_summary_needs_no_package_beside_numpy():
    """NumPy, which fastconv needs anyway, computes what nodes run."""
    code = (
        "import sys; from bench.networks import NETWORKS; [n.summary() for n in NETWORKS.values()]; "
        "print(*{'rich', 'torch', 'numba', 'safetensors', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    ("node", "ndim", "text"),
    [
        (Conv(8, (1, 7), (1, 2)), 2, "conv 1x7/1x2"),
        (Conv(8, 3, 2, groups=8), 2, "conv 3x3/2 groups 8"),
        (ConvTranspose(8, 2, 2), 3, "transposed conv 2x2x2/2"),
        (Pool("max", 3, 1), 1, "max pool 3"),
        (MaxUnpool(2, "pool1"), 2, "max unpool x2x2"),
        (Activation("relu"), 2, "relu"),
        (BatchNorm(), 2, "batch norm"),
    ],
)
def test_nodes_describe_themselves(node, ndim, text):
    assert node.describe(ndim) == text
