"""Every matrix in every approximation against its dense float64 oracle."""

import functools

import numpy as np
import pytest

from tests import information
from tests.helpers import close
from tests.information import APPROXIMATIONS, LAWS, MODELS, Problem

problem = functools.cache(lambda name: Problem(MODELS[name]))


FAST = ("mlp", "embedding")
SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in FAST
]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("law", LAWS)
def test_dense_oracle(law, approximation, name):
    case = problem(name)
    op = case.operator(law, approximation)
    seen, wanted = np.asarray(op.to_dense()), information.dense(
        case, law, approximation
    )  # fmt: skip
    assert seen.dtype == np.float64 and np.abs(wanted).max() > 1e-6
    close(seen, wanted, 1e-9)
