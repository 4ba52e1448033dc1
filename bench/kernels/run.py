"""Architectures enter, the page about all kernels is printed and kept, and an exit status leaves."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bench import rows, show
from bench.gpu.work import algorithms, cover, kernels_of
from bench.kernels import disassembly, instances, table
from bench.versions import read_commit
from fastconv.gpu.source import Kernel

PAGE = "kernels.md"
THOROUGH = 90  # the architecture of the targets
INSIDE = (75, 90)  # whose main loops are shown: without and with copies that go past the registers


def compile_kernels(
    architectures: Sequence[int], dtypes: Sequence[str], every: bool, folder: Path, arguments: Sequence[str]
) -> int:
    """Compile kernels for the architectures; 1 if one of them spills or exceeds a limit.

    every  all kernels, which takes an hour; else as many as have every pair of settings for THOROUGH, and as
           many as have every setting for the others
    """
    console = show.make_console()
    sets = [kernels_of(name, dtype) for name in algorithms() for dtype in dtypes]
    known = sum(map(len, sets))
    chosen = {sm: _choose(sets, sm, every) for sm in architectures}
    count = sum(map(len, chosen.values()))
    inside = INSIDE if disassembly.find_nvdisasm() else ()
    if not inside:
        console.print(f"main loops are left out: {disassembly.MISSING}", markup=False)
    console.print(
        f"{count} kernels, {', '.join(f'{len(chosen[sm])} for sm_{sm}' for sm in architectures)}: "
        "about a second each, on one core",
        markup=False,
    )
    command = shlex.join(["python", "-m", "bench", *arguments])
    commit, dirty = read_commit()
    verdicts: list[instances.Verdict] = []
    with show.make_progress(console) as progress:
        task = progress.add_task("", total=count)
        for sm in architectures:
            progress.update(task, description=f"sm_{sm}")
            for verdict in instances.judge(chosen[sm], sm, look_inside=sm in inside):
                verdicts.append(verdict)
                progress.advance(task)
            page = table.render(verdicts, known, command, commit + " with uncommitted changes" * dirty)
            rows.replace(
                folder / PAGE, page
            )  # after each, so that a run that is stopped has not been in vain
    console.print(page, markup=False, soft_wrap=True)
    console.print(f"page: {folder / PAGE}", markup=False, soft_wrap=True)
    return 1 if table.list_faults(verdicts) else 0


def _choose(sets: Sequence[list[Kernel]], sm: int, every: bool) -> list[Kernel]:
    together = 2 if sm == THOROUGH else 1
    return [kernel for found in sets for kernel in (found if every else cover(found, together))]
