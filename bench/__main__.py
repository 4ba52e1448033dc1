"""Command line of the benchmarks: options enter, an exit status leaves."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Commands = Any  # argparse does not name the type of its subparsers

OUTPUT = Path("bench-results")
MAIN_SECONDS = 110.0
OPERATIONS = ("forward", "fused", "grad_input", "grad_weight")
GPU_PARTS = ("compile", "verify", "repeat", "sanitize", "bench")
GPU_OUTPUT = Path("bench/results")
DATA_SETS = ("mnist1d", "digits")
EPOCHS = "600 with mnist1d, 25 with digits, with --transfer three times 25"  # bench/train/recipes.py

EPILOG = """\
Without a command, `main` runs; its options may then stand alone (python -m bench --seconds 60).
Every result is checked against the float64 reference, element by element: one that lies outside its error
bound makes the exit status 1. `python -m bench COMMAND --help` shows a command's options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if every check passed, 1 if one failed, 2 if the command itself cannot run."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = make_parser().parse_args(_with_command(words))
    if "output" in options and not _is_writable(options.output):
        return _refuse(f"--output must be a folder that can be written to, got {options.output}")
    if getattr(options, "threads", None):
        os.environ["FASTCONV_THREADS"] = str(options.threads)
    if options.run == "run_gpu":
        from bench.gpu.command import run_gpu  # a machine with a GPU may lack what the other commands need

        return run_gpu(options, words)
    if options.run == "run_fit":
        from bench.gpu.fit import run_fit

        return run_fit(options.file)
    if options.run in ("run_train", "run_network"):
        # Small products: threads would wait for each other, or for fastconv's, longer than they work.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from bench import commands  # here, because --help needs none of what it imports
    except ModuleNotFoundError as error:
        return _refuse(f'{error.name} is not installed: pip install ".[bench]" in the checkout')
    from bench.session import CommandError
    from fastconv.problem import ConvError

    try:
        return int(getattr(commands, options.run)(options, words))
    except (ConvError, CommandError) as error:
        return _refuse(str(error))


def _refuse(reason: str) -> int:
    print(f"python -m bench: {reason}", file=sys.stderr)
    return 2


def _is_writable(folder: Path) -> bool:
    """Whether a folder is there or can be made; asked before anything is measured, which would be lost."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def _with_command(words: Sequence[str]) -> list[str]:
    """Put `main` in front of options that stand alone."""
    alone = not words or (words[0].startswith("-") and words[0] not in ("-h", "--help"))
    return ["main", *words] if alone else list(words)


def make_parser() -> argparse.ArgumentParser:
    """One subcommand for each run."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks of fastconv.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_main(commands)
    _add_layers(commands)
    _add_photo(commands)
    _add_networks(commands)
    _add_network(commands)
    _add_compare(commands)
    _add_report(commands)
    _add_kernels(commands)
    _add_gpu(commands)
    _add_fit(commands)
    _add_train(commands)
    return parser


def _add_command(commands: Commands, name: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=f"run_{name}")
    return parser


def _add_main(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "main",
        "the photograph, then the layers of all networks with every algorithm that accepts them, as far as "
        "the time reaches; rows and a report are written, and what was left out is named",
    )
    _add_output(parser)
    _add_threads(parser)
    parser.add_argument("--seconds", type=_duration, default=MAIN_SECONDS, help="time for the layers")


def _add_layers(commands: Commands) -> None:
    parser = _add_command(
        commands, "layers", "layers of chosen networks with chosen algorithms, checked and timed"
    )
    _add_output(parser)
    _add_threads(parser)
    _add_workload(parser, networks="all", dtypes=("float32", "float64", "float16", "bfloat16"))
    parser.add_argument("--algorithms", type=_names, default="all", metavar="NAME,...", help="or some")
    parser.add_argument("--seconds", type=_duration, default=float("inf"), help="leave out what does not fit")


def _add_photo(commands: Commands) -> None:
    parser = _add_command(
        commands, "photo", "filter a photograph with the classical kernels and save the maps"
    )
    _add_output(parser)
    _add_threads(parser)


def _add_networks(commands: Commands) -> None:
    parser = _add_command(
        commands, "networks", "a network's layers: shapes, parameters, multiply-adds, receptive fields"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="all names are listed, if none is given")


def _add_network(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "network",
        "run one network on a picture: time, algorithm, rate and memory of every layer, and pictures of its "
        "first filters, of the maps of chosen layers and of what speaks for its class",
    )
    parser.add_argument("name", metavar="NAME", help="as `python -m bench networks` lists them")
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}  # what has no default that could be shown
    parser.set_defaults(image=None, weights=None, chosen=None)
    parser.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="a picture, instead of matplotlib's photograph of Grace Hopper",
        **unset,
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help=".safetensors or .npz, not random ones", **unset
    )
    parser.add_argument(
        "--layers", type=_names, default=(), metavar="NAME,...", help="whose maps are pictured, not a choice"
    )
    parser.add_argument("--unfused", action="store_true", help="every layer by itself")
    parser.add_argument("--batch", type=_positive, default=1, help="samples in the input, all alike")
    parser.add_argument("--top", type=_positive, default=5, help="classes that are printed")
    parser.add_argument(
        "--class", type=_index, dest="chosen", metavar="INDEX", help="of the class-activation map", **unset
    )
    _add_threads(parser)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="DIR", help="where rows and pictures go"
    )


def _add_compare(commands: Commands) -> None:
    parser = _add_command(
        commands, "compare", "side by side with another library, each in its own process, turn about"
    )
    _add_output(parser)
    _add_threads(parser, default=1)
    _add_workload(parser, networks="resnet50,vgg16", dtypes=("float32", "float64"))
    parser.add_argument("--baseline", choices=["torch"], default="torch", help="the other library")
    parser.add_argument(
        "--operation",
        choices=OPERATIONS,
        default="forward",
        help="fused: relu(convolution + bias + residual), in one call of ours; or a gradient by itself",
    )
    parser.add_argument("--rounds", type=_positive, default=7, help="turns of each side on each layer")
    parser.add_argument("--algo", default="auto", help="fastconv's; auto takes over where it refuses")


def _add_report(commands: Commands) -> None:
    parser = _add_command(commands, "report", "render the HTML report again from files of rows")
    _add_output(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")


def _add_kernels(commands: Commands) -> None:
    parser = _add_command(
        commands, "kernels", "CUDA kernels compiled without a GPU: registers, occupancy, main loops"
    )
    _add_output(parser)
    parser.add_argument("--architectures", type=_names, default="all", metavar="SM,...", help="or 75,90")
    parser.add_argument("--dtypes", type=_names, default="all", metavar="NAME,...", help="or float32")
    parser.add_argument("--all", action="store_true", help="all kernels, not one for each pair of settings")


def _add_gpu(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "gpu",
        "on a GPU, with CuPy: compile and verify all kernels, repeat them for races, run compute-sanitizer, "
        "time the layers of the networks beside cuDNN; 8 minutes at most",
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        type=_part,
        help=f"of {', '.join(GPU_PARTS)}; all, if none is given",
    )
    parser.add_argument(
        "--output", type=Path, default=GPU_OUTPUT, metavar="DIR", help="where <gpu>.json goes"
    )


def _add_fit(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "fit",
        "from a file that gpu or layers wrote: each algorithm's times over its estimates, what auto loses to "
        "the fastest algorithm, and which constants to change",
    )
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="such as bench/results/<gpu>.json or bench/results/layers.jsonl",
    )


def _add_train(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "train",
        "train the networks of courses on fastconv's own passes, without a framework: on MNIST-1D the "
        "convolutional net of 2,050 parameters and a fully connected one, on handwritten digits a LeNet",
    )
    parser.add_argument("data", choices=DATA_SETS, help="what is learned")
    parser.add_argument(
        "--transfer",
        action="store_true",
        help="with digits: learn 0-4, freeze the convolutions, learn 5-9, fine-tune the last convolution",
    )
    parser.add_argument(
        "--epochs",
        type=_positive,
        default=argparse.SUPPRESS,
        help=f"of each network, not those of its recipe: {EPOCHS}",
    )
    parser.add_argument("--seed", type=_index, default=0, help="of the data, the weights and their order")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="where curves and plot go")


def _part(text: str) -> str:
    if text not in GPU_PARTS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(GPU_PARTS)}, got {text!r}")
    return text


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="where rows and report go")


def _add_threads(parser: argparse.ArgumentParser, default: int | str = argparse.SUPPRESS) -> None:
    parser.add_argument("--threads", type=_positive, default=default, help="every usable core, if not given")


def _add_workload(parser: argparse.ArgumentParser, networks: str, dtypes: Sequence[str]) -> None:
    parser.add_argument("--networks", type=_names, default=networks, metavar="NAME,...", help="or all")
    parser.add_argument("--batch", type=_positive, default=1, help="samples in the input")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of input, weight and output")
    parser.add_argument(
        "--order",
        choices=["NCHW", "NHWC"],
        default="NCHW",
        help="of the arrays that fastconv is given, in memory",
    )
    parser.add_argument(
        "--prepared", action="store_true", help="fastconv's weights prepared once, as fastconv.Conv2d does"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def _duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # nor is NaN
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
