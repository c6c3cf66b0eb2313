"""Methods that read captions, and the rules that they share."""
