"""Networks whose norm is a constructor argument: small ones for digits, and ImageNet's ResNet-50.

Each takes Flax's BatchNorm as well as ours: what is imported as BatchNorm is all that changes.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import Array

from jbn.linen import BatchNorm
from jbn.nnx import BatchNorm as NnxBatchNorm

MOMENTUM, EPSILON = 0.9, 1e-5
NORMS = {"batch norm": BatchNorm, "no norm": None}  # what most experiments compare


def patches_convolution(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **_: Any) -> Array:
    """A 2-D convolution (NHWC, HWIO) as the product of patches with the kernel.

    Under `vmap` over networks a convolution becomes a grouped one, which XLA runs on a CPU five times slower
    than this batched matrix product.
    """
    height, width, inputs, outputs = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], (height, width), strides, strict=True))
    patches = [x[:, i :: strides[0], j :: strides[1]][:, :rows, :columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(patches, -1) @ kernel.reshape(height * width * inputs, outputs)


class DigitsCNN(nn.Module):
    """3×3 convolutions of stride 2, each followed by `norm` (None: by nothing) and relu; then 10 logits.

    28×28 → 14×14 → 7×7 → 4×4 → 2×2 pixels. `x`: (n, 28, 28, 1); returns (n, 10) float32.
    """

    norm: Callable[..., Any] | None = BatchNorm
    features: Sequence[int] = (8, 16, 16, 32)

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for features in self.features:
            x = nn.Conv(
                features,
                (3, 3),
                strides=2,
                padding=1,
                use_bias=self.norm is None,  # a norm's own bias takes its place
                conv_general_dilated=patches_convolution,
            )(x)
            if self.norm is not None:
                x = self.norm(use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON)(x)
            x = nn.relu(x)
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class MLP(nn.Module):
    """Dense layers, each followed by `norm` (None: by nothing) and `activation`; then a dense layer to `outputs`.

    With Flax's own initialization of weights unless `kernel_init` says otherwise. `x`: (n, ...); returns
    (n, outputs). Cheap under `vmap` over networks, where a dense layer is a batched matrix product.
    """

    norm: Callable[..., Any] | None = BatchNorm
    features: Sequence[int] = (100, 100, 100)
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    outputs: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = x.reshape(x.shape[0], -1)
        for features in self.features:
            # a norm's own bias takes the place of the layer's
            x = nn.Dense(features, use_bias=self.norm is None, kernel_init=self.kernel_init)(x)
            if self.norm is not None:
                x = self.norm(use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON)(x)
            x = self.activation(x)
        return nn.Dense(self.outputs)(x)


STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # features, blocks, stride of the first block
# blocks at which checkpoints begin: after each that strides, where x is smallest, and halfway through the longest run
SEGMENTS = (0, 4, 8, 11, 14, 16)
# what is kept of our batch norms where memory is saved
POLICY = jax.checkpoint_policies.save_only_these_names("bn_input", "bn_stats")
POOL: Any = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}
EXPANSION = 4  # of a bottleneck's output over its width
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015b, eq. 14


def bottlenecks(stages: int | None = None) -> list[tuple[int, int]]:
    """(features, stride) of ResNet-50's 16 blocks, in order, or of so many stages."""
    return [
        (features, stride if block == 0 else 1)
        for features, blocks, stride in STAGES[:stages]
        for block in range(blocks)
    ]


def norm_relu(norm: Callable[..., Any], fused: bool, x: Array) -> Array:
    """relu(norm(x)), the relu as the norm's own where `fused`."""
    return norm(activation="relu")(x) if fused else nn.relu(norm()(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 (which strides: "v1.5"), 1×1, around a shortcut that is projected where shapes change.

    With `fused`, the norms, which must be ours, take activation and residual as arguments.
    """

    features: int
    stride: int
    norm: Callable[..., Any]
    dtype: Any = None
    fused: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KERNEL_INIT)
        strides = (self.stride, self.stride)
        y = norm_relu(self.norm, self.fused, conv(self.features, (1, 1))(x))
        y = norm_relu(self.norm, self.fused, conv(self.features, (3, 3), strides, padding=1)(y))
        y = conv(EXPANSION * self.features, (1, 1))(y)
        # a block begins as the identity: Goyal et al. 2017, section 5.1
        last = functools.partial(self.norm, scale_init=nn.initializers.zeros)
        if x.shape != y.shape:
            x = conv(EXPANSION * self.features, (1, 1), strides, name="conv_shortcut")(x)
            x = self.norm(name="norm_shortcut")(x)
        return last(activation="relu")(y, residual=x) if self.fused else nn.relu(x + last()(y))


class ResNet50(nn.Module):
    """ResNet-50 v1.5 (He et al. 2015, table 1; stride in the 3×3), 25,557,032 parameters for 1,000 classes.

    `x`: (n, h, w, 3) images, channels last; returns (n, num_classes) logits. `norm` is built as
    `norm(use_running_average=…, momentum=0.9, epsilon=1e-5, dtype=dtype)`.

    With `policy` (of `jax.checkpoint_policies`) the backward pass has what that names and the inputs of SEGMENTS, and
    computes the rest of a segment anew when its turn has come: of one checkpoint around all, all blocks' outputs would
    be there at once.
    """

    num_classes: int = 1000
    norm: Callable[..., Any] = BatchNorm
    dtype: Any = None
    fused: bool = False  # activation and residual inside the norms, which must be ours
    stages: int | None = None  # the first ones alone: no ResNet-50, but soon done
    policy: Callable[..., bool] | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON, dtype=self.dtype
        )

        def stem(_: nn.Module, x: Array) -> Array:
            x = nn.Conv(64, (7, 7), (2, 2), padding=3, use_bias=False, dtype=self.dtype, kernel_init=KERNEL_INIT)(x)
            return nn.max_pool(norm_relu(norm, self.fused, x), **POOL)

        def segment(_: nn.Module, x: Array, blocks: list[tuple[int, int]]) -> Array:
            for features, stride in blocks:
                x = Bottleneck(features, stride, norm, self.dtype, self.fused)(x)
            return x

        blocks = bottlenecks(self.stages)
        cuts = (blocks[begin:end] for begin, end in itertools.pairwise(SEGMENTS))
        for part in stem, *(functools.partial(segment, blocks=cut) for cut in cuts if cut):
            x = (part if self.policy is None else nn.remat(part, policy=self.policy))(self, x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class NnxBottleneck(nnx.Module):
    """`Bottleneck` for flax.nnx."""

    def __init__(self, inputs: int, features: int, stride: int, norm: Callable[..., Any], dtype: Any, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, dtype=dtype, kernel_init=KERNEL_INIT, rngs=rngs)
        outputs, strides = EXPANSION * features, (stride, stride)
        self.conv1, self.norm1 = conv(inputs, features, (1, 1)), norm(features)
        self.conv2, self.norm2 = conv(features, features, (3, 3), strides, padding=1), norm(features)
        self.conv3 = conv(features, outputs, (1, 1))
        self.norm3 = norm(outputs, scale_init=nnx.initializers.zeros)
        self.projects = inputs != outputs or stride != 1
        if self.projects:
            self.conv_shortcut, self.norm_shortcut = conv(inputs, outputs, (1, 1), strides), norm(outputs)

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.projects:
            x = self.norm_shortcut(self.conv_shortcut(x))
        return nnx.relu(x + y)


class NnxResNet50(nnx.Module):
    """`ResNet50` for flax.nnx; `norm` is built as `norm(features, momentum=…, epsilon=…, dtype=…, rngs=…)`.

    Training or inference is chosen with `model.train()` and `model.eval()`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        norm: Callable[..., Any] = NnxBatchNorm,
        dtype: Any = None,
        *,
        rngs: nnx.Rngs,
    ):
        norm = functools.partial(norm, momentum=MOMENTUM, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.conv = nnx.Conv(
            3, 64, (7, 7), (2, 2), padding=3, use_bias=False, dtype=dtype, kernel_init=KERNEL_INIT, rngs=rngs
        )
        self.norm = norm(64)
        blocks, inputs = [], 64
        for features, stride in bottlenecks():
            blocks.append(NnxBottleneck(inputs, features, stride, norm, dtype, rngs))
            inputs = EXPANSION * features
        self.blocks = nnx.List(blocks)
        self.dense = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.max_pool(x, **POOL)
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean((1, 2)))


def resnet50_names(kind: Literal["linen", "nnx"] = "linen") -> dict[str, tuple[str | int, ...]]:
    """For every layer of torchvision's ResNet-50 its path in ours, as `jbn.convert.model_from_torch` takes them."""
    linen = {"linen": True, "nnx": False}[kind]
    names: dict[str, tuple[str | int, ...]] = {
        "conv1": ("Conv_0" if linen else "conv",),
        "bn1": ("BatchNorm_0" if linen else "norm",),
    }
    blocks = [(stage, block) for stage, (_, count, _) in enumerate(STAGES, 1) for block in range(count)]
    for number, (stage, block) in enumerate(blocks):
        theirs, ours = f"layer{stage}.{block}", (f"Bottleneck_{number}",) if linen else ("blocks", number)
        for i in range(3):
            names[f"{theirs}.conv{i + 1}"] = (*ours, f"Conv_{i}" if linen else f"conv{i + 1}")
            names[f"{theirs}.bn{i + 1}"] = (*ours, f"BatchNorm_{i}" if linen else f"norm{i + 1}")
        if block == 0:
            names[f"{theirs}.downsample.0"] = (*ours, "conv_shortcut")
            names[f"{theirs}.downsample.1"] = (*ours, "norm_shortcut")
    return names | {"fc": ("Dense_0" if linen else "dense",)}
