"""Tasks on several threads: each done once, from many callers, and in children of a process with threads."""

import ctypes
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numba.core import types

from fastconv.cpu import team, threads
from fastconv.cpu.compiling import part
from fastconv.cpu.simd import Block, Kernel
from fastconv.cpu.team import load, store
from fastconv.cpu.threads import thread_count
from fastconv.problem import ConvError
from tests.cases import CASES, Case
from tests.compare import integers
from tests.kernels import make_layer, ways

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds after which something hangs; all of it takes a few

# Two tasks at least, and enough work that a second thread is woken.
LARGE = [
    Case("dense", "conv2d", (2, 16, 30, 31), (24, 16, 3, 3), {"padding": 1}),
    Case("pixels", "conv2d", (2, 48, 33, 34), (40, 48, 1, 1)),
    Case("channels", "conv2d", (2, 48, 30, 31), (48, 1, 5, 5), {"padding": 2, "groups": 48}),
]


BLOCK = Block("float32", rows=1, vectors=1, lanes=4)


@Kernel
def count_calls(block, first, last, calls, flag, rounds):
    """Count how often each task is done, after some rounds of reading a flag."""
    for task in range(first, last):
        for _ in range(rounds):
            load(flag)
        calls[task] += 1


@Kernel
def meet(block, first, last, flags, count, patience):
    """Raise the task's flag (8 bytes from address `flags` on) until `count` are up; then leave it."""
    for task in range(first, last):
        store(flags + 8 * task, 1)
        rounds = 0
        while rounds < patience and count_up(flags, count) < count:
            rounds += 1
        if rounds == patience:
            store(flags + 8 * task, 0)


@Kernel
def sign(block, first, last, names, flag, rounds):
    """Note which thread does each task, in some rounds of reading a flag."""
    for task in range(first, last):
        for _ in range(rounds):
            names[task] = this_thread() + load(flag)


@Kernel
def linger(block, first, last, flags, caller, rounds, done):
    """Let two tasks meet; the one that is not the caller's takes some more rounds before it is done."""
    for task in range(first, last):
        store(flags + 8 * task, 1)
        patience = 2**33
        while patience > 0 and count_up(flags, 2) < 2:
            patience -= 1
        if this_thread() != caller:
            for _ in range(rounds):
                load(flags)
        done[task] = 1


@Kernel
def allocate_too_much(block, first, last, failing):
    """In one of the tasks."""
    for task in range(first, last):
        np.empty(2**60 if task == failing else 1, np.int64)[0] = task


this_thread = types.ExternalFunction("PyThread_get_thread_ident", types.int64())


@part
def count_up(flags, count):
    up = 0
    for other in range(count):
        up += load(flags + 8 * other)
    return up


def do_all(count, workers, rounds=0):
    """Let so many workers do so many tasks; each must have been done once."""
    calls, flag = np.zeros(count, np.int64), np.zeros(1, np.int64)
    count_calls(BLOCK, count, workers, calls, flag.ctypes.data, rounds)
    assert (calls == 1).all()


def meeting(count, workers, patience=2**33):
    """Whether `count` tasks were all under way at one time."""
    flags = np.zeros(count, np.int64)
    meet(BLOCK, count, workers, flags.ctypes.data, count, patience)
    return bool(flags.all())


def signed(count, workers):
    """The threads that did so many tasks, a third of a millisecond each."""
    names, flag = np.zeros(count, np.int64), np.zeros(1, np.int64)
    sign(BLOCK, count, workers, names, flag.ctypes.data, 1_000_000)
    return names


class TestTeam:
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 100, 1001])
    @pytest.mark.parametrize("workers", [1, 2, 3, 5, 16])
    def test_every_task_is_done_once(self, count, workers):
        for _ in range(20):
            do_all(count, workers)

    @pytest.mark.parametrize("workers", [2, 3])
    def test_threads_that_want_the_same_task(self, workers):
        """Tasks so short that claims often meet."""
        for rounds in range(3000):
            do_all(4 * workers, workers, rounds % 300)

    def test_tasks_of_one_thread_do_not_meet(self):
        """Otherwise the next test would prove nothing."""
        assert not meeting(2, 1, patience=1000)

    @pytest.mark.parametrize("workers", [2, 3, 5])
    def test_threads_work_at_once(self, workers):
        """The caller is one of them."""
        assert finishes(lambda: meeting(workers, workers))

    def test_a_thread_that_sleeps_is_woken(self, monkeypatch):
        monkeypatch.setattr(team, "_team", team._Team())
        for _ in range(3):
            assert finishes(lambda: meeting(2, 2))
            deadline = time.monotonic() + PATIENCE
            while not is_asleep(0):
                assert time.monotonic() < deadline, "the worker does not go to sleep"
                time.sleep(0.001)

    def test_the_caller_waits_for_the_workers(self):
        flags, done = np.zeros(2, np.int64), np.zeros(2, np.int64)
        linger(BLOCK, 2, 2, flags.ctypes.data, threading.get_ident(), 1_000_000, done)
        assert done.all(), "a worker still writes to the caller's arrays"

    def test_no_more_threads_than_asked_for(self):
        for _ in range(10):
            assert meeting(3, 3)  # two workers watch
            assert 1 <= len(set(signed(40, 2))) <= 2

    def test_the_caller_works_alone_where_no_thread_can_be_started(self, monkeypatch):
        """And does not try for ever: three helpers are asked for."""
        refused = []

        def refuse(thread):
            refused.append(thread)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(team, "_team", team._Team())
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for _ in range(10):
            do_all(100, 4)
        assert len(refused) == 3

    @pytest.mark.parametrize("workers", [1, 3])
    def test_a_kernel_that_fails(self, workers):
        """The caller learns that there was an exception; the next call is as any other."""
        for failing in (0, 7, 15):
            with pytest.raises(MemoryError, match=r"^a kernel could not allocate its workspace$"):
                allocate_too_much(BLOCK, 16, workers, failing)
            do_all(100, workers)

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers")
    def test_an_interrupted_caller_waits_for_the_workers(self):
        """Ctrl-C reaches the caller when all is done: nobody writes to its arrays any more."""

        def interrupt(*_):
            raise KeyboardInterrupt

        names, flag = np.zeros(40, np.int64), np.zeros(1, np.int64)
        signed(1, 1)  # has been compiled
        assert meeting(3, 3)  # the workers have begun
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            with pytest.raises(KeyboardInterrupt):
                sign(BLOCK, 40, 3, names, flag.ctypes.data, 10_000_000)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert names.all(), "interrupted before the kernel began?"

    def test_more_callers_than_jobs(self):
        """Each has all its tasks done, those too that find no memory for a job."""

        def caller(index):
            for count in range(1, 200):
                do_all(count, 3)
            return index

        assert at_once(caller, team.JOBS + 4) == list(range(team.JOBS + 4))

    def test_one_worker_finds_every_job(self):
        """Two tasks a caller wait for each other: a job that the worker did not see would not end."""
        assert at_once(lambda _: meeting(2, 2), team.JOBS) == [True] * team.JOBS


def is_asleep(worker):
    address = team._team.jobs + (team.JOBS + worker) * team.ROW + team.ASLEEP
    return ctypes.c_int64.from_address(address).value == 1


def finishes(function):
    """The result of a function that must not hang."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(PATIENCE)


def at_once(caller, count):
    """The results of caller(0), caller(1) ... each on a thread, none before all have begun."""
    barrier = threading.Barrier(count, timeout=PATIENCE)

    def begin(index):
        barrier.wait()
        return caller(index)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(begin, i) for i in range(count)]]


class TestThreadCount:
    @pytest.mark.parametrize(("text", "count"), [("1", 1), ("2", 2), ("64", 64)])
    def test_environment(self, text, count, monkeypatch):
        monkeypatch.setenv("FASTCONV_THREADS", text)
        assert thread_count() == count

    @pytest.mark.parametrize("text", [None, ""])
    def test_the_cores_this_process_may_use(self, text, monkeypatch):
        if text is None:
            monkeypatch.delenv("FASTCONV_THREADS", raising=False)
        else:
            monkeypatch.setenv("FASTCONV_THREADS", text)
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
        assert thread_count() == 3
        monkeypatch.delattr(threads.os, "sched_getaffinity")
        monkeypatch.setattr(threads.os, "cpu_count", lambda: 7)
        assert thread_count() == 7
        monkeypatch.setattr(threads.os, "cpu_count", lambda: None)
        assert thread_count() == 1

    @pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", "²", " "])
    def test_nonsense(self, text, monkeypatch):
        monkeypatch.setenv("FASTCONV_THREADS", text)
        with pytest.raises(ConvError) as caught:
            thread_count()
        assert str(caught.value) == f"FASTCONV_THREADS must be a whole number of at least 1, got {text!r}"


class TestConvolutions:
    def test_eight_threads_with_problems_of_their_own(self, rng, monkeypatch):
        """All algorithms and tiles, small and large problems: each caller has all its results right."""
        monkeypatch.setenv("FASTCONV_THREADS", "3")
        work = []
        for way in ways():
            for problem in [*way.problems(LARGE), *way.problems(CASES)[3:30:9]]:
                layer, plan = make_layer(rng, problem, integers), way.plan(problem)
                work.append((layer, plan, layer.run(plan)))
                layer.judge(plan, work[-1][2])

        def caller(index):
            for turn in range(6):
                for layer, plan, expected in work[index::8]:
                    assert layer.run(plan).tobytes() == expected.tobytes(), f"{plan}, turn {turn}"
            return index

        assert at_once(caller, 8) == list(range(8))

    def test_eight_threads_with_one_problem(self, rng, monkeypatch):
        monkeypatch.setenv("FASTCONV_THREADS", "3")
        for name in ("direct", "winograd", "pointwise", "depthwise", "im2col"):
            way = next(way for way in ways() if way.algorithm == name)
            problem = way.problems(LARGE)[0]
            layer, plan = make_layer(rng, problem, integers), way.plan(problem)
            weight, expected = layer.prepare(plan), layer.run(plan).tobytes()
            results = at_once(lambda _, a=(layer, plan, weight): [a[0].run(a[1], a[2]) for _ in range(20)], 8)
            assert all(y.tobytes() == expected for several in results for y in several)

    def test_large_problems_wake_threads(self, rng, monkeypatch):
        """Otherwise the tests of this file would try nothing."""
        monkeypatch.setenv("FASTCONV_THREADS", "3")
        asked = []

        def record(helpers):
            asked.append(helpers)
            return 0, 0

        monkeypatch.setattr(team, "gather", record)
        for way in ways():
            for problem in way.problems(LARGE):
                make_layer(rng, problem, integers).check(way.plan(problem))
        assert min(asked) >= 1
        assert max(asked) == 2


PREAMBLE = """
import os, signal, sys, threading, time
import multiprocessing
import numpy as np
import fastconv
from fastconv import reference

os.environ["FASTCONV_THREADS"] = "3"
rng = np.random.default_rng(0)
layers = []
for algo, shape, groups in (
    ("direct", (24, 16, 3, 3), 1), ("im2col", (24, 16, 3, 3), 1), ("winograd", (24, 16, 3, 3), 1),
    ("pointwise", (40, 48, 1, 1), 1), ("depthwise", (48, 1, 5, 5), 48),
):
    x = rng.integers(-4, 5, (2, shape[1] * groups, 30, 31)).astype("float32")
    w = rng.integers(-4, 5, shape).astype("float32")
    options = {"groups": groups}
    layers.append((algo, x, w, options, reference.conv2d(x, w, **options)))

def check():
    for algo, x, w, options, expected in layers:
        y = fastconv.conv2d(x, w, algo=algo, precision="highest", **options)
        assert np.array_equal(y, expected), algo

def wait(pid):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    sys.exit("the child hangs")

def child(function):
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid
"""

SCRIPTS = {
    "child_after_parent": """
check()
wait(child(check))
check()
""",
    "child_before_parent": """
wait(child(check))
check()
wait(child(check))
""",
    "child_of_a_child": """
check()
wait(child(lambda: (check(), wait(child(check)), check())))
""",
    "several_children_at_once": """
check()
children = [child(check) for _ in range(4)]
check()
for pid in children:
    wait(pid)
""",
    "parent_busy": """
check()
stop = threading.Event()
errors = []
def busy():
    while not stop.is_set():
        try:
            check()
        except BaseException as error:
            errors.append(error)
            return
callers = [threading.Thread(target=busy) for _ in range(3)]
for caller in callers:
    caller.start()
for _ in range(15):
    wait(child(check))
stop.set()
for caller in callers:
    caller.join()
assert not errors, errors
check()
""",
    "multiprocessing": """
check()
context = multiprocessing.get_context("fork")
processes = [context.Process(target=check) for _ in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join(60)
    assert process.exitcode == 0, process.exitcode
with context.Pool(2) as pool:
    pool.apply_async(check).get(60)
    pool.apply_async(check).get(60)
check()
""",
    "first_calls_at_once": """
errors = []
barrier = threading.Barrier(8)
def caller():
    barrier.wait()
    try:
        for _ in range(5):
            check()
    except BaseException as error:
        errors.append(error)
callers = [threading.Thread(target=caller) for _ in range(8)]
for thread in callers:
    thread.start()
for thread in callers:
    thread.join(90)
    assert not thread.is_alive(), "a thread hangs"
assert not errors, errors
""",
    "parent_starts_threads": """
from fastconv.cpu import team
check()
with team._team.starting:  # as if a thread of the parent was about to start one
    pid = child(check)
wait(pid)
""",
    "parent_compiles": """
import tempfile
with tempfile.TemporaryDirectory() as empty:
    os.environ["NUMBA_CACHE_DIR"] = empty
    import fastconv.plan
    from numba.core.compiler_lock import global_compiler_lock
    algo, x, w, options, expected = layers[1]
    first = lambda: fastconv.conv2d(x, w, algo=algo, **options)
    compiling = threading.Thread(target=first)
    compiling.start()
    while not global_compiler_lock._is_owned():  # by any thread
        time.sleep(0.001)
    time.sleep(0.3)
    assert compiling.is_alive(), "it has compiled already: this tries nothing"
    pid = child(first)
    wait(pid)
    compiling.join()
""",
    "main_thread_ends_first": """
started = threading.Event()
def late():
    check()
    started.set()
    for _ in range(20):
        check()
    print("late", flush=True)
threading.Thread(target=late).start()
started.wait(60)
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_processes(name):
    """In a process of its own, which pytest's threads cannot disturb and which may hang without harm."""
    if "child" in SCRIPTS[name] or name == "multiprocessing":
        pytest.importorskip("pwd", reason="this system cannot fork")
    program = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + SCRIPTS[name]]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    assert done.stdout == ("late\n" if name == "main_thread_ends_first" else "")
