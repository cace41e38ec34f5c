"""Named shapes of batch norms, shared by benchmarks and tests; networks' are derived from their architecture."""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.material.models import EXPANSION, bottlenecks


class Case(NamedTuple):
    """One batch norm: the shape of its input, channels at `axis`."""

    name: str
    shape: tuple[int, ...]
    axis: int = -1


def case(*shape: int) -> Case:
    """A channels-last case named by its shape."""
    return Case("×".join(map(str, shape)), shape)


def images(batch: int, size: int, channels: int) -> Case:
    """A channels-last case of square images."""
    return case(batch, size, size, channels)


def resnet50(batch: int, size: int = 224) -> list[Case]:
    """The 53 batch norms of ResNet-50 v1.5 in order, at `size`×`size` pixels; many share a shape."""
    size = -(-size // 2)
    norms = [images(batch, size, 64)]
    size, inputs = -(-size // 2), 64  # max pooling
    for features, stride in bottlenecks():
        norms.append(images(batch, size, features))
        size, outputs = -(-size // stride), EXPANSION * features
        norms += [images(batch, size, features), images(batch, size, outputs)]
        if stride != 1 or inputs != outputs:
            norms.append(images(batch, size, outputs))  # of the projected shortcut
        inputs = outputs
    return norms


# (expansion, output features, blocks, stride of the first block)
MOBILENET_V2 = (  # Sandler et al. 2018, table 2
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
EFFICIENTNET_B0 = (  # Tan & Le 2019, table 1
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 40, 2, 2), (6, 80, 3, 2), (6, 112, 3, 1), (6, 192, 4, 2), (6, 320, 1, 1),
)  # fmt: skip


def inverted_residuals(stages: Iterable[tuple[int, int, int, int]], batch: int, size: int = 224) -> list[Case]:
    """The batch norms, in order, of a network of inverted residual blocks: 52 and 49 for the tables above."""
    size, inputs = -(-size // 2), 32
    norms = [images(batch, size, inputs)]
    for expansion, outputs, blocks, stride in stages:
        for block in range(blocks):
            if expansion != 1:
                norms.append(images(batch, size, expansion * inputs))
            size = -(-size // (stride if block == 0 else 1))
            norms += [images(batch, size, expansion * inputs), images(batch, size, outputs)]
            inputs = outputs
    return [*norms, images(batch, size, 1280)]


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Each case once, in order of first appearance."""
    return list(dict.fromkeys(cases))


def channels_first(last: Case) -> Case:
    """The NCHW twin of an NHWC case."""
    *lead, channels = last.shape
    shape = (lead[0], channels, *lead[1:])
    return case(*shape)._replace(axis=1)


# What a CPU is timed on: the 3×3 norms of ResNet-50's four stages at batch 32, and a wide dense layer.
CPU = [
    images(32, 56, 64),
    images(32, 28, 128),
    images(32, 14, 256),
    images(32, 7, 512),
    case(4096, 1024),
]

# What a GPU is timed on.
GPU = distinct(
    [
        *resnet50(32),
        *resnet50(256),
        *inverted_residuals(MOBILENET_V2, 32),
        *inverted_residuals(EFFICIENTNET_B0, 32),
        case(100_000, 32),
        case(4096, 1024),
        case(128, 65),
        *(channels_first(norm) for norm in [images(32, 112, 64), *CPU[:4]]),
    ]
)
