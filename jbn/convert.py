"""Batch norm weights from PyTorch and Keras and back, whose conventions differ; neither has to be installed.

| | Flax, jbn | PyTorch | Keras |
|---|---|---|---|
| names | scale, bias, mean, var | weight, bias, running_mean, running_var | gamma, beta, moving_mean, moving_variance |
| momentum: weight of | the old state, 0.99 | the new statistics, 0.1 | the old state, 0.99 |
| epsilon | 1e-5 | 1e-5 (`eps`) | 1e-3 |
| stored variance | Σ(x − mean)² / n | Σ(x − mean)² / (n − 1) | Σ(x − mean)² / n |

The running variance is a value like any other, and is converted as it is: n is not in a checkpoint. What differs is
how it moves on, which `unbiased` says to `bn_train`.
"""

from jbn._functions.convert_layers import Layer as Layer
from jbn._functions.convert_layers import from_keras as from_keras
from jbn._functions.convert_layers import from_torch as from_torch
from jbn._functions.convert_layers import to_keras as to_keras
from jbn._functions.convert_layers import to_torch as to_torch
from jbn._functions.convert_models import model_from_torch as model_from_torch
from jbn._functions.convert_models import model_to_torch as model_to_torch
from jbn._functions.convert_models import resnet50_names as resnet50_names
