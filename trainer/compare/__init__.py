"""Many arms (selectors x seeds) at one budget, and the report about them."""
