"""Mutation testing: small wrong changes of the package that the tests must notice.

    python -m tests.mutation measure     # the fast suite once: which test runs a line
    python -m tests.mutation run         # mutants, each against the tests of its line
    python -m tests.mutation report      # docs/mutation.md

Two sets. *Drawn* mutants are changes of one operator, comparison, number or keyword
by cosmic-ray, at positions drawn at random from the core modules. *Formulas* are
written by hand (`formulas.toml`): a wrong transpose, a lost factor.
"""
