"""What a kept answer depends on."""
