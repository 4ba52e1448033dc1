"""A network enters, its arrays leave by name ("layer.array"): read from a file, or drawn by chance."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from bench.networks.network import Network
from bench.networks.nodes import Shape
from fastconv.problem import ConvError

DTYPE = np.dtype("float32")
COUNTER = "num_batches_tracked"  # torch's batch norm counts its batches; a run does not need to know
SHOWN = 5  # names in an error
PICKLED = (".pth", ".pt", ".bin", ".ckpt")  # torch.save's, which could run anything when they are read


def load_weights(network: Network, path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a network from a .safetensors or .npz file, which holds them as float32 by name.

    torchvision's checkpoints fit the networks that follow it. A weight of a 1x1 convolution may be stored as
    the matrix of a linear layer. Raises ConvError, before anything is kept, for a file that cannot be read,
    for names that are missing or unknown, and for arrays of another shape or dtype.

    >>> import tempfile
    >>> from bench.networks import get_network
    >>> net = get_network("mnist1d")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "mnist1d.npz"
    ...     np.savez(path, **draw_weights(net))
    ...     load_weights(net, path)["fc.weight"].shape
    (10, 60)
    """
    ignored = network.training_only
    found = {
        name: array
        for name, array in _read(path).items()
        if not (name.endswith(f".{COUNTER}") or name.startswith(ignored))
    }
    wanted = network.arrays()
    _check_names(network, path, wanted, found)
    return {name: _fit(f"{path.name}: {name}", found[name], shape) for name, shape in wanted.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file."""
    if not path.is_file():
        raise ConvError(f"weights: the file must exist, got {path}")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    hint = ""
    if path.suffix in PICKLED:
        load = f'torch.load("{path.name}", weights_only=True)'
        hint = f': convert it once with safetensors.torch.save_file({load}, "{path.stem}.safetensors")'
    raise ConvError(f"weights: the file must be of type .safetensors or .npz, got {path.name}{hint}")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ConvError(f"weights: {path.name} cannot be read as .npz: {error}") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        need = 'safetensors is not installed: pip install ".[bench]" in the checkout'
        raise ConvError(f"weights: {need}") from error
    try:
        return load_file(path)
    except (OSError, KeyError, TypeError, SafetensorError) as error:  # those of Python: a dtype NumPy lacks
        raise ConvError(f"weights: {path.name} cannot be read as .safetensors: {error}") from error


def _check_names(
    network: Network, path: Path, wanted: Mapping[str, Shape], found: Mapping[str, np.ndarray]
) -> None:
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        parts = [f"{len(missing)} missing ({_list(missing, wanted)})"] * bool(missing)
        parts += [f"{len(unknown)} unknown ({_list(unknown, found)})"] * bool(unknown)
        rule = f"{path.name} must hold the {len(wanted)} arrays of {network.name}"
        prefix = _find_prefix(wanted, found)
        hint = f"; all names in the file begin with {prefix!r}: save it without" if prefix else ""
        raise ConvError(f"weights: {rule}, got {' and '.join(parts)}{hint}")


def _find_prefix(wanted: Collection[str], found: Collection[str]) -> str:
    """What all names that were found begin with, if without it the most of them are wanted, else nothing.

    >>> _find_prefix(["stem.weight", "stem.bias"], ["model.stem.weight", "model.stem.bias"])
    'model.'
    """
    first = next(iter(found), "")
    starts = [first[: index + 1] for index, letter in enumerate(first) if letter == "."]
    prefixes = [start for start in starts if all(name.startswith(start) for name in found)]

    def count(prefix: str) -> int:
        return sum(name.removeprefix(prefix) in wanted for name in found)

    best = max(prefixes, key=count, default="")
    return best if count(best) > count("") else ""


def _list(names: Iterable[str], order: Iterable[str]) -> str:
    """The first few of the names in that order."""
    listed = [name for name in order if name in set(names)]
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")


def _fit(what: str, array: np.ndarray, shape: Shape) -> np.ndarray:
    """The array in its shape, or an error."""
    if array.dtype != DTYPE:
        raise ConvError(f"weights: {what} must be of dtype {DTYPE}, got {array.dtype}")
    is_matrix = array.ndim == 2 and shape == (*array.shape, *(1,) * (len(shape) - 2))
    if array.shape != shape and not is_matrix:
        raise ConvError(f"weights: {what} must have shape {shape}, got {array.shape}")
    return np.ascontiguousarray(array.reshape(shape))


def draw_weights(network: Network, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw all arrays of a network, the same for the same seed.

    Weights have the variance 2 / (numbers summed for an output) of He, Zhang, Ren and Sun 2015 (arXiv
    1502.01852), so that what enters and what leaves a layer and its ReLU is of one size. All others are drawn
    around what leaves their input unchanged, and not that itself: a run that forgot one would show it.
    """
    rng = np.random.default_rng(seed)
    arrays = {}
    for layer in network.layers:
        node, inputs = layer.node, network.shapes[layer.inputs[0]]
        outputs = math.prod(network.shapes[layer.name])
        for name, shape in {**node.parameters(inputs), **node.buffers(inputs)}.items():
            drawn = rng.random(shape, dtype=DTYPE)  # in 0 ... 1
            if name == "weight" and len(shape) > 1:
                reach = math.sqrt(6 * outputs / node.macs(inputs))  # macs / outputs are summed for each
                low, high = -reach, reach
            else:
                low, high = (-0.1, 0.1) if name in ("bias", "running_mean") else (0.5, 1.5)
            drawn *= DTYPE.type(high - low)
            drawn += DTYPE.type(low)
            arrays[f"{layer.name}.{name}"] = drawn
    return arrays
