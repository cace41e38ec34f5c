"""What `autotune` found, as it is printed."""

from typing import NamedTuple

from jbn._op.tables import Norm, Row


class Tuning(NamedTuple):
    """What `autotune` found; `str()` is a table."""

    device: str  # as jax names it
    file: str  # where the rows are kept
    rows: tuple[Row, ...]  # of the batch norms of the program
    measured: int  # how many of them were measured now

    def __str__(self) -> str:
        ahead = sum(row.won(False) or row.won(True) for row in self.rows)
        lines = [("batch norm", "forward / µs", "", "backward / µs", "", "note")]
        lines += [(described(row.norm), *_told(row, False), *_told(row, True), row.failed or "") for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        title = f"{self.device}: kernels ahead in {ahead} of {len(self.rows)} batch norms, {self.measured} measured now"
        return "\n".join([title, *shown, f"times are those of kernels and of XLA; rows are kept in {self.file}"])


def described(norm: Norm) -> str:
    """Such as "256×56×56×64 bfloat16, relu"."""
    said = ["×".join(map(str, norm.shape)) + f" {norm.dtype}"]
    if norm.axis != len(norm.shape) - 1:
        said.append(f"channels at {norm.axis}")
    if norm.batch:
        said.append(f"{norm.batch} batch axes")
    if norm.out != norm.dtype:
        said.append(f"to {norm.out}")
    said += ["residual"] * (norm.residual is not None) + ["mask"] * (norm.mask is not None)
    said += [norm.activation] if norm.activation else []
    return ", ".join([*said, *["inference"] * (not norm.training)])


def _told(row: Row, backward: bool) -> tuple[str, str]:
    """Times of both, and who won."""
    speed, times = row.speed(backward), row.backward if backward else row.forward
    if speed is None or times is None:
        return ("–", "")
    who = "kernels" if row.won(backward) else "XLA"
    return " : ".join(f"{t:.1f}" for t in times), f"{who}, {max(speed, 1 / speed):.2f}×"


def verdict(row: Row) -> str:
    """Who won each pass, or why kernels never will."""
    if row.failed is not None:
        return f"kernels are never chosen: {row.failed}"
    return "; ".join(
        f"{each} {' '.join(told)}"
        for each, backward in (("forward", False), ("backward", True))
        if (told := _told(row, backward))[1]
    )
