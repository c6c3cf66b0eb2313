"""The purposes that random numbers are drawn for: one number each, here and nowhere else.

One seed serves many uses. A purpose in what a stream of random numbers begins with keeps the uses
apart: else a sample that a selector draws at random would be in the sub-batch of its sampler, too.
A number decides about all that is drawn for it, and never changes. Selectors' answers depend on
this module, so that `make same-answers` follows an edit.
"""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class HashPurpose(IntEnum):
    """Purposes of hashes, see `siftclip.hashing`: joined with the seed by `^`, or by `+`.

    The numbers are large, so that no seed that people choose leads from one to another.
    """

    NOISE = 0x5AFE_C0DE_D1CE_0001  # noise on the scores of samplers
    UNIFORM_PART = 0x756E69666F726D  # the samples of a sub-batch that no score decides about
    KMEANS = 0x6B6D65616E73  # the samples that k-means learns from and begins with
    NEGCLIPLOSS_BLOCKS = 0x6E65676C6F7373  # the blocks in which negCLIPLoss contrasts samples
    NORMSIM_D = 0x5D << 40  # the samples of the covariance of each step of NormSim-D
    CANDIDATES = 0x73616D706C65  # the part of the pool that a selection in the loop chooses from
    VERSION = 0x76657273  # names of the samples for each selection in the loop, from its number
    STEP = 0x7375706572  # names of the samples of each super-batch, from the step
    BOOTSTRAP = 0x0B00_7572_A900_0001  # how often each unit is in a resample
    PERMUTATION = 0x0B00_7572_A900_0002  # which paired outcomes are swapped
    SUBSET_SAMPLE = 0x7375_6273_6574  # the draws, with replacement, of a sample of a subset


@unique
class GeneratorPurpose(IntEnum):
    """Purposes of generators: a word of `derive_generator` or `derive_seeds`, after the seed."""

    ORDER = 1  # the order of each pass over a selection
    SUBSTITUTE = 2  # what replaces bad samples
    AUGMENT = 3  # the random crop and the like of each sample that is read
    STEP = 4  # dropout of a training step
    BENCH = 5  # what `data_bench` reads
    SCORING = 6  # dropout while a super-batch is scored
    VALIDATION = 11  # the samples that a linear probe holds out of train
    SHOTS = 12  # the samples of few-shot probes
    ARM_MEANS = 13  # the true means of arms of a comparison, to count how often each is best
    GALLERY = 14  # the samples that a page shows
