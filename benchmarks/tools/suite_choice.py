"""Which tasks the suites `stable` and `fast` hold, from public results of many models.

    python benchmarks/tools/suite_choice.py openclip_results.csv

The file is `docs/openclip_results.csv` of open_clip: a row a model, a column a task with its main
metric. The numbers stand in docs/evaluation_suites.md.

stable  the tasks whose Spearman correlation over the models with the mean of the other 37 tasks is
        at least .9, and whose sampling error is below .01.
fast    of the stable tasks on which every model of DataComp's scale small is at least 3 sampling
        errors above chance: the 4 to 6 with at most 25,000 images together whose mean predicts the
        average over 38 best over the small and medium models, each left out in turn.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from siftclip.eval.tasks.known_tasks import KNOWN_TASKS

LEAST_CORRELATION = 0.9
LARGEST_ERROR = 0.01
FAST_TASKS = (4, 5, 6)
FAST_IMAGES = 25_000
FAST_MARGIN = 3  # sampling errors above chance
# Images of the group that decides a worst-group metric. FMoW: its region of 4 images counts, since
# DataComp looks for it by a name that its groups do not bear; 31 of the 121 values are 0, where no
# other region would be. The error is an upper bound, since the other regions cap the metric. The
# other two: the size of which nearly all values of the table are multiples.
DECIDING_GROUP = {"wilds/fmow": 4, "fairness/dollar_street": 856, "fairness/geode": 2395}
WITHOUT_ERROR = ("wilds/iwildcam",)  # macro F1 over rare classes is not a share of images
SMALL, MEDIUM = "_s13m_b4k", "_s128m_b4k"  # how the tags of DataComp's models end, by scale


def read_models(path: Path) -> pd.DataFrame:
    """Main metrics, a row a model (name, tag) and a column a task, named by DataComp's keys.

    Models whose 38 numbers equal those of one before are left out: the same weights again.
    """
    titles = {task.title: key for key, task in KNOWN_TASKS.items() if task.main_metric}
    table = pd.read_csv(path).set_index(["name", "pretrained"])
    return table[list(titles)].rename(columns=titles).drop_duplicates()


def deciding_samples(key: str) -> int:
    """How many images the main metric of a task is a share of. For WinoGAViL more than there are:
    the instances with less than 10 candidates do not count."""
    return DECIDING_GROUP.get(key, KNOWN_TASKS[key].samples)


def sampling_error(values: pd.Series) -> float:
    """The standard error of a share, root of the mean over models of p (1 - p) / n; maybe NaN.

    An approximation where the metric is no plain share: class means are taken as if all classes
    were equally large, the five captions of an image as one.
    """
    key = str(values.name)
    if key in WITHOUT_ERROR:
        return float("nan")
    return float(np.sqrt((values * (1 - values)).mean() / deciding_samples(key)))


def consecutive_epochs(models: pd.DataFrame) -> pd.Series:
    """Standard deviation between two checkpoints of one run, by task: the pairs `_e31`, `_e32`."""
    pairs = [
        (models.loc[(name, tag)] - models.loc[(name, f"{tag[:-1]}2")]).to_numpy()
        for name, tag in models.index
        if tag.endswith("_e31")
    ]
    return pd.Series(np.sqrt((np.stack(pairs) ** 2 / 2).mean(axis=0)), index=models.columns)


def measure_tasks(models: pd.DataFrame) -> pd.DataFrame:
    """One row a task: what the rule for `stable` looks at, and whether it takes the task."""
    rows = {}
    for key in models:
        values, others = models[key], models.drop(columns=key).mean(axis=1)
        slope, start = np.polyfit(others, values, 1)
        scatter = (values - start - slope * others).std() / (values.max() - values.min())
        rows[key] = {
            "samples": deciding_samples(str(key)),
            "error": sampling_error(values),
            "spearman": values.rank().corr(others.rank()),
            "pearson": values.corr(others),
            "scatter": scatter,
        }
    tasks = pd.DataFrame.from_dict(rows, orient="index")
    tasks["epochs"] = consecutive_epochs(models)
    tasks["stable"] = (tasks["spearman"] >= LEAST_CORRELATION) & (tasks["error"] < LARGEST_ERROR)
    return tasks


def leave_one_out_error(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square error of the line through all other points, at each point in turn."""
    design = np.stack([np.ones_like(x), x], axis=1)
    hat = design @ np.linalg.pinv(design)
    residual = (y - hat @ y) / (1 - np.diag(hat))
    return float(np.sqrt((residual**2).mean()))


def of_scale(models: pd.DataFrame, *endings: str) -> np.ndarray:
    """Which rows are DataComp's models of these scales, bool [models]."""
    return np.array([tag.endswith(endings) for _, tag in models.index])


def seen_early(models: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The tasks on which every model of scale small is clearly above chance."""
    small = models[of_scale(models, SMALL)]
    found = []
    for key in keys:
        task = KNOWN_TASKS[key]
        # recall@1 among as many candidates as there are images
        chance = 1 / task.samples if task.kind == "retrieval" else task.chance
        margin = FAST_MARGIN * sampling_error(small[key])
        if chance is not None and small[key].min() >= chance + margin:
            found.append(key)
    return found


def choose_fast(models: pd.DataFrame, keys: Sequence[str]) -> list[tuple[float, tuple[str, ...]]]:
    """All subsets within the budget with their error in predicting the average, best first."""
    young = models[of_scale(models, SMALL, MEDIUM)]
    average = young.mean(axis=1).to_numpy()
    subsets = [
        subset
        for size in FAST_TASKS
        for subset in itertools.combinations(keys, size)
        if sum(KNOWN_TASKS[key].samples for key in subset) <= FAST_IMAGES
    ]
    return sorted(
        (leave_one_out_error(young[list(subset)].mean(axis=1).to_numpy(), average), subset)
        for subset in subsets
    )


def describe_mean(models: pd.DataFrame, tasks: pd.DataFrame, keys: Sequence[str]) -> str:
    """How a mean over tasks follows the average over 38, and its noise, as cells of a table."""
    members = list(keys)
    mean, average = models[members].mean(axis=1), models.mean(axis=1)
    scales = [of_scale(models, SMALL), of_scale(models, MEDIUM)]
    rest = ~(scales[0] | scales[1])
    ranks = [mean[rows].rank().corr(average[rows].rank()) for rows in (*scales, rest)]
    others = models.drop(columns=members)
    left_out = "-" if others.empty else f"{mean.rank().corr(others.mean(axis=1).rank()):.3f}"
    error = np.sqrt((tasks.loc[members, "error"] ** 2).sum()) / len(members)  # skips NaN
    epochs = float(consecutive_epochs(mean.to_frame("mean"))["mean"])
    miss = leave_one_out_error(mean.to_numpy(), average.to_numpy())
    images = sum(KNOWN_TASKS[key].samples for key in members)
    cells = [
        f"{len(members)}", f"{images:,}", *(f"{rank:.3f}" for rank in ranks), left_out,
        f"{100 * miss:.2f}", f"{100 * error:.3f}", f"{100 * epochs:.3f}",
        f"{1000 * error / mean.std():.1f}", f"{1000 * epochs / mean.std():.1f}",
    ]  # fmt: skip
    return " | ".join(cells)


def task_table(tasks: pd.DataFrame, fast: Sequence[str]) -> str:
    """The tasks as a markdown table, those that follow the rest best first."""
    lines = [
        "| task | n | sampling error | Spearman | Pearson | scatter | epochs | suite |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, row in tasks.sort_values("spearman", ascending=False).iterrows():
        error = "-" if np.isnan(row["error"]) else f"{100 * row['error']:.2f}"
        suite = "stable, fast" if key in fast else "stable" if row["stable"] else ""
        lines.append(
            f"| {KNOWN_TASKS[str(key)].title} | {row['samples']:,} | {error} "
            f"| {row['spearman']:.3f} | {row['pearson']:.3f} | {100 * row['scatter']:.0f} % "
            f"| {100 * row['epochs']:.2f} | {suite} |".replace(" |  |", " | |")
        )
    return "\n".join(lines)


def mean_table(models: pd.DataFrame, tasks: pd.DataFrame, suites: dict[str, Sequence[str]]) -> str:
    """One row a suite, see `describe_mean`."""
    head = (
        "mean of", "tasks", "images", "rank, small", "rank, medium", "rank, others",
        "rank, left-out tasks", "miss", "sampling error", "epochs", "sampling / spread",
        "epochs / spread",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {name} | {describe_mean(models, tasks, keys)} |" for name, keys in suites.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="open_clip's openclip_results.csv")
    models = read_models(parser.parse_args().results)
    tasks = measure_tasks(models)
    stable = list(tasks.index[tasks["stable"]])
    early = seen_early(models, stable)
    ranked = choose_fast(models, early)
    print(f"{len(models)} different models\n")
    print(task_table(tasks, ranked[0][1]), "\n")
    print(f"Early enough for `fast`: {', '.join(early)}; {len(ranked)} subsets.\n")
    for miss, subset in ranked[:5]:
        print(f"{100 * miss:.2f}  {', '.join(subset)}")
    suites: dict[str, Sequence[str]] = {
        "datacomp_38": list(tasks.index),
        "all but FMoW": [key for key in tasks.index if key != "wilds/fmow"],
        "stable": stable,
        "fast": ranked[0][1],
        "ImageNet": ["imagenet1k"],
    }
    print(f"\n{mean_table(models, tasks, suites)}")


if __name__ == "__main__":
    main()
