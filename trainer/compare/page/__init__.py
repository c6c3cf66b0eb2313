"""The page of a comparison: plain data of each part, templates, and what renders them."""
