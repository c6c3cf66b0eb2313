"""What lies in the folder of outputs: what made it, what refers to it, and what can go."""
