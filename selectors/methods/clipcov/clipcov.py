"""ClipCov: pairs that keep the image-text cross-covariance of each class (arXiv 2403.12267)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from siftclip.errors import (
    ParameterError,
    require_choice,
    require_finite,
    require_int_or_auto,
)
from siftclip.ranks import SCALE, sum_arrays
from siftclip.selectors.core.base import Choice, FeatureFile, Requirements, Selector, Source
from siftclip.selectors.core.rules import Of, top_fraction
from siftclip.selectors.core.source import IMAGE, TEXT, Cache, ReadsFeatures
from siftclip.selectors.fitting.clusters import Clustering
from siftclip.selectors.fitting.latent_classes import LatentClasses, find_classes, read_labels
from siftclip.selectors.kernels.blocks import require_same_width
from siftclip.selectors.kernels.most_similar import most_similar
from siftclip.selectors.methods.clipcov.greedy import (
    ClassState,
    GreedySchedule,
    advance,
    choose,
    merge_classes,
)
from siftclip.selectors.methods.clipcov.terms import (
    Centres,
    ClassSimilarities,
    Members,
    piece_terms,
)

_INTERVAL_OF_PICKS = 200 * 1000 / 283_780  # of a class: the notebook's, with its 1,000 classes


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialScores:
    """Terms of all members, before anything is picked."""

    cross: np.ndarray  # float64 [m]
    own: np.ndarray  # float64 [m], image-text similarity
    label: np.ndarray  # float64 [m]
    inter_class: np.ndarray  # float64 [m]
    image_low: np.ndarray  # bool [m], images with a similarity in their class below the threshold
    text_low: np.ndarray  # bool [m]


class ClipCov(ReadsFeatures, Selector):
    """Keep the pairs that a greedy choice takes, which scores each class again as it is used up.

    A sample i of class V scores at first

        cross_weight / |V| * sum_{j in V} (M_ij + M_ji) + self_weight * <v_i, t_i>
        + label_weight * <t_i, label> + inter_class_weight * (similarity to other classes)

    with M_ij = <v_i, t_j>, or 0 where that is at most `threshold`. After every `interval` picks in
    a class all of its members lose, for each new pick j, cross_weight / |V| * (M_ij + M_ji), and as
    a charge on the whole class cross_weight / |V| * cross_j and label_weight / |V| * label_j.

    The authors' notebook charges the cross terms of all picks of the class again at every update
    (`charge: cumulative`), keeps all M in memory, and sorts the whole pool at every update. This
    class needs the features of one class at a time and gives the same picks. A class of more than
    clipcov_terms.HELD_SAMPLES samples is read again at every update.
    """

    def __init__(
        self,
        *,
        features: str | None = None,
        fraction: float,
        of: Of = "pool",
        labels: FeatureFile | None = None,
        clustering: Clustering | None = None,
        interval: int | str = 200,
        charge: Literal["cumulative", "once"] = "cumulative",
        threshold: float | None = 0.0,
        cross_weight: float = 1.0,
        self_weight: float = 2.0,
        label_weight: float = 0.5,
        inter_class_weight: float = -1.0,
    ) -> None:
        """Set the objective, the classes and the schedule.

        Args:
            features: name of a feature set, such as `l14` for the keys `l14_img` and `l14_txt`;
                None: the one that it is used with.
            fraction: keep int(n * fraction) samples, in (0, 1].
            of: what n counts: the whole "pool", or what earlier stages have "left".
            labels: text features of class names; the class of a sample is the name nearest to its
                image. Exactly one of `labels` and `clustering` must be given.
            clustering: of images, whose clusters are the classes: `KMeans` or `GivenCentroids`.
            interval: picks in a class between updates; 1 keeps every score fresh: the exact greedy.
                "auto": in the ratio of the notebook, 200 where classes have 284 picks on average.
            charge: "cumulative", as released, or "once": each pick is charged once.
            threshold: similarities in a class of at most this count as zero; None: none does.
            cross_weight, self_weight, label_weight, inter_class_weight: of the terms; 0 leaves one
                out. `label_weight` must be 0 with `clustering`: clusters have no name.

        Raises:
            InputError: an option is out of range, or two contradict each other.
        """
        if (labels is None) == (clustering is None):
            raise ParameterError(
                "needs exactly one of labels and clustering",
                owner=self,
                value={"labels": labels, "clustering": clustering},
                got="neither" if labels is None else "both",
                way_out="Set the other to null.",
            )
        self.features = features
        self.rule = top_fraction(self, fraction, of)
        self.labels = labels
        self.clustering = clustering
        self.interval = require_int_or_auto("interval", interval, owner=self)
        self.charge = require_choice("charge", charge, ("cumulative", "once"), owner=self)
        self.threshold = None
        if threshold is not None:
            self.threshold = require_finite("threshold", threshold, owner=self)
        self.cross_weight = require_finite("cross_weight", cross_weight, owner=self)
        self.self_weight = require_finite("self_weight", self_weight, owner=self)
        self.label_weight = require_finite("label_weight", label_weight, owner=self)
        self.inter_class_weight = require_finite(
            "inter_class_weight", inter_class_weight, owner=self
        )
        if labels is None and self.label_weight != 0:
            raise ParameterError(
                "must be 0 with clustering, because clusters have no name",
                owner=self,
                parameter="label_weight",
                value=self.label_weight,
            )

    @property
    def requires(self) -> Requirements:
        files = () if self.labels is None else (self.labels,)
        return Requirements(
            features=self.feature_keys(IMAGE, TEXT),
            files=files if self.clustering is None else self.clustering.files(),
        )

    @torch.no_grad()
    def select(self, source: Source) -> Choice:
        """Find the classes, score all samples, and pick."""
        cache = source.cache(self)
        classes, names = self._find_classes(source, cache)
        members = Members.of(source, classes)
        kept = np.zeros(len(source), dtype=np.int64)
        scores = np.full(len(source), np.nan, dtype=np.float32)
        if len(members.rows):
            terms = self._score(source, cache, members, classes, names)
            initial = self._weigh(terms)
            scores[members.index] = initial
            budget = min(self.rule.asked_samples(len(source), len(source.whole)), len(members.rows))
            kept[members.index[self._pick(source, cache, members, terms, initial, budget)]] = 1
        return Choice(multiplicities=kept, scores=scores)

    def _find_classes(self, source: Source, cache: Cache) -> tuple[LatentClasses, Tensor | None]:
        """Find the class of each sample, and read the features of class names, float32 [c, d]."""
        names = None if self.labels is None else read_labels(self, source, self.labels)
        if names is not None:
            centres = names
        elif self.clustering is not None:
            centres = self.clustering.centroids(source, self.requires.features[0])

        def nearest(image: Tensor) -> Tensor:
            centre = "the centroids" if names is None else "the class names"
            require_same_width("the features", image, centre, centres)
            return most_similar(image, centres)[0]

        latent = find_classes(source, cache, self.requires, classes=len(centres), nearest=nearest)
        return latent, names

    def _score(
        self,
        source: Source,
        cache: Cache,
        members: Members,
        classes: LatentClasses,
        names: Tensor | None,
    ) -> InitialScores:
        """Compute the terms of all members, on every rank; the ranks share the pieces."""
        images, texts = classes.image_means, classes.text_means
        other_images, other_texts = classes.other_means()
        centres = [
            Centres(
                image=images[label],
                text=texts[label],
                other_image=other_images[label],
                other_text=other_texts[label],
                label=None if names is None else names[label],
            )
            for label in members.labels.tolist()
        ]
        pieces = members.pieces()
        mine = list(range(source.ranks.rank, len(pieces), source.ranks.size))
        linear = np.zeros((4, len(members.rows)))
        low_sums = np.zeros(len(members.rows), dtype=np.int64)
        flags = np.zeros((2, len(members.rows)), dtype=np.int32)
        with source.bar(sum(pieces[i][1] - pieces[i][0] for i in mine), "ClipCov terms") as bar:
            for number in mine:
                begin, end = pieces[number]
                answer = cache.get(f"terms-{number}")
                if answer is None:
                    threshold = self.threshold if self.cross_weight else None
                    answer = piece_terms(
                        source, self.requires, members, centres, pieces[number], threshold
                    )
                    cache.put(f"terms-{number}", **answer)
                base = int(members.starts[members.classes[begin]])
                span = slice(base, base + len(answer["low_sums"]))
                linear[:, begin:end] = answer["linear"]
                low_sums[span] += answer["low_sums"]
                flags[:, span] += np.stack([answer["image_low"], answer["text_low"]])
                bar.update(end - begin)
        linear = sum_arrays(source.ranks, linear)  # only one rank's is not zero in any place
        low_sums, flags = sum_arrays(source.ranks, low_sums), sum_arrays(source.ranks, flags)
        low = low_sums / SCALE / np.diff(members.starts)[members.classes]
        return InitialScores(
            cross=linear[0] - low,
            own=linear[1],
            label=linear[2],
            inter_class=linear[3],
            image_low=flags[0] > 0,
            text_low=flags[1] > 0,
        )

    def _weigh(self, terms: InitialScores) -> np.ndarray:
        """Weigh the terms into the initial scores, float64 [m]."""
        return (
            self.cross_weight * terms.cross
            + self.self_weight * terms.own
            + self.label_weight * terms.label
            + self.inter_class_weight * terms.inter_class
        )

    def _pick(
        self,
        source: Source,
        cache: Cache,
        members: Members,
        terms: InitialScores,
        initial: np.ndarray,
        budget: int,
    ) -> np.ndarray:
        """Pick the members that are kept, in the order of picking: int64 [budget]."""
        scaled = max(1, round(_INTERVAL_OF_PICKS * budget / len(members.labels)))
        interval = self.interval if isinstance(self.interval, int) else scaled
        schedule = GreedySchedule(
            interval=interval,
            cumulative=self.charge == "cumulative",
            cross_weight=self.cross_weight,
            label_weight=self.label_weight,
            nonnegative=self.cross_weight >= 0
            and self.threshold is not None
            and self.threshold >= 0,
        )
        state = cache.get("picks") or {
            "scores": initial,
            "numbers": np.zeros(len(initial), dtype=np.int32),
            "values": np.zeros(len(initial)),
        }
        state = {name: array.copy() for name, array in state.items()}
        sizes = np.diff(members.starts)

        def advance_all(until: float, classes: np.ndarray) -> None:
            # Large classes first, so that no rank gets all of them.
            order = classes[np.argsort(-sizes[classes], kind="stable")]
            mine = order[source.ranks.rank :: source.ranks.size]
            with source.bar(int(sizes[mine].sum()), "ClipCov picks") as bar:
                for number in mine.tolist():
                    at = slice(int(members.starts[number]), int(members.starts[number + 1]))
                    similarities = ClassSimilarities(
                        source,
                        self.requires,
                        members.rows[at],
                        threshold=self.threshold,
                        image_low=terms.image_low[at],
                        text_low=terms.text_low[at],
                    )
                    state_of_class = ClassState(
                        cross=terms.cross[at],
                        label=terms.label[at],
                        **{name: array[at] for name, array in state.items()},
                    )
                    advance(state_of_class, similarities, schedule, until=until)
                    bar.update(at.stop - at.start)
            # In each place one rank alone adds what it has: the one that had the class, or rank 0.
            given = np.isin(members.classes, mine)
            if source.ranks.rank == 0:
                given |= ~np.isin(members.classes, order)
            for array in state.values():
                array[:] = sum_arrays(source.ranks, np.where(given, array, 0))
            if source.ranks.rank == 0:
                cache.put("picks", **{name: array.copy() for name, array in state.items()})

        choose(
            state["scores"],
            state["numbers"],
            members.starts,
            budget=budget,
            advance_all=advance_all,
        )
        picked: np.ndarray = np.flatnonzero(state["numbers"])
        order = merge_classes(
            state["values"][picked],
            members.uid_ranks[picked],
            members.classes[picked],
            state["numbers"][picked],
        )
        picked = picked[order[:budget]]
        most = int(np.bincount(members.classes[picked]).max(initial=0))
        if budget and most + 1 < interval:
            source.warn(
                f"ClipCov: no class has interval={interval} picks (the most are {most}), so that "
                "no score was ever updated: these are the best by their first scores. Let interval "
                f"be auto ({scaled} here)"
            )
        return picked
