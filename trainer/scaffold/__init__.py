"""New packages for selectors, losses and kinds of tasks: what `siftclip new` writes."""
