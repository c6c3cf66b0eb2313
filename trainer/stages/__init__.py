"""The stages behind the commands."""

from siftclip.aliases import answer_for_module

answer_for_module(__name__)  # the module of this name is in here now
