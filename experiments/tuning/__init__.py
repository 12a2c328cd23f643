"""Hyper-parameter search: many trials in one program, many workers on one study."""
