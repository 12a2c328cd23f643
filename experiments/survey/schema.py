"""The columns of the survey's table: names, types of DuckDB, meanings.

A row is one matrix, in one approximation, at one checkpoint of one run. A number that
was not finite is null; measures have four significant digits.
"""

from typing import NamedTuple

from experiments.survey.config import APPROXIMATIONS, MATRICES

MATRIX_TITLES = {
    "hessian": "Hessian",
    "fisher": "Fisher",
    "mc_fisher": "MC Fisher",
    "gradient_covariance": "gradient covariance",
}
APPROXIMATION_TITLES = {
    "full": "full",
    "block_diagonal": "block diagonal",
    "kronecker": "Kronecker",
    "diagonal": "diagonal",
}
ORDER = ", ".join(MATRICES)


class Column(NamedTuple):
    """A column."""

    name: str  # in the table
    kind: str  # DuckDB's type
    meaning: str  # one line
    field: str | None = None  # of the JSON lines, where it is not the name

    @property
    def source(self) -> str:
        """The name in the JSON lines."""
        return self.field or self.name


RUN_COLUMNS = (
    Column("run", "VARCHAR", "name of the run"),
    Column("dataset", "VARCHAR", "data set"),
    Column("data", "VARCHAR", "the data set in full: what it is, in words"),
    Column("model", "VARCHAR", "network"),
    Column("num_params", "INTEGER", "parameters of the network, P"),
    Column("num_train", "INTEGER", "training examples, N"),
    Column("num_test", "INTEGER", "test examples"),
    Column("optimizer", "VARCHAR", "sgd, adam or kfac"),
    Column("learning_rate", "DOUBLE", "learning rate"),
    Column("batch_size", "INTEGER", "examples of a step"),
    Column("weight_decay", "DOUBLE", "decoupled weight decay"),
    Column("seed", "INTEGER", "of parameters, batches and sampled labels"),
    Column("damping", "DOUBLE", "λ of the measures"),
    Column("seconds", "FLOAT", "wall-clock seconds of the run with its measurements"),
)
CHECKPOINT_COLUMNS = (
    Column("step", "INTEGER", "steps taken"),
    Column("epoch", "FLOAT", "epochs taken"),
    Column("train_loss", "FLOAT", "mean loss of the training examples"),
    Column("test_loss", "FLOAT", "mean loss of the test examples"),
    Column("train_accuracy", "FLOAT", "share of the training examples that are right"),
    Column("test_accuracy", "FLOAT", "share of the test examples that are right"),
    Column("gradient_norm", "FLOAT", "length of the training loss's gradient"),
    Column("sharpness", "FLOAT", "greatest rise of the training loss in a small ball"),
)
MATRIX_COLUMNS = (
    Column("matrix", "VARCHAR", f"M: {ORDER}"),
    Column("approximation", "VARCHAR", f"A, of M: {', '.join(APPROXIMATIONS)}"),
    Column("eigenvalues", "FLOAT[]", "the ten largest of A, descending"),
    Column("trace", "FLOAT", "tr A"),
    Column("frobenius", "FLOAT", "‖A‖ of Frobenius"),
    Column("stable_rank", "FLOAT", "‖A‖² of Frobenius over that of the spectral norm"),
    Column("effective_dimension", "FLOAT", "tr A (A + λI)⁻¹"),
    Column("condition_number", "FLOAT", "of A + λI"),
    Column("log_det", "FLOAT", "log det(A + λI)"),
    Column("tic", "FLOAT", "tr C (A + λI)⁻¹ / N, C the full gradient covariance"),
    Column("error", "FLOAT", "‖A − M‖ / ‖M‖, Frobenius norms"),
    Column("spectral_error", "FLOAT", "‖A − M‖ / ‖M‖, spectral norms"),
    Column("cosine", "FLOAT", "⟨A, M⟩ / (‖A‖ ‖M‖), Frobenius norms"),
    Column("overlap", "FLOAT", "‖UᵀV‖² / 10, ten leading eigenvectors of A and of M"),
    Column("cosines", "FLOAT[]", f"cosine of A with the same of {ORDER}"),
    # OVERLAPS is a reserved word of SQL.
    Column(
        "subspace_overlaps",
        "FLOAT[]",
        f"overlap of A with the same of {ORDER}",
        "overlaps",
    ),
)
ROW_COLUMNS = CHECKPOINT_COLUMNS + MATRIX_COLUMNS
# Nested, the same in all rows of a run.
RECORD_COLUMNS = ("fingerprint", "config", "machine")
