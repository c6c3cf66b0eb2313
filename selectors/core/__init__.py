"""What a selector is: its contract, its input, its rules and how they compose."""
