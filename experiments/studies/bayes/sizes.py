"""The sizes of the Bayesian study: for tests, for two cores, for a cluster."""

from experiments.studies.bayes.config import (
    ActiveLearning,
    BayesStudy,
    IVONGrid,
    PointGrid,
    PosteriorGrid,
    Regression,
)

TINY = BayesStudy(
    size="tiny",
    datasets=("digits",),
    networks=("mlp",),
    seeds=2,
    pool=1,
    hidden=(8,),
    train_examples=256,
    validation_examples=64,
    test_examples=100,
    outside_examples=50,
    severities=(0.2,),
    batch_size=64,
    epochs=2,
    samples=4,
    search_samples=2,
    bins=5,
    refresh_every=2,
    adam=PointGrid((3e-3, 0.01), (0.01,)),
    sgd=PointGrid((0.1,), (1e-3,)),
    kfac=PointGrid((0.03,), (0.01,)),
    noisy_kfac=PosteriorGrid((0.03,), (10.0,), (0.1, 1.0)),
    vogn=PosteriorGrid((0.01,), (10.0,), (0.1,)),
    ivon=IVONGrid((0.1,), (10.0,), (1.0,), (0.1,)),
    active=ActiveLearning(
        dataset="digits",
        hidden=(8,),
        pool_examples=80,
        test_examples=50,
        start=10,
        acquired=5,
        rounds=1,
        steps=4,
        batch_size=8,
        samples=3,
        seeds=2,
    ),
    regression=Regression(examples=12, hidden=(4,), steps=4, samples=5),
)
SMALL = BayesStudy()
PAPER = BayesStudy(
    size="paper",
    pool=1,
    blocks=(3, 3, 3),
    width=16,
    train_examples=45_000,
    validation_examples=5_000,
    test_examples=10_000,
    outside_examples=10_000,
    epochs=100,
)
SIZES: dict[str, BayesStudy] = {c.size: c for c in (TINY, SMALL, PAPER)}
