"""Every kernel compiled without a GPU: no spills, and no more registers and shared memory than there are."""

from itertools import combinations
from pathlib import Path

import pytest

from bench.gpu.work import cover, kernels_of, settings, sources
from bench.kernels import instances, nvrtc, occupancy
from bench.kernels.nvrtc import CompileError, Resources
from bench.kernels.table import list_faults
from bench.session import CommandError
from fastconv.gpu import source
from tests.specimens import install, specimen

# For these, as many kernels are compiled as have every setting, for other architectures one of each stage.
# `python -m bench kernels` compiles more: bench/results/kernels.md keeps what it found.
THOROUGH = (75, 90)
DTYPES = ("float32", "float16")


@pytest.fixture(autouse=True)
def compilers():
    if not nvrtc.are_wheels_built():
        pytest.skip("NVIDIA publishes no NVRTC wheel for this system")
    return nvrtc.compilers()


@pytest.fixture
def specimens(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)


def compile_specimen(stage: str, sm: int = 90, **options) -> nvrtc.Compiled:
    kernel = specimen(stage, **options)
    return nvrtc.compiler_for(sm).compile(kernel.name, kernel.source, sm)


def assert_faultless(kernels, sm: int) -> None:
    assert kernels, "nothing to compile"
    faults = list_faults(instances.judge(kernels, sm))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", sources())
@pytest.mark.parametrize("sm", instances.ARCHITECTURES)
def test_kernels_compile_without_spills(sm, name):
    if sm in THOROUGH:
        kernels = [kernel for dtype in instances.DTYPES for kernel in kernels_of(name, dtype)]
        assert_faultless(cover(kernels, together=1), sm)
    else:
        kernels = [kernel for dtype in DTYPES for kernel in kernels_of(name, dtype)]
        assert_faultless({kernel.name.split("__")[0]: kernel for kernel in kernels}.values(), sm)


@pytest.mark.parametrize("together", [1, 2])
def test_a_cover_leaves_out_no_setting(together):
    def groups(kernels):
        return {group for kernel in kernels for group in combinations(settings(kernel), together)}

    kernels = kernels_of("im2col", "float32")
    some = cover(kernels, together)
    assert len(some) < len(kernels) / 2
    assert groups(some) == groups(kernels)


def test_every_cuda_source_is_compiled_here():
    assert {path.stem for path in Path(source.KERNEL_DIR).glob("*.cu")} == set(sources())


def test_every_architecture_has_a_compiler():
    assert all(sm in nvrtc.compiler_for(sm).architectures for sm in instances.ARCHITECTURES)


def test_an_architecture_that_no_compiler_knows_is_named():
    with pytest.raises(CommandError, match="no installed NVRTC knows sm_12"):
        nvrtc.compiler_for(12)


def test_what_a_kernel_takes_is_read_from_the_log_of_every_compiler(specimens, compilers):
    kernel = specimen("COLUMNS")
    for compiler in compilers:
        found = compiler.compile(kernel.name, kernel.source, 90).resources
        assert (found.shared, found.stack, found.spilled) == (32 * 32 * 4, 0, 0)
        assert 8 <= found.registers <= 64


def test_a_kernel_that_spills_is_found(specimens):
    found = compile_specimen("SPILL").resources
    assert found.spilled > 0
    assert f"{found.spilled} bytes are spilled" in occupancy.faults(found, 1024, 90)


def test_a_kernel_with_a_stack_frame_is_found(specimens):
    found = compile_specimen("STACK").resources
    assert (found.stack, found.spilled) == (256, 0)
    assert occupancy.faults(found, 1024, 90) == ["a stack frame of 256 bytes"]


def test_an_error_names_the_file_and_the_line(specimens):
    with pytest.raises(CompileError, match=r'specimen\.cuh\(4\): error: .*"const char \*"'):
        compile_specimen("BROKEN")


def test_a_kernel_that_does_not_compile_is_a_fault(specimens):
    (fault,) = list_faults(instances.judge([specimen("BROKEN")], 90))
    assert "specimen.cuh(4): error" in fault


@pytest.mark.parametrize("log", ["", "ptxas info    : Used 32 registers, used 1 barriers"])
def test_a_log_that_says_too_little_is_refused(log):
    with pytest.raises(ValueError, match="the log must name"):
        nvrtc.parse_log(log)


def test_spills_of_a_called_function_count():
    log = """\
ptxas info    : Compiling entry function 'k' for 'sm_90'
ptxas info    : Function properties for k
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes smem, 388 bytes cmem[0]
ptxas info    : Function properties for helper
ptxas         .     24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
"""
    assert nvrtc.parse_log(log) == Resources(registers=40, shared=16, stack=24, spilled=20)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "sm", "blocks"),
    [
        (32, 0, 1024, 80, 2),  # 64 warps
        (32, 0, 1024, 86, 1),  # 48 warps
        (33, 0, 1024, 80, 1),  # 40 registers each are handed out: 1024 * 40 * 2 > 65536
        (128, 0, 256, 90, 2),  # 65536 registers
        (129, 0, 256, 90, 1),
        (255, 0, 256, 75, 1),
        (16, 32 << 10, 128, 75, 2),  # 64 KB of shared memory
        (16, 32 << 10, 128, 86, 3),  # 100 KB, of which each block's first is the system's
        (16, 48 << 10, 64, 90, 4),
        (16, 0, 32, 75, 16),  # no more blocks than that
        (16, 0, 32, 89, 24),
        (96, 0, 96, 90, 5),  # three warps are counted as four: every partition must have room
    ],
)
def test_blocks_per_sm(registers, shared, threads, sm, blocks):
    resources = Resources(registers, shared, stack=0, spilled=0)
    assert occupancy.blocks_per_sm(resources, threads, sm) == blocks
    assert occupancy.occupancy(resources, threads, sm) == blocks * threads / 32 / occupancy.LIMITS[sm].warps


@pytest.mark.parametrize(
    ("resources", "threads", "fault"),
    [
        (Resources(255, 48 << 10, 0, 0), 256, None),
        (Resources(256, 0, 0, 0), 32, "256 registers"),
        (Resources(32, (48 << 10) + 1, 0, 0), 32, "49153 bytes of shared memory"),
        (Resources(72, 0, 0, 0), 1024, "not one block of 1024 threads fits"),
    ],
)
def test_limits(resources, threads, fault):
    assert occupancy.faults(resources, threads, 75) == ([] if fault is None else [fault])


def test_a_missing_wheel_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(nvrtc, "WHEELS", ("no-such-wheel",))
    with pytest.raises(CommandError, match="no-such-wheel is missing: pip install no-such-wheel"):
        nvrtc.compilers.__wrapped__()
