"""Methods that remove samples step by step."""
