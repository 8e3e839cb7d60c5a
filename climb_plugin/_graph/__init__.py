"""Holds the inner machinery, which decides numbers: samples, the walk, second runs, noise."""
