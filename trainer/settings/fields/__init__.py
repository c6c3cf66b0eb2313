"""What groups of options are made of: types with ranges, marks, and reading plain values."""
