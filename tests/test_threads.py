"""Tasks on several threads: each done once, from many callers, and in children of a process with threads."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastconv.cpu import threads
from fastconv.cpu.threads import run_tasks, thread_count
from fastconv.problem import ConvError
from tests.cases import CASES, Case
from tests.compare import integers
from tests.kernels import Way, make_layer, ways

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds after which something hangs; all of it takes a few

# Two tasks at least, and enough work that a second thread is woken.
LARGE = [
    Case("dense", "conv2d", (2, 16, 30, 31), (24, 16, 3, 3), {"padding": 1}),
    Case("pixels", "conv2d", (2, 48, 33, 34), (40, 48, 1, 1)),
    Case("channels", "conv2d", (2, 48, 30, 31), (48, 1, 5, 5), {"padding": 2, "groups": 48}),
]


class TestRunTasks:
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 100, 1001])
    @pytest.mark.parametrize("threads", [1, 2, 3, 5, 16])
    def test_every_task_is_done_once(self, count, threads):
        done = np.zeros(count, int)

        def work(first, last):
            assert first < last or count == 0
            done[first:last] += 1

        run_tasks(work, count, threads)
        assert (done == 1).all()

    def test_the_caller_works_too(self):
        names = set()
        run_tasks(lambda first, last: names.add(threading.current_thread().name), 100, 2)
        assert threading.current_thread().name in names

    def test_threads_work_at_once(self):
        """Three tasks that wait for each other end only if three threads have begun one."""
        barrier = threading.Barrier(3, timeout=PATIENCE)
        run_tasks(lambda first, last: barrier.wait(), 3, 3)

    def test_no_more_threads_than_asked_for(self):
        running, most, lock = 0, 0, threading.Lock()

        def work(first, last):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.001)
            with lock:
                running -= 1

        run_tasks(work, 40, 2)
        assert most <= 2

    @pytest.mark.parametrize("threads", [1, 4])
    @pytest.mark.parametrize("failing", [0, 17, 63])
    def test_an_exception_reaches_the_caller(self, failing, threads):
        def work(first, last):
            if first <= failing < last:
                raise MemoryError(f"task {failing}")

        with pytest.raises(MemoryError, match=f"^task {failing}$"):
            run_tasks(work, 64, threads)

    def test_the_other_tasks_are_done_before_it_does(self):
        """When the caller knows of the error, nobody writes to its arrays any more."""
        done = []

        def work(first, last):
            if first == 0:
                raise ValueError("the first")
            time.sleep(0.01)
            done.append((first, last))

        with pytest.raises(ValueError, match="the first"):
            run_tasks(work, 8, 4)
        known = list(done)
        time.sleep(0.05)
        assert done == known

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers")
    def test_an_interrupted_caller_waits_for_the_workers(self):
        """Ctrl-C reaches the caller when nobody writes to its arrays any more; what was not begun is left."""
        begun, ended = [], []

        def work(first, last):
            begun.append(first)
            time.sleep(0.2)
            ended.append(first)

        def interrupt(*_):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            with pytest.raises(KeyboardInterrupt):
                run_tasks(work, 32, 3)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert len(begun) < 8
        assert len(ended) >= len(begun) - 1, "only the caller's own task may have been cut short"

    def test_the_pool_outlives_exceptions(self):
        for _ in range(50):
            with pytest.raises(ZeroDivisionError):
                run_tasks(lambda first, last: 1 // 0, 16, 4)
        self.test_every_task_is_done_once(100, 4)

    def test_tasks_may_have_tasks(self):
        """A worker that waits for tasks of its own does some of them, so nothing waits for ever."""
        done = np.zeros((6, 40), int)

        def outer(first, last):
            for i in range(first, last):
                run_tasks(lambda a, b, i=i: np.add.at(done[i], slice(a, b), 1), 40, 4)

        finishes(lambda: run_tasks(outer, 6, 3))
        assert (done == 1).all()

    def test_many_callers(self):
        def caller(index):
            for count in range(1, 200):
                self.test_every_task_is_done_once(count, 3)
            return index

        assert at_once(caller, 8) == list(range(8))


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

        def record(work, count, n):
            asked.append((count, n))
            work(0, count)

        monkeypatch.setattr(threads, "run_tasks", record)
        for way in ways():
            for problem in way.problems(LARGE):
                make_layer(rng, problem, integers).check(way.plan(problem))
        assert min(count for count, _ in asked) >= 2
        assert {n for _, n in asked} == {3}

    def test_an_exception_in_a_kernel_reaches_the_caller(self, rng, monkeypatch):
        """Whatever goes wrong in a task, on whichever thread."""
        way = Way("direct", str(ways()[0].tile))
        problem = LARGE[0].problem()
        layer, plan = make_layer(rng, problem, integers), way.plan(problem)
        run = threads.run_tasks
        monkeypatch.setattr(threads, "run_tasks", lambda work, count, n: run(fail, count, n))

        def fail(first, last):
            raise MemoryError("no workspace")

        with pytest.raises(MemoryError, match="no workspace"):
            layer.run(plan)


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
from fastconv.cpu import threads
check()
with threads._pool.lock:  # as if a thread of the parent was about to start one
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
    "interrupted": """
from fastconv.cpu.threads import run_tasks
signal.signal(signal.SIGINT, signal.default_int_handler)
both = threading.Barrier(2)
done = []
def work(first, last):
    both.wait(30)
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.1)  # by now the caller waits for this task
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        done.append(first)
try:
    run_tasks(work, 2, 2)
except KeyboardInterrupt:
    assert done, "a worker would still write to the caller's arrays"
else:
    sys.exit("no KeyboardInterrupt reached the caller")
check()
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
