"""Batch normalization for JAX: pure functions on explicit state, exact moments, every transformation."""

from jbn._merge import Moments as Moments
from jbn.functional import BNParams as BNParams
from jbn.functional import BNState as BNState
from jbn.functional import bn_eval as bn_eval
from jbn.functional import bn_init as bn_init
from jbn.functional import bn_train as bn_train
from jbn.moments import merge as merge
from jbn.moments import moments as moments
