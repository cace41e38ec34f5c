"""The candidates in PyTorch: its own kernels, and cuDNN's; each step is replayed from a CUDA graph."""

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.gpu.candidates import EPSILON, MOMENTUM
from experiments.benchmarks.gpu.tasks import Task
from experiments.benchmarks.gpu.timing import Prepared

CUDNN = {"torch": False, "torch cudnn": True}
NAMES = tuple(CUDNN)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare(name: str, task: Task, count: int) -> Prepared:
    """As `candidates.prepare`; images lie in memory as JAX's do, so channels last is PyTorch's memory format."""
    torch.backends.cudnn.enabled = CUDNN[name]
    channels = task.shape[task.axis]
    scale = (1 + 0.25 * noise((channels,), 1)).requires_grad_()
    bias = (0.25 * noise((channels,), 2)).requires_grad_()
    mean, var = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    xs = [draw(task, 10 + i).requires_grad_() for i in range(count)]
    residuals = [draw(task, 30 + i).requires_grad_() if task.fused == "add + relu" else None for i in range(count)]
    cotangents = [draw(task, 50 + i) for i in range(count)]

    def layer(x: Any, residual: Any) -> Any:
        y = torch.nn.functional.batch_norm(x, mean, var, scale, bias, training=True, momentum=1 - MOMENTUM, eps=EPSILON)
        if residual is not None:
            y += residual
        return y if task.fused == "alone" else torch.relu_(y)

    def pull(y: Any, x: Any, residual: Any, cotangent: Any, keep: bool) -> Any:
        leaves = [leaf for leaf in (x, scale, bias, residual) if leaf is not None]
        return torch.autograd.grad(y, leaves, cotangent, retain_graph=keep)

    def forward() -> Any:
        with torch.no_grad():
            return [layer(x, r) for x, r in zip(xs, residuals, strict=True)]

    ys = [layer(x, r) for x, r in zip(xs, residuals, strict=True)]

    def backward() -> Any:
        given = zip(ys, xs, residuals, cotangents, strict=True)
        return [pull(y, x, r, c, keep=True) for y, x, r, c in given]

    def both() -> Any:
        given = zip(xs, residuals, cotangents, strict=True)
        return [(y := layer(x, r), *pull(y, x, r, c, keep=False)) for x, r, c in given]

    release()  # what drawing took: graphs have memory of their own
    y, dx, _, _, *dresidual = both()[0]
    x, dy, y, dx, *rest = (v.detach().float() for v in (xs[0], cotangents[0], y, dx, *dresidual))
    seen = [(y * y).mean(), (y * x).mean(), (dx * dx).mean(), (dx * dy).mean(), *((r * dy).mean() for r in rest)]
    steps = {"forward": forward, "backward": backward, "both": both}
    return {name: replayed(step) for name, step in steps.items()}, wait, [float(v) for v in seen]


def replayed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step from a CUDA graph, so that launching costs little; as it is where it cannot be captured."""
    if DEVICE == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):
        with torch.cuda.graph(graph):
            step()
        return graph.replay
    return step


def release() -> int:
    """Gives memory that nothing uses any more back to the device; how many bytes are held after that."""
    gc.collect()
    if DEVICE == "cpu":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def wait(_: Any) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def draw(task: Task, seed: int) -> Any:
    """`candidates.draw`, channels second."""
    x = (1 + 2 * noise(task.shape, seed)).to(getattr(torch, task.dtype))
    return x.movedim(-1, 1) if task.layout == "last" else x


def noise(shape: tuple[int, ...], seed: int) -> Any:
    """`candidates.noise`, in 64-bit integers since PyTorch has no unsigned ones."""
    count = 1
    for n in shape:
        count *= n
    low = 2**32 - 1
    bits = (torch.arange(count, device=DEVICE) + seed * 7919) * 2654435761 & low
    bits = (bits ^ (bits >> 15)) * 2246822519 & low
    return (((bits >> 8).float() / 2**24 - 0.5) * 12**0.5).reshape(shape)
