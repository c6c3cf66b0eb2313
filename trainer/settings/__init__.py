"""Every option: one frozen dataclass per group of the configuration, with default and meaning.

Imports neither torch nor Lightning, so that a fault of the options is told within a second.
"""
