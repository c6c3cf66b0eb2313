"""Tensors in, tensors out: the arithmetic that several methods share."""
