"""Every matrix in every approximation against its dense float64 oracle."""

import functools
import itertools

import numpy as np
import pytest

from tests import information
from tests.helpers import cases, close
from tests.information import APPROXIMATIONS, LAWS, MODELS, Problem

problem = functools.cache(lambda name: Problem(MODELS[name]))


EVERY = list(itertools.product(LAWS, APPROXIMATIONS, MODELS))
# The MLP has all of them; the rows of a table and the units of a norm have their own.
FAST = [case for case in EVERY if case[2] == "mlp"]
FAST += [("ggn", form, "embedding") for form in ("full", "ekfac", "unit_wise")]


@pytest.mark.parametrize(("law", "approximation", "name"), cases(EVERY, FAST))
def test_dense_oracle(law, approximation, name):
    case = problem(name)
    op = case.operator(law, approximation)
    seen, wanted = np.asarray(op.to_dense()), information.dense(
        case, law, approximation
    )  # fmt: skip
    assert seen.dtype == np.float64 and np.abs(wanted).max() > 1e-6
    close(seen, wanted, 1e-9)
