"""What the machine code of a main loop is made of, and how the banks of shared memory take its addresses."""

import numpy as np
import pytest

from bench.__main__ import main
from bench.gpu.work import kernels_of
from bench.kernels import banks, disassembly, instances, nvrtc, ptx, run
from tests.specimens import install, kernels_of_specimens, specimen

# A loop inside a loop, each with multiply-adds, and one without: the shape of what nvdisasm prints.
LISTING = """\
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_2:
        /*0010*/                   FFMA.FTZ R1, R2, R3, R1 ;
.L_x_0:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @!P2 LDGSTS.E.BYPASS.128 [R7], [R2.64] ;
        /*0040*/                   LDG.E.U16.CONSTANT R9, [R2.64] ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   LDS.U.128 R8, [R6+0x10] ;
        /*0070*/                   LDS R12, [R6] ;
        /*0080*/                   STS.64 [R6], R8 ;
        /*0090*/                   FFMA.FTZ R1, R2.reuse, R3, R1 ;
        /*00a0*/                   FFMA R5, R2, R3, R5 ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/               @P0 BRA `(.L_x_0) ;
        /*00d0*/               @P1 BRA `(.L_x_2) ;
.L_x_1:
        /*00e0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00f0*/               @P1 BRA `(.L_x_1) ;
        /*0100*/                   EXIT ;
"""


@pytest.fixture
def nvrtc_wheels():
    if not nvrtc.are_wheels_built():
        pytest.skip("NVIDIA publishes no NVRTC wheel for this system")


@pytest.fixture
def specimens(nvrtc_wheels, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)


@pytest.fixture
def nvdisasm():
    if disassembly.find_nvdisasm() is None:
        pytest.skip(disassembly.MISSING)


def test_the_innermost_loop_that_multiplies_is_counted():
    loop = disassembly.main_loop(LISTING)
    assert loop == disassembly.Loop(
        instructions=11,
        multiply_adds=2,
        global_loads={128: 2, 16: 1},
        shared_loads={128: 1, 32: 1},  # without the one that never runs
        shared_stores={64: 1},
        barriers=1,
    )
    assert loop.share == 2 / 11


def test_code_without_a_loop_that_multiplies_has_no_main_loop():
    without = "".join(line for line in LISTING.splitlines(keepends=True) if "FFMA" not in line)
    assert disassembly.main_loop(without) is None
    straight = "".join(line for line in LISTING.splitlines(keepends=True) if "BRA" not in line)
    assert disassembly.main_loop(straight) is None


@pytest.mark.parametrize("sm", [sm for sm in instances.ARCHITECTURES if sm != 70])
def test_the_main_loop_of_compiled_code_is_found(specimens, nvdisasm, sm):
    (verdict,) = instances.judge([specimen("COLUMNS")], sm, look_inside=True)
    loop = verdict.loop
    assert (loop.multiply_adds, loop.barriers, loop.shared_stores) == (1, 1, {})
    assert (loop.global_loads, loop.shared_loads) == ({32: 1}, {32: 1})
    assert loop.share < 0.5


# What main loops in float32 shall reach: the share of multiply-adds among all instructions, loading four
# floats at a time. Without GATHERED, the loop of an im2col finds its windows as well; a fused Winograd
# transforms its inputs, which come one by one.
AIMS = [
    ("im2col", {"BLOCK_M": 128, "BLOCK_N": 128, "GATHERED": 1, "PARTS_INSIDE": 0}, 0.85),
    ("im2col", {"BLOCK_M": 128, "BLOCK_N": 128, "GATHERED": 0, "LOADS": "VECTOR", "PARTS_INSIDE": 0}, 0.82),
    ("pointwise", {"BLOCK_M": 128, "BLOCK_N": 128, "VECTOR_PIXELS": 1, "PARTS_INSIDE": 0}, 0.85),
    ("pointwise", {"BLOCK_M": 128, "BLOCK_N": 128, "LOADS": "VECTOR", "PARTS_INSIDE": 0}, 0.85),
    ("direct", {"BLOCK_M": 64, "FILTER_S": 3, "STRIDE_W": 1}, 0.85),
    ("direct", {"BLOCK_M": 64, "FILTER_S": 7, "STRIDE_W": 2}, 0.9),
    ("winograd", {"BLOCK_M": 128, "BLOCK_N": 128}, 0.9),
    ("winograd", {"BLOCK_TILES": 32}, 0.7),
    ("depthwise", {"BLOCK_Q": 128, "SLIDING": 1}, 0.85),
    ("depthwise", {"BLOCK_C": 32, "SLIDING": 1}, 0.85),
]


@pytest.mark.parametrize("sm", [75, 90])
@pytest.mark.parametrize(("algorithm", "settings", "share"), AIMS)
def test_main_loops_multiply_and_add(nvrtc_wheels, nvdisasm, algorithm, settings, share, sm):
    wanted = {"INDEX": "int", "ACTIVATION": "none", **settings}.items()
    kernels = (
        (kernel, {"ACTIVATION": "none", **dict(kernel.defines)})
        for kernel in kernels_of(algorithm, "float32")
    )
    kernel = next(kernel for kernel, defines in kernels if wanted <= defines.items())
    (verdict,) = instances.judge([kernel], sm, look_inside=True)
    assert verdict.loop.share >= share
    assert set(verdict.loop.global_loads) <= ({128, 32} if "BLOCK_TILES" in settings else {128})
    assert verdict.conflicts == 1


LANES = np.arange(32)


@pytest.mark.parametrize(
    ("words", "size", "times"),
    [
        (LANES, 4, 1),  # neighbours
        (LANES * 0, 4, 1),  # one word for all
        (LANES * 33, 4, 1),  # a column of rows that are padded by one
        (LANES * 32, 4, 32),  # a column of rows that are not
        (LANES * 2, 4, 2),
        (LANES // 2 * 32, 4, 16),  # pairs share their words
        (LANES * 2, 8, 1),  # half of a warp at a time
        (LANES * 4, 8, 2),
        (LANES * 4, 16, 1),  # a quarter of a warp at a time
        (LANES % 8 * 4 + LANES // 8 * 32, 16, 1),
        (LANES // 8 * 4, 16, 1),
        (LANES * 8, 16, 2),
        (LANES * 32, 16, 8),
        (LANES / 2, 2, 1),  # two threads share a word
        (np.concatenate([LANES, LANES * 4]), 4, 4),  # the second warp is the slow one
    ],
)
def test_bank_conflicts(words, size, times):
    assert banks.conflicts((words * 4).astype(int), size) == times


@pytest.mark.parametrize("sm", [75, 90])
@pytest.mark.parametrize(("row", "times"), [(32, 32), (33, 1)])
def test_addresses_are_followed_through_compiled_code(specimens, row, times, sm):
    kernel = specimen("COLUMNS", row=row)
    compiled = nvrtc.compiler_for(sm).compile(kernel.name, kernel.source, sm)
    store, load = ptx.shared_accesses(compiled.ptx, kernel.threads)
    assert (store.is_load, store.size, load.is_load, load.size) == (False, 4, True, 4)
    threads = np.arange(1024)
    assert np.array_equal(store.addresses, (threads // 32 * row + threads % 32) * 4)
    assert np.array_equal(load.addresses, (threads % 32 * row + threads // 32) * 4)
    assert banks.conflicts(load.addresses, load.size) == times


def follow(*lines: str) -> np.ndarray:
    """The addresses of the last of some lines of assembly, for four threads."""
    text = "".join(f"\t{line};\n" for line in ("mov.u32 %r1, %tid.x", *lines))
    return ptx.shared_accesses(text, 4)[-1].addresses


@pytest.mark.parametrize(
    ("lines", "addresses"),
    [
        (("ld.shared.f32 %f1, [%r1+8]",), [8, 9, 10, 11]),
        (("mul.wide.s32 %rd1, %r1, -4", "ld.shared.f32 %f1, [%rd1]"), [0, -4, -8, -12]),
        (("sub.s32 %r2, 1, %r1", "shr.s32 %r3, %r2, 1", "st.shared.f32 [%r3], %f1"), [0, 0, -1, -1]),
        (("sub.s32 %r2, 1, %r1", "div.s32 %r3, %r2, 2", "st.shared.f32 [%r3], %f1"), [0, 0, 0, -1]),
        (("setp.lt.u32 %p1, %r1, 2", "selp.b32 %r2, 9, %r1, %p1", "ld.shared.f32 %f1, [%r2]"), [9, 9, 2, 3]),
        (("shl.b32 %r2, %r1, 4", "cp.async.cg.shared.global [%r2], [%rd9], 16"), [0, 16, 32, 48]),
        # What a loop changes for all threads alike; parameters count as 1.
        (("mov.u32 %r2, %r1", "ld.shared.f32 %f1, [%r2]", "add.s32 %r2, %r2, 128"), [0, 1, 2, 3]),
        (
            ("ld.param.v2.u32 {%r2, %r3}, [k]", "add.s32 %r4, %r1, %r3", "ld.shared.f32 %f1, [%r4]"),
            [1, 2, 3, 4],
        ),
    ],
)  # fmt: skip
def test_instructions_that_compute_addresses(lines, addresses):
    assert follow(*lines).tolist() == addresses


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("ld.global.u32 %r2, [%rd1]", "ld.shared.f32 %f1, [%r2]"), "depends on ld.global.u32"),
        (("mov.u32 %r2, 0", "ld.shared.f32 %f1, [%r2]", "mov.u32 %r2, %r1"), "by the path they took"),
        (("ld.shared.f32 %f1, [%r9]",), "what %r9 holds is not known"),
    ],
)
def test_addresses_that_cannot_be_known_are_refused(lines, message):
    with pytest.raises(ValueError, match=message):
        follow(*lines)


def test_the_page_of_all_kernels(specimens, nvdisasm, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "algorithms", lambda: ["specimen"])
    monkeypatch.setattr(run, "kernels_of", lambda name, dtype: kernels_of_specimens(dtype))
    assert main(["kernels", "--architectures", "80,90", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert "Of 8 kernels that the algorithms list: 8 for sm_80, 8 for sm_90." in page
    assert ". sm_80 by NVRTC 13." in page.replace("\n", " ")
    assert "No spill, no stack frame, nothing over a limit." in page
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| fastconv_")]
    assert [row[1:3] for row in rows[:8]] == 4 * [["1024", "4096"], ["1024", "4224"]]
    assert [row[-1] for row in rows[8:]] == 4 * ["32 |", "1 |"]  # the conflicts of the tiles
    shown = capsys.readouterr().out
    assert shown.startswith("16 kernels, 8 for sm_80, 8 for sm_90: about a second each")
    assert page in shown


def test_a_run_that_is_stopped_keeps_the_architectures_it_has_done(specimens, monkeypatch, tmp_path):
    def stop_at_90(kernels, sm, look_inside):
        if sm == 90:
            raise KeyboardInterrupt
        return judge(kernels, sm, look_inside)

    judge = instances.judge
    monkeypatch.setattr(instances, "judge", stop_at_90)
    monkeypatch.setattr(run, "algorithms", lambda: ["specimen"])
    monkeypatch.setattr(run, "kernels_of", lambda name, dtype: kernels_of_specimens(dtype))
    with pytest.raises(KeyboardInterrupt):
        main(["kernels", "--architectures", "80,90", "--output", str(tmp_path)])
    page = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert "| sm_80 |" in page
    assert "for sm_80. Unless" in page


def test_kernels_of_one_dtype(specimens, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "algorithms", lambda: ["specimen"])
    monkeypatch.setattr(run, "kernels_of", lambda name, dtype: kernels_of_specimens(dtype))
    command = ["kernels", "--architectures", "80", "--dtypes", "float32", "--output", str(tmp_path)]
    assert main(command) == 0
    page = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert "Of 2 kernels that the algorithms list: 2 for sm_80." in page


def test_a_kernel_that_spills_ends_the_run_with_status_1(specimens, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "algorithms", lambda: ["specimen"])
    monkeypatch.setattr(run, "kernels_of", lambda name, dtype: [specimen("SPILL")])
    assert main(["kernels", "--architectures", "80", "--output", str(tmp_path)]) == 1
    assert "bytes are spilled" in (tmp_path / "kernels.md").read_text(encoding="utf-8")


def test_an_unknown_architecture_lists_the_known_ones(capsys):
    assert main(["kernels", "--architectures", "90,91"]) == 2
    assert "--architectures must be of 70, 75, 80, 86, 89, 90, 100, 120, got 91" in capsys.readouterr().err
    assert main(["kernels", "--dtypes", "half"]) == 2
    assert "--dtypes must be of float32, float64, float16, bfloat16, got half" in capsys.readouterr().err
