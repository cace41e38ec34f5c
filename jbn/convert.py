"""Batch norm weights from PyTorch and Keras and back, whose conventions differ; neither has to be installed.

| | Flax, jbn | PyTorch | Keras |
|---|---|---|---|
| names | scale, bias, mean, var | weight, bias, running_mean, running_var | gamma, beta, moving_mean, moving_variance |
| momentum: weight of | the old state, 0.99 | the new statistics, 0.1 | the old state, 0.99 |
| epsilon | 1e-5 | 1e-5 (`eps`) | 1e-3 |
| stored variance | Σ(x − mean)² / n | Σ(x − mean)² / (n − 1) | Σ(x − mean)² / n |

PyTorch's activations by our names: ReLU "relu", ReLU6 "relu6", LeakyReLU "leaky_relu" with its negative_slope, SiLU
"silu", Hardswish "hard_swish", Mish "mish", GELU "gelu_exact", with approximate="tanh" "gelu", ELU "elu", Sigmoid
"sigmoid", Tanh "tanh".

The running variance is a value like any other, and is converted as it is: n is not in a checkpoint. What differs is
how it moves on, which `unbiased` says to `bn_train`.
"""

from jbn._functions.convert_layers import Layer, from_keras, from_torch, to_keras, to_torch
from jbn._functions.convert_match import Match, match
from jbn._functions.convert_models import model_from_torch, model_to_torch
from jbn._functions.convert_settings import check_settings

__all__ = [
    "Layer",
    "Match",
    "check_settings",
    "from_keras",
    "from_torch",
    "match",
    "model_from_torch",
    "model_to_torch",
    "to_keras",
    "to_torch",
]


def __dir__() -> list[str]:
    return __all__
