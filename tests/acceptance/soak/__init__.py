"""A long run of K-FAC with everything in it that may happen to a long run."""
