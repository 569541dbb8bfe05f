"""The embedded data: a small closed world in which the true reward is known. See README.md."""
