"""From features to metrics."""
