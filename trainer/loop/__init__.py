"""The training loop in Lightning: the module and its callbacks."""
