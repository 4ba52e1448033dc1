"""`python -m bench.gpu.once` runs every algorithm with every tile once: what compute-sanitizer watches."""

from __future__ import annotations

from bench.gpu import device, work

DTYPES = ("float32", "float16")


def main() -> None:
    """Print a line per plan, so that a run which is stopped says how far it came."""
    import cupy

    # Every array in an allocation of its own: within CuPy's pool a read past the end would hit a neighbour.
    cupy.cuda.set_allocator(None)
    plans = list(work.sample_plans(DTYPES))
    for number, plan in enumerate(plans, start=1):
        x, weight, _ = device.make_arrays(plan.problem)
        out = device.make_output(plan.problem)
        work.run_plan(plan, x, weight, out)
        cupy.cuda.runtime.deviceSynchronize()
        print(f"plan {number} of {len(plans)}: {plan}", flush=True)


if __name__ == "__main__":
    main()
