"""What guests of a repository meet first: templates of issues, of pull requests, the citation."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted(
    path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"
)
# From the schema of the Citation File Format 1.2.0
CITATION_FIELDS = {"cff-version", "message", "title", "authors"}
REFERENCE_FIELDS = {"type", "title", "authors"}
IDENTIFIER_TYPES = {"doi", "url", "swh", "other"}


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def fields_of(form: Any) -> dict[str, Any]:
    """The questions of an issue form by their ids."""
    return {field["id"]: field for field in form["body"]}


def check_authors(authors: Any) -> None:
    """Persons have a family name, and entities a name."""
    assert authors
    for author in authors:
        assert ("name" in author) != ("family-names" in author), author
        assert set(author) <= {"name", "family-names", "given-names"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path: Path) -> None:
    form = read(path)
    assert set(form) == {"name", "description", "labels", "body"}
    assert len(fields_of(form)) == len(form["body"])
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "checkboxes", "dropdown")
        assert field["attributes"]["label"]


def test_there_is_a_form_for_bugs_features_and_selectors() -> None:
    assert {path.stem for path in FORMS} == {"bug", "feature", "new_selector"}


def test_a_bug_says_with_what_it_happened() -> None:
    required = {
        name: field["attributes"]["label"]
        for name, field in fields_of(read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")).items()
        if field.get("validations", {}).get("required")
    }
    assert required["version"] == "Output of `siftclip --version`"
    assert required["versions"] == "versions.json"


def test_a_selector_comes_with_its_paper() -> None:
    paper = fields_of(read(GITHUB / "ISSUE_TEMPLATE" / "new_selector.yml"))["paper"]
    assert paper["validations"]["required"]
    assert "arXiv" in paper["attributes"]["description"]


def test_the_pull_request_template_asks_what_contributing_asks() -> None:
    template = (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([^`]+)`", template))
    assert {"make lint", "make test", "make record", "CHANGELOG.md"} <= named
    assert [name for name in named if f"`{name}`" not in contributing] == []


def test_the_citation_has_what_its_format_requires() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert set(citation) >= CITATION_FIELDS
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["authors"] == [{"name": "The Siftclip authors"}]
    check_authors(citation["authors"])
    # `1.0` without quotes would be a number, and a date no text
    json.dumps(citation)
    for name in ("message", "title", "abstract", "version", "license"):
        assert isinstance(citation[name], str), name


def test_the_citation_is_of_this_project() -> None:
    citation = read(ROOT / "CITATION.cff")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert citation["version"] == importlib.import_module("siftclip").__version__
    assert f'license = "{citation["license"]}"' in pyproject
    assert f"keywords = {json.dumps(citation['keywords'])}" in pyproject
    has_address = "[project.urls]" in pyproject
    assert has_address or not citation.keys() & {"repository-code", "url", "repository"}


def test_the_citation_names_the_papers_at_the_heart() -> None:
    guide = (ROOT / "docs" / "selectors.md").read_text(encoding="utf-8")
    numbers = []
    for reference in read(ROOT / "CITATION.cff")["references"]:
        assert set(reference) >= REFERENCE_FIELDS
        check_authors(reference["authors"])
        assert isinstance(reference["year"], int)
        (identifier,) = reference["identifiers"]
        assert identifier["type"] in IDENTIFIER_TYPES
        (number,) = re.findall(r"^arXiv:(\d{4}\.\d{5})$", identifier["value"])
        numbers.append(number)
    assert len(numbers) == len(set(numbers)) >= 6
    assert [number for number in numbers[1:] if number not in guide] == []  # the first is CLIP's
