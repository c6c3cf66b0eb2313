"""The language of a caption as reports tell it: only where that can be told."""

from __future__ import annotations

from collections.abc import Sequence

from siftclip.selectors.methods.captions.languages import Gcld3, one_line

LEAST_LETTERS = 20  # of shorter captions CLD3 names any language, and is sure of it


class SureLanguages(Gcld3):
    """CLD3 where it is sure, and has enough to go by.

    The filters of selectors take its best guess, as the released rules do.
    """

    def __call__(self, captions: Sequence[str]) -> list[str | None]:
        """Return the language of each caption; None of a short one, or where CLD3 is not sure."""
        find = self.model().FindLanguage
        found = [find(text=one_line(text)) for text in captions]
        return [
            result.language
            if result.is_reliable and sum(map(str.isalpha, text)) >= LEAST_LETTERS
            else None
            for text, result in zip(captions, found, strict=True)
        ]
