"""From what a configuration says to objects, with faults told by the options that exist."""
