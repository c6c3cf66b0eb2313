"""The 40 tasks of DataComp: what they are called on disk, how each is scored, how large it is.

38 have a main metric and make up the average; FairFace and UTKFace are outside of it. Keys, titles,
main metrics, sizes and chance levels are those of DataComp's task list (Gadre et al.,
arXiv 2304.14108), but for two chance levels, see `KnownTask.chance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["imagenet", "imagenet_shifts", "vtab", "retrieval", "wilds", "fairness", "other"]
KnownKind = Literal["classification", "retrieval", "association"]
Special = Literal["iwildcam", "camelyon17", "fmow", "dollar_street", "geode", "faces"]
METADATA_ONLY: frozenset[str | None] = frozenset({"faces"})  # whose samples have no labels

FOLDER_PREFIX, FOLDER_SUFFIX = "wds_", "_test"
FAIRNESS_PREFIX = "fairness/"  # not part of the names of folders


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownTask:
    """One task of DataComp's list."""

    key: str  # as in DataComp's results, with slashes
    title: str
    family: Family  # where it stands in a printed table; each task in one
    main_metric: str | None = "acc1"  # None: outside the average
    kind: KnownKind = "classification"
    special: Special | None = None  # whose labels or metadata need metrics of their own
    # Images; instances of several images for "association". Captions are not counted.
    samples: int
    classes: int | None = None
    # What guessing by the frequency of the classes scores on the main metric. None where the task
    # list has none, and for iWildCam and FMoW, where its number is the accuracy over all images
    # and not macro F1 and the worst region.
    chance: float | None = None
    repository: str  # of the data, on the Hugging Face hub

    @property
    def folder(self) -> str:
        """The name of its folder on disk, as DataComp's download makes it."""
        return _folder(self.key)


def _folder(key: str) -> str:
    name = key.removeprefix(FAIRNESS_PREFIX).replace("/", "-")
    return f"{FOLDER_PREFIX}{name}{FOLDER_SUFFIX}"


def _classified(
    key: str,
    title: str,
    family: Family,
    samples: int,
    classes: int | None,
    chance: float | None,
    main_metric: str | None = "acc1",
    special: Special | None = None,
) -> KnownTask:
    return KnownTask(
        key=key,
        title=title,
        family=family,
        main_metric=main_metric,
        special=special,
        samples=samples,
        classes=classes,
        chance=chance,
        repository=f"djghosh/{_folder(key)}",
    )


_RECALL = "mean_per_class_recall"

_TASKS = (
    _classified("imagenet1k", "ImageNet 1k", "imagenet", 50_000, 1000, 0.001),
    _classified("imagenet_sketch", "ImageNet Sketch", "imagenet_shifts", 50_889, 1000, 0.001),
    _classified("imagenetv2", "ImageNet v2", "imagenet_shifts", 10_000, 1000, 0.001),
    _classified("imagenet-a", "ImageNet-A", "imagenet_shifts", 7500, 200, 0.008056),
    _classified("imagenet-o", "ImageNet-O", "imagenet_shifts", 2000, 200, 0.006047),
    _classified("imagenet-r", "ImageNet-R", "imagenet_shifts", 30_000, 200, 0.006163),
    _classified("objectnet", "ObjectNet", "imagenet_shifts", 18_574, 113, 0.009481),
    _classified("vtab/caltech101", "Caltech-101", "vtab", 6085, 102, 0.009804, _RECALL),
    _classified("vtab/cifar100", "CIFAR-100", "vtab", 10_000, 100, 0.01),
    _classified("vtab/clevr_count_all", "CLEVR Counts", "vtab", 15_000, 8, 0.125061),
    _classified(
        "vtab/clevr_closest_object_distance", "CLEVR Distance", "vtab", 15_000, 6, 0.19052
    ),
    _classified("vtab/dtd", "Describable Textures", "vtab", 1880, 47, 0.021277),
    _classified("vtab/eurosat", "EuroSAT", "vtab", 5400, 10, 0.101483),
    _classified("vtab/flowers", "Oxford Flowers-102", "vtab", 6149, 102, 0.009804, _RECALL),
    _classified(
        "vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", "vtab", 711, 4, 0.295289
    ),
    _classified("vtab/pcam", "PatchCamelyon", "vtab", 32_768, 2, 0.5),
    _classified("vtab/pets", "Oxford-IIIT Pet", "vtab", 3669, 37, 0.027027, _RECALL),
    _classified("vtab/resisc45", "RESISC45", "vtab", 6300, 45, 0.022342),
    _classified("vtab/svhn", "SVHN", "vtab", 26_032, 10, 0.117897),
    _classified("sun397", "SUN397", "vtab", 108_754, 397, 0.004645),
    KnownTask(
        key="retrieval/flickr_1k_test_image_text_retrieval",
        title="Flickr",
        family="retrieval",
        main_metric="mean_recall@1",
        kind="retrieval",
        samples=1000,
        repository="nlphuji/flickr_1k_test_image_text_retrieval",
    ),
    KnownTask(
        key="retrieval/mscoco_2014_5k_test_image_text_retrieval",
        title="MSCOCO",
        family="retrieval",
        main_metric="mean_recall@1",
        kind="retrieval",
        samples=5000,
        repository="nlphuji/mscoco_2014_5k_test_image_text_retrieval",
    ),
    KnownTask(
        key="misc/winogavil",
        title="WinoGAViL",
        family="retrieval",
        main_metric="jaccard_score_10-12",
        kind="association",
        samples=3563,
        chance=0.205,
        repository="nlphuji/winogavil",
    ),
    _classified(
        "wilds/iwildcam", "iWildCam", "wilds", 42_791, 182, None, "F1-macro_all", "iwildcam"
    ),
    _classified(
        "wilds/camelyon17", "Camelyon17", "wilds", 85_054, 2, 0.5, special="camelyon17"
    ),
    _classified("wilds/fmow", "FMoW", "wilds", 22_108, 62, None, "acc_worst_region", "fmow"),
    _classified(
        "fairness/dollar_street", "Dollar Street", "fairness", 3503, 58, None, "acc_top5_wg",
        "dollar_street",
    ),
    _classified("fairness/geode", "GeoDE", "fairness", 12_488, 40, None, "acc_wg", "geode"),
    _classified("fairness/fairface", "FairFace", "fairness", 10_954, None, None, None, "faces"),
    _classified("fairness/utkface", "UTKFace", "fairness", 23_703, None, None, None, "faces"),
    _classified("cifar10", "CIFAR-10", "other", 10_000, 10, 0.1),
    _classified("country211", "Country211", "other", 21_100, 211, 0.004739),
    _classified("fgvc_aircraft", "FGVC Aircraft", "other", 3333, 100, 0.01, _RECALL),
    _classified("food101", "Food-101", "other", 25_250, 101, 0.009901),
    _classified("gtsrb", "GTSRB", "other", 12_630, 43, 0.037604),
    _classified("mnist", "MNIST", "other", 10_000, 10, 0.10035),
    _classified("voc2007", "Pascal VOC 2007", "other", 14_976, 20, 0.154038),
    _classified("renderedsst2", "Rendered SST2", "other", 1821, 2, 0.500001),
    _classified("cars", "Stanford Cars", "other", 8041, 196, 0.00516),
    _classified("stl10", "STL-10", "other", 8000, 10, 0.1),
)  # fmt: skip

KNOWN_TASKS: dict[str, KnownTask] = {task.key: task for task in _TASKS}
_BY_NAME = {task.key.replace("/", "-"): task for task in _TASKS} | {
    task.key.removeprefix(FAIRNESS_PREFIX).replace("/", "-"): task for task in _TASKS
}


def known_task(folder_name: str) -> KnownTask | None:
    """Return the task of DataComp whose folder this is, or None.

    Args:
        folder_name: DataComp's `wds_vtab-dtd_test`, clip_benchmark's `wds_vtab-dtd`, the bare
            `vtab-dtd`, or the key `vtab/dtd`. `fairness-` before the name may be there or not.
    """
    name = folder_name.removeprefix(FOLDER_PREFIX).removesuffix(FOLDER_SUFFIX)
    return _BY_NAME.get(name.replace("/", "-"))
