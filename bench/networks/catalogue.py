"""The table of networks.

Where torchvision has the network, its variant and its layer names are taken, so that a checkpoint's arrays
are found by name. Elsewhere the paper is followed, and names are the paper's or speak for themselves;
paddings that a paper leaves open are those that give the sizes it prints. The ImageNet classifiers end in
scores, without the softmax of their loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches

from bench.networks.network import Draft, Network
from bench.networks.nodes import (
    Activation,
    AdaptivePool,
    Add,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Crop,
    Dropout,
    Flatten,
    LayerNorm,
    LayerScale,
    Linear,
    LocalResponseNorm,
    MaxUnpool,
    Node,
    Pool,
    Reshape,
    Softmax,
)
from fastconv.problem import ConvError

RELU = Activation("relu")
GELU = Activation("gelu")
# alpha = 1e-4 in Krizhevsky et al. 2012, who do not divide the sum by the number of channels, as torch does.
NORM = LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)


def get_network(name: str) -> Network:
    """The network of that name; a ConvError lists the known names.

    >>> get_network("vgg16").shapes["features.30"]
    (512, 7, 7)
    """
    if name not in NETWORKS:
        close = get_close_matches(name.lower(), NETWORKS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConvError(f"networks: name must be one of {', '.join(NETWORKS)}, got {name!r}{hint}")
    return NETWORKS[name]


def _lenet5() -> Network:
    """LeNet-5 with plain averages for the trained subsampling, all maps joined in C3, and a linear output."""
    net = Draft(1, 32, 32)
    tanh = Activation("tanh")
    net.add("C1", Conv(6, 5))
    net.add("C1.tanh", tanh)
    net.add("S2", Pool("avg", 2, 2))
    net.add("C3", Conv(16, 5))
    net.add("C3.tanh", tanh)
    net.add("S4", Pool("avg", 2, 2))
    net.add("C5", Conv(120, 5))
    net.add("C5.tanh", tanh)
    net.add("flatten", Flatten())
    net.add("F6", Linear(84))
    net.add("F6.tanh", tanh)
    net.add("output", Linear(10))
    source = "LeCun et al. 1998, Gradient-based learning applied to document recognition; C3 fully connected"
    return net.network("lenet5", source)


def _alexnet() -> Network:
    """AlexNet in its one-column form of 2014: no groups, no response normalisation, 64 first filters."""
    net = Draft(3, 224, 224)
    features: list[Node] = [Conv(64, 11, stride=4, padding=2), RELU, Pool("max", 3, 2)]
    features += [Conv(192, 5, padding=2), RELU, Pool("max", 3, 2)]
    for channels in (384, 256, 256):
        features += [Conv(channels, 3, padding=1), RELU]
    net.stack("features", [*features, Pool("max", 3, 2)])
    net.add("avgpool", AdaptivePool(6))
    net.add("flatten", Flatten())
    net.stack("classifier", [Dropout(), Linear(4096), RELU, Dropout(), Linear(4096), RELU, Linear(1000)])
    source = "Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks; torchvision"
    return net.network("alexnet", source)


def _zfnet() -> Network:
    """The network of Zeiler and Fergus, figure 3; its contrast normalisation as in AlexNet."""
    net = Draft(3, 224, 224)
    net.add("conv1", Conv(96, 7, stride=2, padding=1))
    net.add("relu1", RELU)
    net.add("pool1", Pool("max", 3, 2, ceil_mode=True))
    net.add("norm1", NORM)
    net.add("conv2", Conv(256, 5, stride=2))
    net.add("relu2", RELU)
    net.add("pool2", Pool("max", 3, 2, ceil_mode=True))
    net.add("norm2", NORM)
    for index, channels in enumerate((384, 384, 256), start=3):
        net.add(f"conv{index}", Conv(channels, 3, padding=1))
        net.add(f"relu{index}", RELU)
    net.add("pool5", Pool("max", 3, 2))
    net.add("flatten", Flatten())
    for index in (6, 7):
        net.add(f"fc{index}", Linear(4096))
        net.add(f"relu{index}", RELU)
        net.add(f"dropout{index}", Dropout())
    net.add("fc8", Linear(1000))
    return net.network("zfnet", "Zeiler and Fergus 2014, Visualizing and understanding convolutional nets")


def _vgg(name: str, convolutions: tuple[int, ...]) -> Network:
    """VGG with that many 3x3 convolutions in each of its five blocks."""
    net = Draft(3, 224, 224)
    features: list[Node] = []
    for channels, count in zip((64, 128, 256, 512, 512), convolutions):
        features += [Conv(channels, 3, padding=1), RELU] * count
        features.append(Pool("max", 2, 2))
    net.stack("features", features)
    net.add("avgpool", AdaptivePool(7))
    net.add("flatten", Flatten())
    net.stack("classifier", [Linear(4096), RELU, Dropout(), Linear(4096), RELU, Dropout(), Linear(1000)])
    source = "Simonyan and Zisserman 2015, Very deep convolutional networks for large-scale image recognition"
    return net.network(name, f"{source}; torchvision")


# Filters of an inception module: 1x1; 1x1 then 3x3; 1x1 then the large kernel; 1x1 after the pooling.
Filters = tuple[int, tuple[int, int], tuple[int, int], int]
INCEPTIONS: dict[str, Filters] = {
    "3a": (64, (96, 128), (16, 32), 32), "3b": (128, (128, 192), (32, 96), 64),
    "4a": (192, (96, 208), (16, 48), 64), "4b": (160, (112, 224), (24, 64), 64),
    "4c": (128, (128, 256), (24, 64), 64), "4d": (112, (144, 288), (32, 64), 64),
    "4e": (256, (160, 320), (32, 128), 128),
    "5a": (256, (160, 320), (32, 128), 128), "5b": (384, (192, 384), (48, 128), 128),
}  # fmt: skip


def _googlenet() -> Network:
    """GoogLeNet as in torchvision: batch normalisation, 3x3 where the paper has 5x5; no auxiliary heads."""

    def unit(net: Draft, name: str, channels: int, kernel: int, stride: int = 1) -> str:
        net.add(f"{name}.conv", Conv(channels, kernel, stride, kernel // 2, bias=False))
        net.add(f"{name}.bn", BatchNorm(eps=1e-3))
        return net.add(f"{name}.relu", RELU)

    network = _inceptions("googlenet", "torchvision", unit, large=3, pool4=2, norms=False, dropout=0.2)
    return replace(network, training_only=("aux1.", "aux2."))


def _googlenet_2014() -> Network:
    """GoogLeNet as published: 5x5 kernels, biases, response normalisation; without the auxiliary heads."""

    def unit(net: Draft, name: str, channels: int, kernel: int, stride: int = 1) -> str:
        net.add(f"{name}.conv", Conv(channels, kernel, stride, kernel // 2))
        return net.add(f"{name}.relu", RELU)

    return _inceptions("googlenet_2014", "as published", unit, large=5, pool4=3, norms=True, dropout=0.4)


def _inceptions(
    name: str, variant: str, unit: Callable[..., str], *, large: int, pool4: int, norms: bool, dropout: float
) -> Network:
    """GoogLeNet from what its variants differ in; `large` is the kernel of the third branch of a module."""
    net = Draft(3, 224, 224)
    unit(net, "conv1", 64, 7, 2)
    net.add("maxpool1", Pool("max", 3, 2, ceil_mode=True))
    if norms:
        net.add("norm1", NORM)
    unit(net, "conv2", 64, 1)
    unit(net, "conv3", 192, 3)
    if norms:
        net.add("norm2", NORM)
    net.add("maxpool2", Pool("max", 3, 2, ceil_mode=True))
    for index, filters in INCEPTIONS.items():
        if index == "4a":
            net.add("maxpool3", Pool("max", 3, 2, ceil_mode=True))
        if index == "5a":
            net.add("maxpool4", Pool("max", pool4, 2, ceil_mode=True))
        _add_inception(net, f"inception{index}", unit, filters, large)
    net.add("avgpool", AdaptivePool(1))
    net.add("flatten", Flatten())
    net.add("dropout", Dropout(dropout))
    net.add("fc", Linear(1000))
    return net.network(name, f"Szegedy et al. 2015, Going deeper with convolutions; {variant}")


def _add_inception(net: Draft, name: str, unit: Callable[..., str], filters: Filters, large: int) -> None:
    """Four branches that read the same map, side by side."""
    single, (reduce3, wide3), (reduce5, wide5), pooled = filters
    start, ends = net.last, []
    ends.append(unit(net, f"{name}.branch1", single, 1))
    for branch, (reduce, wide, kernel) in {2: (reduce3, wide3, 3), 3: (reduce5, wide5, large)}.items():
        net.last = start
        unit(net, f"{name}.branch{branch}.0", reduce, 1)
        ends.append(unit(net, f"{name}.branch{branch}.1", wide, kernel))
    net.add(f"{name}.branch4.0", Pool("max", 3, 1, padding=1, ceil_mode=True), start)
    ends.append(unit(net, f"{name}.branch4.1", pooled, 1))
    net.add(f"{name}.concat", Concat(), *ends)


MakeBlock = Callable[[int, int], list[Conv]]  # (width, stride)
RESNET = "He et al. 2016, Deep residual learning for image recognition"
RESNEXT = "Xie et al. 2017, Aggregated residual transformations for deep neural networks"


def _resnet(name: str, blocks: tuple[int, ...], make_block: MakeBlock, source: str = RESNET) -> Network:
    """ResNet with that many blocks in its four stages; a bottleneck strides in its 3x3 (version 1.5)."""
    net, channels = Draft(3, 224, 224), 64
    _add_normalised(net, "conv1", "bn1", Conv(64, 7, 2, 3, bias=False))
    net.add("relu", RELU)
    net.add("maxpool", Pool("max", 3, 2, padding=1))
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks)):
        for block in range(count):
            stride = 2 if stage and not block else 1
            convs = make_block(width, stride)
            wide = convs[-1].channels
            # A block has a projection on its shortcut, unless the shape stays the same.
            projection = Conv(wide, 1, stride, bias=False) if stride > 1 or wide != channels else None
            _add_residual(net, f"layer{stage + 1}.{block}", convs, projection)
            channels = wide
    net.add("avgpool", AdaptivePool(1))
    net.add("flatten", Flatten())
    net.add("fc", Linear(1000))
    return net.network(name, f"{source}; torchvision")


def _basic(width: int, stride: int) -> list[Conv]:
    return [Conv(width, 3, stride, 1, bias=False), Conv(width, 3, 1, 1, bias=False)]


def _bottleneck(width: int, stride: int) -> list[Conv]:
    narrow, wide = Conv(width, 1, bias=False), Conv(4 * width, 1, bias=False)
    return [narrow, Conv(width, 3, stride, 1, bias=False), wide]


def _aggregated(width: int, stride: int) -> list[Conv]:
    """The bottleneck of ResNeXt 32x4d: twice as wide inside, its 3x3 in 32 groups."""
    narrow, wide = Conv(2 * width, 1, bias=False), Conv(4 * width, 1, bias=False)
    return [narrow, Conv(2 * width, 3, stride, 1, groups=32, bias=False), wide]


def _add_residual(net: Draft, name: str, convs: list[Conv], projection: Conv | None) -> None:
    """Convolutions whose result is added to their input, or to its projection where there is one."""
    start = net.last
    for index, conv in enumerate(convs, start=1):
        if index > 1:
            net.add(f"{name}.relu{index - 1}", RELU)
        body = _add_normalised(net, f"{name}.conv{index}", f"{name}.bn{index}", conv)
    shortcut = start
    if projection:
        net.last = start
        shortcut = _add_normalised(net, f"{name}.downsample.0", f"{name}.downsample.1", projection)
    net.add(f"{name}.add", Add(), body, shortcut)
    net.add(f"{name}.relu{len(convs)}", RELU)


def _add_normalised(net: Draft, name: str, norm: str, conv: Conv) -> str:
    net.add(name, conv)
    return net.add(norm, BatchNorm())


def _mobilenet_v1() -> Network:
    """MobileNet of width 1: 13 pairs of a 3x3 convolution per channel and a 1x1 convolution."""
    net = Draft(3, 224, 224)
    _add_normalised(net, "conv1", "conv1.bn", Conv(32, 3, 2, 1, bias=False))
    net.add("conv1.relu", RELU)
    channels, steps = 32, [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    for index, (wide, stride) in enumerate([*steps, (1024, 2), (1024, 1)], start=2):
        depthwise = Conv(channels, 3, stride, 1, groups=channels, bias=False)
        for part, conv in {"dw": depthwise, "pw": Conv(wide, 1, bias=False)}.items():
            _add_normalised(net, f"conv{index}.{part}", f"conv{index}.{part}.bn", conv)
            net.add(f"conv{index}.{part}.relu", RELU)
        channels = wide
    net.add("avgpool", AdaptivePool(1))
    net.add("flatten", Flatten())
    net.add("fc", Linear(1000))
    return net.network("mobilenet_v1", "Howard et al. 2017, MobileNets; table 1, width 1, resolution 224")


def _convnext_t() -> Network:
    """ConvNeXt-T: 7x7 per channel, then two 1x1, which torchvision writes as linear layers over channels."""
    net = Draft(3, 224, 224)
    net.add("features.0.0", Conv(96, 4, stride=4))
    net.add("features.0.1", LayerNorm())
    for stage, (channels, count) in enumerate(zip((96, 192, 384, 768), (3, 3, 9, 3))):
        if stage:
            net.add(f"features.{2 * stage}.0", LayerNorm())
            net.add(f"features.{2 * stage}.1", Conv(channels, 2, stride=2))
        for index in range(count):
            start, name = net.last, f"features.{2 * stage + 1}.{index}"
            net.add(f"{name}.block.0", Conv(channels, 7, padding=3, groups=channels))
            net.add(f"{name}.block.2", LayerNorm())
            net.add(f"{name}.block.3", Conv(4 * channels, 1))
            net.add(f"{name}.block.4", GELU)
            net.add(f"{name}.block.5", Conv(channels, 1))
            scaled = net.add(name, LayerScale())
            net.add(f"{name}.add", Add(), start, scaled)
    net.add("avgpool", AdaptivePool(1))
    net.stack("classifier", [LayerNorm(), Flatten(), Linear(1000)])
    return net.network("convnext_t", "Liu et al. 2022, A ConvNet for the 2020s; torchvision convnext_tiny")


def _replknet_31b() -> Network:
    """RepLKNet-31B as it is run: the 5x5 kernels that help its training are merged into the large ones."""

    def unit(name: str, conv: Conv, activation: Node | None = None) -> str:
        _add_normalised(net, f"{name}.conv", f"{name}.bn", conv)
        return net.add(f"{name}.nonlinear", activation) if activation else net.last

    def depthwise(channels: int, stride: int) -> Conv:
        return Conv(channels, 3, stride, 1, groups=channels, bias=False)

    net = Draft(3, 224, 224)
    stem = (Conv(128, 3, 2, 1, bias=False), depthwise(128, 1), Conv(128, 1, bias=False), depthwise(128, 2))
    for index, conv in enumerate(stem):
        unit(f"stem.{index}", conv, RELU)
    for stage, (channels, kernel, count) in enumerate(
        zip((128, 256, 512, 1024), (31, 29, 27, 13), (2, 2, 18, 2))
    ):
        if stage:
            unit(f"transitions.{stage - 1}.0", Conv(channels, 1, bias=False), RELU)
            unit(f"transitions.{stage - 1}.1", depthwise(channels, 2), RELU)
        narrow, wide = Conv(channels, 1, bias=False), Conv(4 * channels, 1, bias=False)
        for index in range(count):
            start, name = net.last, f"stages.{stage}.blocks.{2 * index}"
            net.add(f"{name}.prelkb_bn", BatchNorm())
            unit(f"{name}.pw1", narrow, RELU)
            large = Conv(channels, kernel, padding=kernel // 2, groups=channels)
            net.add(f"{name}.large_kernel.lkb_reparam", large)
            net.add(f"{name}.lk_nonlinear", RELU)
            start = net.add(f"{name}.add", Add(), start, unit(f"{name}.pw2", narrow))
            name = f"stages.{stage}.blocks.{2 * index + 1}"
            net.add(f"{name}.preffn_bn", BatchNorm())
            unit(f"{name}.pw1", wide, GELU)
            net.add(f"{name}.add", Add(), start, unit(f"{name}.pw2", narrow))
    net.add("norm", BatchNorm())
    net.add("avgpool", AdaptivePool(1))
    net.add("flatten", Flatten())
    net.add("head", Linear(1000))
    source = "Ding et al. 2022, Scaling up your kernels to 31x31; github.com/DingXiaoH/RepLKNet-pytorch"
    return net.network("replknet_31b", source)


def _mamba() -> Network:
    """The short causal convolution in each of the 24 mixers of Mamba-130m, on 2,048 tokens.

    The official code pads both ends by 3 and drops the last 3 outputs, which is the same.
    """
    net = Draft(1536, 2048)
    net.add("mixer.conv1d", Conv(1536, 4, padding=((3, 0),), groups=1536))
    net.add("mixer.act", Activation("silu"))
    source = "Gu and Dao 2023, Mamba: linear-time sequence modeling; github.com/state-spaces/mamba"
    return net.network("mamba", source)


def _yolo_v1() -> Network:
    """YOLO: 24 convolutions and two linear layers to 30 numbers for each of 7 x 7 cells."""
    blocks: list[list[tuple[int, int]]] = [  # (filters, kernel), a pooling between blocks
        [(64, 7)],
        [(192, 3)],
        [(128, 1), (256, 3), (256, 1), (512, 3)],
        [(256, 1), (512, 3)] * 4 + [(512, 1), (1024, 3)],
        [(512, 1), (1024, 3)] * 2 + [(1024, 3)] * 4,
    ]
    net, leaky, index = Draft(3, 448, 448), Activation("leaky_relu", 0.1), 0
    for number, block in enumerate(blocks, start=1):
        for channels, kernel in block:
            index += 1
            stride = 2 if index in (1, 22) else 1
            net.add(f"conv{index}", Conv(channels, kernel, stride, kernel // 2))
            net.add(f"leaky{index}", leaky)
        if number < len(blocks):
            net.add(f"pool{number}", Pool("max", 2, 2))
    net.add("flatten", Flatten())
    net.add("fc25", Linear(4096))
    net.add("leaky25", leaky)
    net.add("dropout", Dropout())
    net.add("fc26", Linear(7 * 7 * 30))
    net.add("grid", Reshape((30, 7, 7)))
    source = "Redmon et al. 2016, You only look once: unified, real-time object detection; figure 3"
    return net.network("yolo_v1", source)


def _deconvnet() -> Network:
    """VGG-16 and its mirror image: unpooling where the maxima were, transposed convolutions of stride 1."""

    def unit(name: str, conv: Conv) -> None:
        _add_normalised(net, name, f"{name}.bn", conv)
        net.add(f"{name}.relu", RELU)

    net = Draft(3, 224, 224)
    for stage, (channels, count) in enumerate(zip((64, 128, 256, 512, 512), (2, 2, 3, 3, 3)), start=1):
        for index in range(1, count + 1):
            unit(f"conv{stage}-{index}", Conv(channels, 3, padding=1, bias=False))
        net.add(f"pool{stage}", Pool("max", 2, 2, return_indices=True))
    unit("fc6", Conv(4096, 7, bias=False))
    unit("fc7", Conv(4096, 1, bias=False))
    unit("deconv-fc6", ConvTranspose(512, 7, bias=False))
    mirror = {5: (512, 512, 512), 4: (512, 512, 256), 3: (256, 256, 128), 2: (128, 64), 1: (64, 64)}
    for stage, widths in mirror.items():
        net.add(f"unpool{stage}", MaxUnpool(2, pool=f"pool{stage}"))
        for index, channels in enumerate(widths, start=1):
            unit(f"deconv{stage}-{index}", ConvTranspose(channels, 3, padding=1, bias=False))
    net.add("output", Conv(21, 1))
    source = "Noh et al. 2015, Learning deconvolution network for semantic segmentation"
    return net.network("deconvnet", source)


def _unet() -> Network:
    """U-Net: four 2x2 poolings down, four 2x2 transposed convolutions of stride 2 up, no padding."""

    def pair(name: str, channels: int) -> str:
        for index in (1, 2):
            net.add(f"{name}.conv{index}", Conv(channels, 3))
            net.add(f"{name}.relu{index}", RELU)
        return net.last

    net, skips = Draft(1, 572, 572), []
    for level, channels in enumerate((64, 128, 256, 512), start=1):
        skips.append(pair(f"down{level}", channels))
        net.add(f"pool{level}", Pool("max", 2, 2))
    pair("bottom", 1024)
    net.add("dropout", Dropout())
    for level, channels, size in ((4, 512, 56), (3, 256, 104), (2, 128, 200), (1, 64, 392)):
        up = net.add(f"up{level}", ConvTranspose(channels, 2, stride=2))
        skip = net.add(f"up{level}.crop", Crop(size), skips[level - 1])
        net.add(f"up{level}.concat", Concat(), skip, up)
        pair(f"up{level}", channels)
    net.add("output", Conv(2, 1))
    source = "Ronneberger et al. 2015, U-Net: convolutional networks for biomedical segmentation; figure 1"
    return net.network("unet", source)


def _vit_b16_patches() -> Network:
    """The patch embedding of ViT-B/16: one convolution makes 14 x 14 tokens of 768 numbers."""
    net = Draft(3, 224, 224)
    net.add("conv_proj", Conv(768, 16, stride=16))
    source = "Dosovitskiy et al. 2021, An image is worth 16x16 words; torchvision vit_b_16"
    return net.network("vit_b16_patches", source)


def _keras_mnist() -> Network:
    """The introductory convolutional net of the Keras book, on MNIST digits."""
    net = Draft(1, 28, 28)
    for index, channels in enumerate((32, 64, 64), start=1):
        net.add(f"conv{index}", Conv(channels, 3))
        net.add(f"relu{index}", RELU)
        if index < 3:
            net.add(f"pool{index}", Pool("max", 2, 2))
    net.add("flatten", Flatten())
    net.add("dense1", Linear(64))
    net.add("relu4", RELU)
    net.add("dense2", Linear(10))
    net.add("softmax", Softmax())
    return net.network("keras_mnist", "Chollet 2018, Deep learning with Python, section 5.1")


def _mnist1d() -> Network:
    """The convolutional net of Prince's book on the MNIST-1D signals of Greydanus (length 40)."""
    net = Draft(1, 40)
    for index in (1, 2, 3):
        net.add(f"conv{index}", Conv(15, 3, stride=2))
        net.add(f"relu{index}", RELU)
    net.add("flatten", Flatten())
    net.add("fc", Linear(10))
    source = "Prince 2023, Understanding deep learning, section 10.2.7; data of Greydanus 2020"
    return net.network("mnist1d", source)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        _lenet5(),
        _alexnet(),
        _zfnet(),
        _vgg("vgg16", (2, 2, 3, 3, 3)),
        _vgg("vgg19", (2, 2, 4, 4, 4)),
        _googlenet(),
        _googlenet_2014(),
        _resnet("resnet18", (2, 2, 2, 2), _basic),
        _resnet("resnet50", (3, 4, 6, 3), _bottleneck),
        _resnet("resnet152", (3, 8, 36, 3), _bottleneck),
        _resnet("resnext50_32x4d", (3, 4, 6, 3), _aggregated, RESNEXT),
        _mobilenet_v1(),
        _convnext_t(),
        _replknet_31b(),
        _yolo_v1(),
        _deconvnet(),
        _unet(),
        _vit_b16_patches(),
        _keras_mnist(),
        _mnist1d(),
        _mamba(),
    )
}
