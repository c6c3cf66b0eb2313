"""Where samples come from: pools, tar indices, features, selection files, order, streaming."""
