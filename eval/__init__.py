"""How good a model is: zero-shot tasks on disk, metrics, results."""
