"""Networks in which batch norms meet other layers than in a ResNet: concatenated inputs, and skips across a U.

Each takes Flax's BatchNorm as well as ours, and builds it as ResNet-50 does (`models.py`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from experiments.material.models import EPSILON, KERNEL_INIT, MOMENTUM, POOL, norm_relu
from jbn.linen import BatchNorm


class DenseNet121(nn.Module):
    """DenseNet-121 (Huang et al. 2017, table 1), 7,978,856 parameters for 1,000 classes.

    A layer sees all that came before it in its block. `x`: (n, h, w, 3) images; returns (n, num_classes) logits.
    """

    num_classes: int = 1000
    norm: Callable[..., Any] = BatchNorm
    dtype: Any = None
    fused: bool = False  # relu inside the norms, which must be ours
    blocks: Sequence[int] = (6, 12, 24, 16)
    growth: int = 32

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, dtype=self.dtype
        )
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KERNEL_INIT)
        x = norm_relu(norm, self.fused, conv(2 * self.growth, (7, 7), (2, 2), padding=3)(x))
        x = nn.max_pool(x, **POOL)
        for number, layers in enumerate(self.blocks):
            if number:
                x = conv(x.shape[-1] // 2, (1, 1))(norm_relu(norm, self.fused, x))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(layers):
                y = conv(4 * self.growth, (1, 1))(norm_relu(norm, self.fused, x))
                y = conv(self.growth, (3, 3), padding=1)(norm_relu(norm, self.fused, y))
                x = jnp.concatenate([x, y], -1)
        x = norm_relu(norm, self.fused, x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, figure 1), its convolutions padded, and a batch norm behind each that is 3×3.

    31,037,698 parameters for 2 classes. `x`: (n, h, w, 3) images whose sides 2^(levels − 1) divides; returns
    (n, h, w, num_classes) logits.
    """

    num_classes: int = 2
    norm: Callable[..., Any] = BatchNorm
    dtype: Any = None
    fused: bool = False  # relu inside the norms, which must be ours
    features: Sequence[int] = (64, 128, 256, 512, 1024)

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, dtype=self.dtype
        )
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KERNEL_INIT)

        def twice(x: Array, features: int) -> Array:
            for _ in range(2):
                x = norm_relu(norm, self.fused, conv(features, (3, 3))(x))
            return x

        skips = []
        for features in self.features[:-1]:
            skips.append(twice(x, features))
            x = nn.max_pool(skips[-1], (2, 2), (2, 2))
        x = twice(x, self.features[-1])
        for features, skip in zip(self.features[-2::-1], skips[::-1], strict=True):
            x = nn.ConvTranspose(features, (2, 2), (2, 2), dtype=self.dtype)(x)
            x = twice(jnp.concatenate([skip, x], -1), features)
        return nn.Conv(self.num_classes, (1, 1), dtype=self.dtype)(x)
