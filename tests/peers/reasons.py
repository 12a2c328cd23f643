"""Tests of the peers that K-FAC cannot pass, and why; looked at one by one."""

NAMED = "reads a field of the state of the optimiser it names"
REFUSES = (
    "expects a NaN to come through once apply_if_finite has given up: K-FAC refuses it "
    "itself, with updates of zero"
)
REASONS = {
    "test_apply_if_finite_sgd": REFUSES,
    "test_apply_if_finite_sgd_extra_args": REFUSES,
    "test_apply_if_finite_stateful_sgd": REFUSES,
    "test_masked_state_structure": NAMED,
    "test_flatten": (
        "asks flattened and plain parameters for the same step to 1e-7: K-FAC has a "
        "block for each parameter, and one for all of them once they are flattened"
    ),
    "test_optimizer_serialization_to_bytes": (
        "compares states by ==, which arrays of more than one number do not have"
    ),
}


def reason(test: str) -> str:
    """Why a test cannot pass, or nothing; parametrised ones by their method's name."""
    method = test.split(".")[-1]
    for name in (test, method, method.rstrip("0123456789")):
        if name in REASONS:
            return REASONS[name]
    return ""
