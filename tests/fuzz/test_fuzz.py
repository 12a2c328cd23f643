"""Random programs: never silently wrong.

Gradients equal those of the untagged loss; every parameter is in a layer whose
statistics equal the oracle's, or in one that says why it fell back. The slow tests draw
programs anew at every run: ``pytest -m slow tests/fuzz``, as many as ``FUZZ_PROGRAMS``
says.
"""

import os

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from tests.fuzz.checks import OPTIONS, SEEN, check_eager, check_program, check_step
from tests.fuzz.chosen import CHOSEN, SMALL
from tests.fuzz.strategies import programs
from tests.helpers import cases

VARIANTS = st.sampled_from(sorted(OPTIONS))
MANY = hypothesis.settings(
    max_examples=int(os.environ.get("FUZZ_PROGRAMS", "2000")),
    derandomize=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen(name):
    tagged = check_program(*CHOSEN[name])
    assert not [t.note for t in tagged.layers if "whole batch" in t.note]


@hypothesis.settings(max_examples=6)
@hypothesis.given(programs(), VARIANTS)
def test_random(program, variant):
    check_program(program, variant)


@pytest.mark.parametrize("name", cases(CHOSEN, ["tables"]))
def test_steps(name):
    check_step(CHOSEN[name][0])


def test_eager():
    check_eager(SMALL)


@pytest.mark.slow
def test_thousands():
    """Prints what the programs came to; see it with ``-s``."""

    @MANY
    @hypothesis.given(programs(), VARIANTS)
    def run(program, variant):
        if SEEN["programs"] % 25 == 24:
            jax.clear_caches()  # thousands of compiled programs do not fit
        SEEN["programs"] += 1
        check_program(program, variant)

    run()
    for what, count in SEEN.most_common():
        print(f"{count:7} {what}")


@pytest.mark.slow
@hypothesis.settings(MANY, max_examples=50)
@hypothesis.given(programs(depth=1))
def test_many_steps(program):
    check_step(program)


@pytest.mark.slow
@hypothesis.settings(MANY, max_examples=20)
@hypothesis.given(programs(depth=1))
def test_many_eager(program):
    check_eager(program)
