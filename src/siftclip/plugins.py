"""What other distributions add to Siftclip, found through entry points: a name and the object."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from siftclip.errors import InputError


def find_plugins(group: str) -> dict[str, EntryPoint]:
    """Find what is installed for an entry-point group, by name. Nothing is imported.

    Args:
        group: for example `siftclip.selectors`.

    Raises:
        InputError: two distributions give the same name.
    """
    plugins: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = plugins.setdefault(point.name, point)
        if other.value != point.value:
            raise InputError(
                f"Two plug-ins of the group {group!r} are called {point.name!r}: {other.value} and "
                f"{point.value}. Uninstall one of them."
            )
    return plugins
