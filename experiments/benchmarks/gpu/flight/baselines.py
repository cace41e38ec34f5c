"""PyTorch's batch norm, its own kernels and cuDNN's, on the operands that a shape's kernels are measured on."""

from collections.abc import Callable
from typing import Any

from experiments.benchmarks.gpu.flight.driver import Driver
from experiments.benchmarks.gpu.flight.memory import TorchMemory
from experiments.benchmarks.gpu.flight.operands import EPSILON, Operands
from experiments.framework.lines import Lines

CUDNN = {"torch": False, "torch cudnn": True}


def steps(memory: TorchMemory, operands: Operands, shape: tuple[int, ...]) -> dict[str, Callable[[int], Any]]:
    """Name of a pass → what queues it on set i: training's forward, and forward + backward."""
    torch, functional = memory.torch, memory.torch.nn.functional
    scale, bias = (operands.operand(name, "alone", 0).clone().requires_grad_() for name in ("scale", "bias"))
    running = torch.zeros_like(scale.detach()), torch.ones_like(scale.detach())

    def image(name: str, i: int) -> Any:
        """As PyTorch sees it: channels second, in the memory format that has them last."""
        array = operands.operand(name, "alone", i)
        return array.view(shape).movedim(-1, 1) if len(shape) > 2 else array

    inputs = [(image("x", i).detach().requires_grad_(), image("dy", i)) for i in range(operands.sets)]

    def normalize(x: Any) -> Any:
        return functional.batch_norm(x, *running, scale, bias, training=True, momentum=0.1, eps=EPSILON)

    def forward(i: int) -> Any:
        with torch.no_grad():
            return normalize(inputs[i % len(inputs)][0])

    def both(i: int) -> Any:
        x, dy = inputs[i % len(inputs)]
        return torch.autograd.grad(normalize(x), (x, scale, bias), dy)

    return {"forward": forward, "both": both}


class Baselines:
    """Lines of kind "baseline", once for each shape and dtype."""

    def __init__(self, driver: Driver, memory: TorchMemory, lines: Lines):
        self.driver, self.memory, self.lines = driver, memory, lines
        self.done: set[Any] = set()

    def measured(self, operands: Operands, shape: tuple[int, ...], dtype: str) -> None:
        for name, enabled in CUDNN.items():
            with self.memory.torch.backends.cudnn.flags(enabled=enabled):
                for each, step in steps(self.memory, operands, shape).items():
                    told = {"baseline": name, "pass": each, "shape": list(shape), "dtype": dtype}
                    try:
                        for _ in range(2):  # memory and code are there then
                            step(0)
                        self.driver.wait()
                        us = self.driver.time(step, max(4, operands.sets), 3)
                        self.lines("baseline", **told, us=us, bytes=(3 if each == "forward" else 8) * operands.size)
                    except RuntimeError as error:
                        self.lines("error", **told, error=f"{type(error).__name__}: {str(error)[:300]}")

    def once(self, run: dict[str, Any], operands: Operands) -> None:
        """Measures the run's shape and dtype, if it is of images and has not been measured."""
        key = tuple(run["shape"]), run["dtype"]
        if key not in self.done and len(key[0]) == 4:
            self.done.add(key)
            self.measured(operands, *key)
