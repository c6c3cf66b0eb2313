"""The Hydra tree: combinations only. This file makes it a package, which Hydra asks for."""
