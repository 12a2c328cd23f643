"""The version matrix: the wheel under every Python, with oldest and newest packages.

A cell is a Python and a set of packages: ``oldest`` are the lower bounds of
``setup.cfg``, ``newest`` what pip takes without pins. For every cell the wheel is
installed into a fresh virtual environment and a part of the tests runs against it:

    .venv/bin/python -m tests.matrix
    .venv/bin/python -m tests.matrix --python python3.13 --packages newest --full

A finished cell is kept in the result file, with the versions really installed, and is
not run again as long as the package and its requirements are the same.
"""
