"""A pool: its tars as one numbered set of samples, and how they are read."""

from siftclip.aliases import answer_for_module

answer_for_module(__name__)  # the module of this name is in here now
