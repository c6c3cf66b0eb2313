"""How sure a metric is, and a difference of two."""
