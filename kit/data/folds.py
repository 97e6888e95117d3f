"""Folds: what belongs together stays in one, and no fold lacks what the others have."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from kit.data.names import tail_of
from kit.errors import UserError, closest, first_five

FEWEST, SHUFFLES = 5, 10  # folds, and splits that are tried, until no fold lacks a class
BLOCK = 8  # consecutive frames show one street: they stay in one fold (fewer where images are few)


def assign_folds(
    samples: pd.DataFrame,
    folds: int,
    seed: int,
    group: str = "",
    names: tuple[str, ...] = ("foreground",),
) -> pd.DataFrame:
    """Split the samples of `scan` into folds; what belongs together (a group) stays in one.

    Returns `fold` (int), `group`, and `why` it is one, for each sample; prints the groups, and what
    a fold lacks of the classes' `names`. A given column `fold` is taken as it is, else the first of
    `possible_groups` that leaves no fold without foreground. Few samples make fewer folds, at least
    two. Raises UserError.
    """
    if "fold" in samples:
        groups, why, fold = [""] * len(samples), "split as given", samples.fold.to_numpy()
        check_volumes(samples)
    else:
        for groups, why in possible_groups(samples, folds, group):
            fold = split(samples, groups, folds, seed)
            together = len(set(groups)) < len(samples)
            reason = f"{why}: {len(set(groups))}, such as {groups[0]}" if together else why
            if occurrence(samples, fold).any(axis=1).nunique() == 1:
                break
        print(f"groups: {reason}")
    there, sizes = occurrence(samples, fold), np.unique(fold, return_counts=True)[1]
    large = "fold" not in samples and 2 * sizes.max() > len(samples) > 3
    uneven = " (uneven: the groups are large)" if large else ""
    print(f"split: {len(sizes)} folds of {sizes.min()} to {sizes.max()} images{uneven}")
    for index, name in enumerate(names):
        if there[index].any() and not there[index].all():
            count = sum(shares[index] > 0 for shares in samples.shares)
            lacks = f"split: no {name} in fold {first_five(there.index[~there[index]])}"
            print(f"{lacks}: {count} images have it; groups: {why}")
    return pd.DataFrame({"fold": fold, "group": groups, "why": why}, index=samples.index)


def split(samples: pd.DataFrame, groups: list[str], folds: int, seed: int) -> np.ndarray:
    """The fold of each sample, int (n,): the first shuffle whose folds lack no class.

    Fewer folds are made where fewer groups have foreground, or down to `FEWEST` a class.
    Stratified by category, or where there is none by the rarest class of an image, or for one class
    by the foreground's share: empty, little, more, much. The groups are shuffled here, because
    the shuffle of scikit-learn 1.6, which Kaggle has, loses the strata.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # here: slow, infer.py needs none

    strata = samples.category
    if not strata.any():
        strata = pd.Series(strata_of_shares(samples))
    there = occurrence(samples, np.array(groups))
    present = there.sum()  # groups of each class
    if present.any():
        folds = min(folds, there.any(axis=1).sum(), max(FEWEST, present[present > 0].min()))
    most = max(2, min(folds, len(there), samples.category.value_counts().max()))
    best, least = np.zeros(len(samples), int), math.inf
    names, group = np.unique(groups, return_inverse=True)
    for count in range(most, min(FEWEST, most) - 1, -1):
        even = strata if strata.value_counts().max() >= count else np.zeros(len(samples), int)
        for shuffle in range(SHUFFLES):
            fold = np.zeros(len(samples), int)
            order = np.random.RandomState(seed + 1000 * shuffle).permutation(len(names))
            splits = StratifiedGroupKFold(count).split(samples, even, order.argsort()[group])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # few images of a category are fine
                for number, (_, validates) in enumerate(splits):
                    fold[validates] = number
            lacking = (count - occurrence(samples, fold).sum())[present > 0]
            if lacking.sum() < least:
                best, least = fold, lacking.sum()
            if (lacking <= (count - present[present > 0]).clip(lower=0)).all():  # cannot be better
                return best
    return best


def occurrence(samples: pd.DataFrame, fold: np.ndarray) -> pd.DataFrame:
    """Whether a fold has a class: a row for each fold, a bool column for each class."""
    return pd.DataFrame(np.stack(samples.shares) > 0).groupby(fold).any()


# --------------------------------------------------------------------------------------------------
#  Groups: what stays in one fold
# --------------------------------------------------------------------------------------------------

SIDES = {"left", "right", "l", "r", "od", "os"}  # fields of names
MANY = 8  # groups that are told by names: fewer are rather kinds than patients


def possible_groups(
    samples: pd.DataFrame, folds: int, column: str
) -> Iterator[tuple[list[str], str]]:
    """A group for each sample, and how it was told; the surest first. Raises UserError.

    The csv's `column`, the samples' own column `group`, else folders or names that look like a
    patient's, a slide's or a sequence's, `BLOCK` consecutive numbers, each image by itself.
    """
    names, alone = samples.id.tolist(), "each image by itself"
    if column == "none":
        yield names, f"{alone} (--group none)"
        return
    if column or "group" in samples:
        values = columns_of(samples, column) if column else samples.group
        groups = [value or f"no group: {name}" for value, name in zip(values, names, strict=True)]
        if len(set(groups)) < 2:
            problem = f"all {len(names)} images have the value {groups[0]}"
            raise UserError(f"--group {column or 'group'}", problem, "take --group none")
        yield groups, f"column {column or 'group'}"
        return
    candidates = guess_groups(samples, folds)
    yield from whole_volumes(candidates, samples, folds) if "volume" in samples else candidates


def guess_groups(samples: pd.DataFrame, folds: int) -> Iterator[tuple[list[str], str]]:
    """What folders and names say, see `possible_groups`."""
    names = samples.id.tolist()
    if not samples.category.any():
        for groups in folder_groups(samples):
            yield groups, "by folder (--group none: no groups)"
        groups = name_groups(names)
        if groups:
            yield groups, "by the start of the name (--group none: no groups)"
    length = max(1, min(BLOCK, samples.category.value_counts().min() // folds))
    parts = [re.fullmatch(r"(.*?)(\d*)", name, re.DOTALL) for name in names]
    blocks = [f"{part[1]}{int(part[2] or 0) // length}" for part in parts]
    if len(set(blocks)) < len(names):
        yield blocks, f"{length} consecutive numbers (--group none: no groups)"
    yield names, "each image by itself"


def whole_volumes(
    candidates: Iterable[tuple[list[str], str]], samples: pd.DataFrame, folds: int
) -> Iterator[tuple[list[str], str]]:
    """The groups in which volumes stay whole, then the volumes; of a single one its blocks."""
    volumes = samples.volume.where(samples.volume != "", samples.id)
    for groups, why in candidates:
        if pd.Series(groups, volumes.index).groupby(volumes).nunique().max() == 1:
            yield groups, f"{why}, volumes stay whole"
    if volumes.nunique() > 1:
        yield volumes.tolist(), "a volume stays in one fold (--group none: no groups)"
        return
    length = max(1, len(samples) // folds)
    blocks = (samples["slice"].rank(method="first").astype(int) - 1) // length
    yield blocks.astype(str).tolist(), f"one volume alone, {length} consecutive slices"


def check_volumes(samples: pd.DataFrame) -> None:
    """Raise UserError where a volume is in several of the folds that are given."""
    parts = samples[samples.get("volume", "") != ""] if "volume" in samples else samples[:0]
    parts = parts.groupby("volume").fold.nunique() if len(parts) else pd.Series(dtype=int)
    wrong = first_five(parts.index[parts > 1])
    if wrong:
        problem = f"volumes are in several folds: {wrong}"
        raise UserError("--data", problem, "a volume has one fold: its slices are alike")


def folder_groups(samples: pd.DataFrame) -> Iterator[list[str]]:
    """The folders that look like those of patients: with numbers, or many of few images each.

    Most have foreground. The outermost folders first.
    """
    places = [place.split("/") for place in samples.get("folder", [])]
    for depth in range(1, 1 + max(map(len, places), default=0)):
        groups = ["/".join(place[:depth]) for place in places]
        filled = (samples.share > 0).groupby(groups).any()
        looks = numbered(filled.index) or len(filled) >= max(MANY, len(groups) / len(filled))
        if looks and 1 < len(filled) < len(groups) and 2 * filled.sum() > len(filled):
            yield groups


def numbered(groups: Iterable[str]) -> bool:
    """Whether most names of groups have a number, as patients have and kinds do not."""
    return np.mean([re.search(r"\d", name) is not None for name in groups]) > 0.5


def name_groups(names: list[str]) -> list[str] | None:
    """Groups by the start of names that most share with another: views, slices, tiles, copies.

    A name that others go on from, such as img3 of img3_aug1. Otherwise all fields but the last
    ones, such as p3 of p3_slice_12, where there are `MANY`; or few of tiles, which have two numbers
    at their ends; or without a side (left_3).
    """
    stems = set(names)
    copies = [name.removesuffix(tail_of(name, stems)) for name in names]
    if siblings(copies) > 0.5:
        return copies
    fields = [re.split(r"[\W_]+", name) for name in names]
    if all(field[0].lower() in SIDES for field in fields):
        fields = [[*field[1:], field[0]] for field in fields]
    best = None
    for count in range(1, max(map(len, fields))):
        groups = ["_".join(field[:-count] or field) for field in fields]
        number = len(set(groups))
        many = number >= MANY and (numbered(groups) or number**2 >= len(names))
        tiles = best and count == 2 and all("".join(field[-2:]).isdecimal() for field in fields)
        if siblings(groups) > 0.5 and (many or (tiles and number > 1)):
            best = groups
    return best


def siblings(groups: list[str]) -> float:
    """The share of samples whose group has another one."""
    counts = Counter(groups)
    return np.mean([counts[group] > 1 for group in groups])


def strata_of_shares(samples: pd.DataFrame) -> np.ndarray:
    """A stratum for each sample, int (n,): the rarest class in it, or how much foreground it has.

    The rarest is the class that the fewest images have.
    """
    shares = np.array(samples.shares.tolist())
    if shares.shape[1] == 1:
        thirds = samples.share.rank(pct=True).mul(3).round()
        return np.where(samples.share > 0, thirds, -1)
    images = (shares > 0).sum(0)
    rank = np.where(shares > 0, images, len(shares) + 1)
    return np.where((shares > 0).any(1), rank.argmin(1), -1)


def columns_of(samples: pd.DataFrame, column: str) -> list[str]:
    """A column of the csv, for each sample; the id where it has no row. Raises UserError."""
    header = next((list(fields) for fields in samples.fields if fields), [])
    if column not in header:
        raise UserError(f"--group {column}", "no such column", closest(column, header))
    pairs = zip(samples.fields, samples.id, strict=True)
    return [fields[column] if fields else name for fields, name in pairs]


def chosen_folds(samples: pd.DataFrame, fold: int | str) -> list[int | str]:
    """The folds to train: one, all, or "none". Raises UserError for one that there is not."""
    numbers = sorted(set(samples.fold))
    if fold not in ("all", "none", *numbers):
        raise UserError(
            f"--fold {fold}", f"{len(samples)} pairs have folds {first_five(numbers)}, or all"
        )
    return numbers if fold == "all" else [fold]


def describe_folds(samples: pd.DataFrame, fold: int | str) -> str:
    """How many pairs train and validate, in one line; of `fold` "none" none validates."""
    count, extra = int((samples.fold == fold).sum()), int((samples.fold < 0).sum())
    own = len(samples) - extra
    few = ": few to train on, see the groups" if 2 * count > own else ""
    more = f" (and {extra} of --extra)" if extra else ""
    return f"fold {fold}: {own - count} pairs to train{more} and {count} to validate on{few}"
