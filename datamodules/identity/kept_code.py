"""Under what the answers of built-in code are kept, so that the code may be rewritten.

The text of the modules behind a selector is part of what its answers are known by. Text changes
also where answers do not: with moves, names, messages. `kept_code.json` says of each built-in
module which text of today answers like the one under whose digest answers are kept. It holds for
just that text: an edited module is known by its own digest.

`make same-answers` writes the table, and is refused where the recording of behaviour differs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from siftclip.aliases import old_name
from siftclip.files import write_json

TABLE = Path(__file__).with_name("kept_code.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCode:
    """What stands for built-in code, by the names that modules had when it was first kept."""

    siftclip: str  # the version
    kept: dict[str, str]  # the digest of a module under which answers are kept
    imports: dict[str, list[str]]  # by module: all of `kept` that stand for it, itself among them
    today: dict[str, str]  # by today's name: the digest of the text that answers the same

    def stands_for(self, module: str, code: Mapping[str, str]) -> dict[str, str] | None:
        """Return the digests under which answers of a module are kept; None if its answers are new.

        Args:
            module: by its name of today.
            code: digests of its text and of that of all that it imports, by their names of today.
        """
        names = self.imports.get(old_name(module))
        if names is None or any(self.today.get(name) != digest for name, digest in code.items()):
            return None
        return {name: self.kept[name] for name in names}

    def with_same_answers(self, code: Mapping[str, Mapping[str, str]]) -> KeptCode:
        """Return the table in which the current code answers as before.

        Args:
            code: by module, what `stands_for` takes. Those that are new are kept as they are now.
        """
        today = {name: digest for digests in code.values() for name, digest in digests.items()}
        kept, imports = dict(self.kept), dict(self.imports)
        for module, digests in code.items():
            if old_name(module) not in imports:
                imports[old_name(module)] = sorted(old_name(name) for name in digests)
                for name, digest in digests.items():
                    kept.setdefault(old_name(name), digest)
        return KeptCode(
            siftclip=self.siftclip,
            kept=dict(sorted(kept.items())),
            imports=dict(sorted(imports.items())),
            today=dict(sorted(today.items())),
        )

    def with_new_answers(self, module: str) -> KeptCode:
        """Return the table in which a module, and all that imports it, gives new answers."""
        kept = {**self.kept, old_name(module): self.today[module]}
        return KeptCode(siftclip=self.siftclip, kept=kept, imports=self.imports, today=self.today)

    def write(self, path: Path = TABLE) -> None:
        """Write the table as JSON."""
        write_json(path, asdict(self))


@functools.cache
def kept_code(path: Path = TABLE) -> KeptCode:
    """Read the table that comes with Siftclip."""
    return KeptCode(**json.loads(path.read_text(encoding="utf-8")))
