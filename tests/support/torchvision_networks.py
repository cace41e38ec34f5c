"""The networks of `torchvision_reference.py` in linen, for images channels last, as one would write them in Flax.

He et al. 2015, Sandler et al. 2018, Howard et al. 2019, Huang et al. 2016, Tan & Le 2019, Simonyan & Zisserman 2014,
Szegedy et al. 2014; in the variants that torchvision has.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

# the weights are torchvision's: those drawn first are read nowhere, and zeros are the quickest to trace
Conv, Dense = (partial(layer, kernel_init=nn.initializers.zeros) for layer in (nn.Conv, nn.Dense))


def identity(x):
    return x


def unit(x, features, window=1, stride=1, groups=1, activation=nn.relu, epsilon=1e-5, use_bias=False):
    """Convolution, batch norm, activation; of the module that calls it."""
    size, strides, padding = (window, window), (stride, stride), window // 2
    x = Conv(features, size, strides, padding, use_bias=use_bias, feature_group_count=groups)(x)
    return activation(nn.BatchNorm(True, epsilon=epsilon)(x))


def pooled(x, window=3, stride=2):
    return nn.max_pool(x, (window, window), (stride, stride), "SAME")


def pooled_torch(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


class Block(nn.Module):
    features: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        if self.bottleneck:
            y = unit(unit(x, self.features), self.features, 3, self.stride)
            y = unit(y, 4 * self.features, activation=identity)
        else:
            y = unit(unit(x, self.features, 3, self.stride), self.features, 3, activation=identity)
        if x.shape != y.shape:
            x = unit(x, y.shape[-1], stride=self.stride, activation=identity)
        return nn.relu(x + y)


class ResNet(nn.Module):
    counts: Sequence[int]
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        x = pooled_torch(unit(x, 64, 7, 2))
        for stage, count in enumerate(self.counts):
            for block in range(count):
                x = Block(64 * 2**stage, 2 if stage and not block else 1, self.bottleneck)(x)
        return Dense(10)(x.mean((1, 2)))


class Inverted(nn.Module):
    """Expanded, depthwise, squeezed and excited, projected."""

    expanded: int
    features: int
    window: int
    stride: int
    activation: Callable
    squeezed: int = 0
    inner: Callable = nn.relu
    gate: Callable = nn.hard_sigmoid
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        options = dict(activation=self.activation, epsilon=self.epsilon)
        y = unit(x, self.expanded, **options) if self.expanded != x.shape[-1] else x
        y = unit(y, self.expanded, self.window, self.stride, self.expanded, **options)
        if self.squeezed:
            share = self.inner(Conv(self.squeezed, (1, 1))(y.mean((1, 2), keepdims=True)))
            y = y * self.gate(Conv(self.expanded, (1, 1))(share))
        y = unit(y, self.features, activation=identity, epsilon=self.epsilon)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = unit(x, 32, 3, 2, activation=nn.relu6)
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for ratio, features, count, stride in stages:
            for block in range(count):
                x = Inverted(ratio * x.shape[-1], features, 3, 1 if block else stride, nn.relu6)(x)
        return Dense(10)(unit(x, 1280, activation=nn.relu6).mean((1, 2)))


class MobileNetV3Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = unit(x, 16, 3, 2, activation=nn.hard_swish, epsilon=1e-3)
        blocks = ((3, 16, 16, 8, 2), (3, 72, 24, 0, 2), (3, 88, 24, 0, 1), (5, 96, 40, 24, 2), (5, 240, 40, 64, 1))
        blocks += ((5, 240, 40, 64, 1), (5, 120, 48, 32, 1), (5, 144, 48, 40, 1), (5, 288, 96, 72, 2))
        blocks += ((5, 576, 96, 144, 1), (5, 576, 96, 144, 1))
        for number, (window, expanded, features, squeezed, stride) in enumerate(blocks):
            activation = nn.relu if number < 3 else nn.hard_swish
            x = Inverted(expanded, features, window, stride, activation, squeezed, epsilon=1e-3)(x)
        x = unit(x, 576, activation=nn.hard_swish, epsilon=1e-3).mean((1, 2))
        x = nn.hard_swish(Dense(1024)(x))
        return Dense(10)(x)


class EfficientNetB0(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = unit(x, 32, 3, 2, activation=nn.silu)
        stages = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
        for ratio, window, stride, features, count in (*stages, (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)):
            for block in range(count):
                inputs = x.shape[-1]
                squeeze = dict(squeezed=inputs // 4, inner=nn.silu, gate=nn.sigmoid)
                x = Inverted(ratio * inputs, features, window, 1 if block else stride, nn.silu, **squeeze)(x)
        return Dense(10)(unit(x, 1280, activation=nn.silu).mean((1, 2)))


class DenseLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = unit(nn.relu(nn.BatchNorm(True)(x)), 128)
        return jnp.concatenate([x, Conv(32, (3, 3), use_bias=False)(y)], -1)


class Transition(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(nn.relu(nn.BatchNorm(True)(x)))
        return nn.avg_pool(x, (2, 2), (2, 2))


class DenseNet121(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = pooled_torch(unit(x, 64, 7, 2))
        for block, count in enumerate((6, 12, 24, 16)):
            if block:
                x = Transition()(x)
            for _ in range(count):
                x = DenseLayer()(x)
        return Dense(10)(nn.relu(nn.BatchNorm(True)(x)).mean((1, 2)))


def adaptive(n, size):
    """The matrix of an average over bins that PyTorch makes of n positions."""
    bins = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return np.array([[(a <= j < b) / (b - a) for j in range(n)] for a, b in bins], np.float32)


class VGG11(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            x = unit(x, features, 3, use_bias=True) if features else pooled(x, 2)
        rows, columns = (adaptive(n, 7) for n in x.shape[1:3])
        x = jnp.einsum("hi,wj,nijc->nhwc", rows, columns, x).reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(Dense(4096)(x))
        return Dense(10)(x)


class Inception(nn.Module):
    sizes: Sequence[int]

    @nn.compact
    def __call__(self, x):
        one, reduced, three, reduced_again, five, projected = self.sizes
        ys = [
            unit(x, one, epsilon=1e-3),
            unit(unit(x, reduced, epsilon=1e-3), three, 3, epsilon=1e-3),
            unit(unit(x, reduced_again, epsilon=1e-3), five, 3, epsilon=1e-3),
            unit(pooled(x, 3, 1), projected, epsilon=1e-3),
        ]
        return jnp.concatenate(ys, -1)


class GoogLeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = pooled(unit(x, 64, 7, 2, epsilon=1e-3))
        x = pooled(unit(unit(x, 64, epsilon=1e-3), 192, 3, epsilon=1e-3))
        stages = (
            ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
            (
                (192, 96, 208, 16, 48, 64),
                (160, 112, 224, 24, 64, 64),
                (128, 128, 256, 24, 64, 64),
                (112, 144, 288, 32, 64, 64),
                (256, 160, 320, 32, 128, 128),
            ),
            ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
        )
        for stage, blocks in enumerate(stages):
            x = pooled(x, 3 if stage == 1 else 2) if stage else x
            for sizes in blocks:
                x = Inception(sizes)(x)
        return Dense(10)(x.mean((1, 2)))


NETWORKS = {
    "resnet18": ResNet((2, 2, 2, 2), False),
    "resnet50": ResNet((3, 4, 6, 3), True),
    "mobilenet_v2": MobileNetV2(),
    "mobilenet_v3_small": MobileNetV3Small(),
    "densenet121": DenseNet121(),
    "efficientnet_b0": EfficientNetB0(),
    "vgg11_bn": VGG11(),
    "googlenet": GoogLeNet(),
}
