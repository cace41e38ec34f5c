"""A process that times one implementation's batch norms through JAX: it compiles ahead, in threads, in order.

Requests, as `experiments.benchmarks.gpu.worker` has them: {"do": "begin", "tasks": […]}, once; {"do": "finish",
"seconds": 40}, after which nothing compiles any more, so that a host is not busy with that while times are taken; then
{"do": "time", "task": […], "samples": 3, "seconds": 0.01} for those whose turn it is. PyTorch's, which compile nothing,
are measured here too.
"""

import concurrent.futures
import functools
import threading
from typing import Any, NamedTuple

from experiments.benchmarks.gpu import worker
from experiments.benchmarks.gpu.tasks import PASSES, Task
from experiments.benchmarks.gpu.timing import links, sample, spread

THREADS = 3
LOWERING = threading.Lock()  # Triton compiles while a program is lowered: not known to bear company


class Programs(NamedTuple):
    """What is compiled of a task: its passes, and what draws inputs, what linearises, and what compares.

    All that runs is compiled ahead: an operation that is not compiles when it is first called, for every new shape.
    """

    draw: Any
    vectors: Any
    linearized: Any
    passes: dict[str, Any]
    fingerprint: Any
    failed: dict[str, str]


def compiled(name: str, task: Task) -> Programs:
    """Everything that a task needs, ready to run; a pass that does not compile is among `failed`."""
    import jax
    import jax.numpy as jnp

    from experiments.benchmarks.gpu import candidates

    layer = functools.partial(candidates.flax_layer if name == "flax.linen" else candidates.jbn_layer, name, task)
    channels, count = task.shape[task.axis], links(task.size)
    state = jnp.zeros(channels), jnp.ones(channels)
    x = jax.ShapeDtypeStruct(task.shape, jnp.dtype(task.dtype))
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
    given = vector, vector, x, x if task.fused == "add + relu" else None

    of = candidates.functions(layer, state)

    def lower(what: str, function: Any, argument: Any) -> Any:
        function.__name__ = f"{what}_{task.fused.replace(' + ', '_')}_{'x'.join(map(str, task.shape))}"
        with LOWERING:
            return jax.jit(function).lower(argument)

    first = lower("linearized", of["linearized"], given)
    arguments = {
        "both": [(given, x)] * count,
        "forward": [given] * count,
        "backward": [(first.out_info[0], x)] * count,
    }
    passes, failed = {}, {}
    for what, argument in arguments.items():
        try:
            passes[what] = lower(what, candidates.chain(of[what]), argument).compile()
        except Exception as error:
            failed[what] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    draw = jax.jit(functools.partial(candidates.draw, task)).lower(jnp.int32(0)).compile()
    vectors = jax.jit(functools.partial(candidates.scale_and_bias, channels)).lower().compile()
    seen = [x] * (4 if given[3] is None else 5)  # x, ȳ, y, x̄ and the residual's cotangent
    fingerprint = jax.jit(candidates.fingerprint).lower(*seen).compile()
    return Programs(draw, vectors, first.compile(), passes, fingerprint, failed)


def run(name: str, task: Task, programs: Programs, samples: int, seconds: float) -> dict[str, Any]:
    """Times what was compiled, on inputs that `torch_candidates` draws alike."""
    import jax
    import numpy as np

    count = links(task.size)
    scale, bias = programs.vectors()

    def make(seed: int) -> Any:
        return programs.draw(np.int32(seed))

    inputs = [(scale, bias, make(10 + i), make(30 + i) if task.fused == "add + relu" else None) for i in range(count)]
    cotangents = [make(50 + i) for i in range(count)]
    arguments: dict[str, Any] = {"both": list(zip(inputs, cotangents, strict=True)), "forward": inputs}
    seen: list[float] = []
    if "both" in programs.passes:
        y, _, _, _, _, dx, *dresidual = programs.passes["both"](arguments["both"])[0]
        results = [v for v in (inputs[0][2], cotangents[0], y, dx, *dresidual) if v is not None]
        seen = [float(v) for v in programs.fingerprint(*results)]
    if "backward" in programs.passes:
        pullbacks = [programs.linearized(given)[0] for given in inputs]
        arguments["backward"] = list(zip(pullbacks, cotangents, strict=True))
    steps = {what: functools.partial(each, arguments[what]) for what, each in programs.passes.items()}
    return timed(steps, jax.block_until_ready, seen, count, samples, seconds) | {"failed": programs.failed}


def torch_run(name: str, task: Task, samples: int, seconds: float) -> dict[str, Any]:
    """Times PyTorch's."""
    count = links(task.size)
    steps, wait, seen = worker.candidates(name).prepare(name, task, count)
    return timed(steps, wait, seen, count, samples, seconds)


def timed(steps: Any, wait: Any, fingerprint: list[float], count: int, samples: int, seconds: float) -> dict[str, Any]:
    """The answer: microseconds of a layer, quartiles and median, and of handing it over."""
    passes = {}
    for what in PASSES:
        if what in steps:
            found = sample(steps[what], wait, samples, seconds)
            total, handed = (spread([v / count for v in found[key]]) for key in ("microseconds", "handing_over"))
            passes[what] = {"us": total[1], "us_low": total[0], "us_high": total[2], "host_us": handed[1]}
    return {"passes": passes, "fingerprint": fingerprint, "links": count, "failed": {}}


def begin(name: str, state: dict[str, Any], tasks: list[list[Any]]) -> dict[str, Any]:
    """Compiles tasks ahead."""
    state["tasks"] = {}
    if not name.startswith("torch"):
        pool = concurrent.futures.ThreadPoolExecutor(THREADS)
        for each in tasks:
            task = Task(*each)._replace(shape=tuple(each[1]))
            state["tasks"][task] = pool.submit(compiled, name, task)
    return {"begun": len(tasks)}


def finish(_name: str, state: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Waits for what compiles, so long at most; tasks that have not begun to are given up."""
    tasks = list(state["tasks"].values())
    concurrent.futures.wait(tasks, seconds)
    for future in tasks:
        future.cancel()
    return {"compiled": sum(future.done() and not future.cancelled() for future in tasks)}


def time(name: str, state: dict[str, Any], task: list[Any], samples: int, seconds: float) -> dict[str, Any]:
    """A task's answer, once it is compiled; an error in it is told, and the next task may do.

    PyTorch gives back what it held, as its allocator keeps memory that others need, and tells what it still holds.
    """
    wanted = Task(*task)._replace(shape=tuple(task[1]))
    by_torch = name.startswith("torch")
    try:
        if by_torch:
            answer = torch_run(name, wanted, samples, seconds)
        else:
            answer = run(name, wanted, state["tasks"].pop(wanted).result(), samples, seconds)
    except Exception as error:
        answer = {"passes": {}, "fingerprint": [], "failed": {"all": f"{type(error).__name__}: {str(error)[:300]}"}}
    # by now nothing is held by an error's frames
    return answer | {"held_bytes": worker.candidates(name).release() if by_torch else 0}


if __name__ == "__main__":
    worker.main({"begin": begin, "finish": finish, "time": time})
