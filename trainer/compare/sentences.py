"""What a report says beside its numbers: the budget, what the runs were computed with, notes."""

from __future__ import annotations

from siftclip.tables import listed
from siftclip.trainer.compare.collect import ArmComparison
from siftclip.trainer.runtime.environment import CODE, MACHINE, mixed

COST_NOTE = (
    "Means over seeds. Drawn: taken from the selection's order; loaded: read and decoded; scored: "
    "by a forward pass; FLOPs of the towers, a multiplication and an addition being two. Seconds "
    "of training contain those of waiting for data, scoring and selecting; those of the "
    "selection before training come on top, without the embedding of the pool."
)
DIFFERENCE_NOTE = (
    "Least resolved: the smallest difference that would have been. Chance to be best: how often "
    "the arm is the highest of all if true means are drawn as these data allow, each as likely "
    "before. Seeds needed: of each arm, for a true difference of this size to be resolved with a "
    "chance of 80 %. * marks what is resolved."
)


def budget_sentence(comparison: ArmComparison) -> str:
    """Say what all arms had in common."""
    runs = comparison.runs
    trained = sorted({int(samples) for samples in runs["trained_samples"]})
    of_arms = dict.fromkeys(comparison.seeds.values())
    seeds = " or ".join(", ".join(map(str, of_arm)) for of_arm in of_arms)
    word = "seed" if seeds.isdecimal() else "seeds"
    batch = comparison.settings["scale"]["global_batch_size"]
    limits = {k: v for k, v in comparison.settings["budget"].items() if v is not None}
    if len(trained) > 1 and not limits:
        budget = f"trained on {trained[0]:,} to {trained[-1]:,} samples: budgets differ"
    elif limits:
        ((unit, amount),) = limits.items()
        budget = f"had {amount:,g} {unit.replace('_', ' ')}, in steps of batch {batch}"
    else:
        steps = int(runs["steps"].iloc[0])
        budget = f"trained on {trained[0]:,} samples in {steps:,} steps of batch {batch}"
    return f"{len(comparison.arms)} arms, {word} {seeds}; every run {budget}."


def partial_sentence(comparison: ArmComparison) -> str:
    """Say that runs have no results yet, or failed; empty if all have."""
    planned = sum(map(len, comparison.seeds.values()))
    lacking = [missing.reason for missing in comparison.missing if missing.task is None]
    if not lacking:
        return ""
    failed = sum(reason.startswith("failed") for reason in lacking)
    parts = [f"{failed} failed"] if failed else []
    parts += [f"{len(lacking) - failed} not finished"] if failed < len(lacking) else []
    return f"Partial: of {planned} runs {listed(parts)}; what is missing is listed below."


def made_with(comparison: ArmComparison) -> str:
    """Name the code and versions that all runs have in common; `mixed_notes` has the others."""
    sessions = [of_run for run in comparison.environments.values() for of_run in run]
    common = {
        name: value
        for name, value in (sessions[0] if sessions else {}).items()
        if value and all(session.get(name) == value for session in sessions)
    }
    return f"Made with {', '.join(f'{name} {value}' for name, value in common.items())}."


def mixed_notes(comparison: ArmComparison) -> list[str]:
    """Say in a sentence each what the runs were not all computed with, and what that means."""
    differing = mixed(comparison.environments)
    notes = [
        f"The runs differ in {name}: "
        + "; ".join(f"{value} ({', '.join(runs)})" for value, runs in by_value.items())
        + "."
        for name, by_value in differing.items()
    ]
    if set(differing) & set(CODE):
        notes.append(
            "Differences between arms may be those of the code: train them again with one."
        )
    if set(differing) & set(MACHINE):
        notes.append(
            "Another processor or number of threads moves a run as another seed does, so that "
            "equal seeds are not paired here."
        )
    return notes
