"""Metadata of the package: what is installed, what it needs, and the extras."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version stands in fastconv/__init__.py, read as text: NumPy may be missing at build time."""
    source = (ROOT / "fastconv" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('fastconv/__init__.py must hold a line __version__ = "..."')
    return found.group(1)


BENCH = ["rich>=13", "matplotlib>=3.9", "pillow>=10", "safetensors>=0.4", "scikit-learn>=1.5"]
DASK = ["dask[array]>=2024.8", "distributed>=2024.8"]
# Where NVIDIA publishes its compiler.
NVRTC = "(sys_platform == 'linux' and platform_machine in 'x86_64 aarch64') or sys_platform == 'win32'"

setup(
    name="fastconv",
    version=read_version(),
    description="Neural-network convolution for NumPy and CuPy arrays, without a framework",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fastconv authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=[
        "convolution",
        "winograd",
        "im2col",
        "depthwise",
        "numpy",
        "numba",
        "cupy",
        "cuda",
        "deep learning",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # Every package by name: automatic discovery would also install the top-level bench, tests and kernels.
    packages=[
        "fastconv",
        *("fastconv.cpu", "fastconv.cpu.grad_input", "fastconv.cpu.grad_weight"),
        *("fastconv.gpu", "fastconv.gpu.grad_weight"),
        "fastconv.torch",
        "fastconv.kernels",
    ],
    # The CUDA sources lie beside the package in a checkout and inside it once installed.
    package_dir={"fastconv.kernels": "kernels"},
    package_data={"fastconv": ["py.typed", "data/*.json"], "fastconv.kernels": ["*.cu", "*.cuh"]},
    # Only what is listed above: without this, everything MANIFEST.in names would be installed too.
    include_package_data=False,
    zip_safe=False,  # Numba keeps its compiled functions in __pycache__ beside the sources
    install_requires=["numpy>=2.0", "numba>=0.61", "ml_dtypes>=0.5"],
    extras_require={
        # [ctk] brings the compiler of kernels and its headers.
        "cuda12": ["cupy-cuda12x[ctk]>=14"],
        "cuda13": ["cupy-cuda13x[ctk]>=14"],
        "torch": ["torch>=2.4"],  # the first one with torch.library.custom_op
        "dask": DASK,  # arrays larger than memory, on one machine or a cluster
        "bench": BENCH,
        # The tests cover bench/ too, and build a wheel (setuptools).
        "test": [
            *BENCH,
            *DASK,
            "pytest>=8",
            "hypothesis>=6.100",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.5",
            "setuptools>=77",
            f"nvidia-cuda-nvrtc>=13.0; {NVRTC}",
            f"nvidia-cuda-nvrtc-cu12>=12.9; {NVRTC}",  # the last one that knows sm_70
        ],
        # The one place where the versions of the developers' tools stand.
        "lint": ["ruff==0.17.6", "mypy==2.4.1"],
    },
)
