"""Batch normalization for JAX: pure functions on explicit state, exact moments, every transformation."""

from jbn import convert as convert
from jbn import scaling as scaling
from jbn._merge import Moments as Moments
from jbn.explain import explain as explain
from jbn.fold import fold as fold
from jbn.fold import fold_after as fold_after
from jbn.functional import BNParams as BNParams
from jbn.functional import BNState as BNState
from jbn.functional import bn_eval as bn_eval
from jbn.functional import bn_init as bn_init
from jbn.functional import bn_train as bn_train
from jbn.inverse import denormalize as denormalize
from jbn.inverse import identity_params as identity_params
from jbn.moments import merge as merge
from jbn.moments import moments as moments
from jbn.population import population_state as population_state
from jbn.renorm import brn_train as brn_train
