"""One folder of masks for each class: masks/NAME/STEM.png, whose classes may overlap."""

from collections import defaultdict
from pathlib import Path

from classes import Classes, ClassMasks, sort_values
from folders import ImageFile
from images import Collection
from layouts import Pairs, check_names, collect, images_and_masks, match, one_split
from masks import MaskFile


def class_folders(root: Path, masks: str, target: str, training: bool) -> Collection | None:
    """Images with one folder of masks for each class; a class without a mask is empty.

    Folders that are named like images or like folders of images are no classes.
    """
    if "{stem}" in masks:
        return None
    images, others, _ = one_split(*images_and_masks(root, masks), masks, training)
    folders: dict[str, list[ImageFile]] = defaultdict(list)
    for mask in others:
        above = [folder.name for folder in mask.path.parents]
        own = mask.place[-1:] == (above[0],)  # else the name is that of a split, or of all masks
        if not own or Path(mask.role).name not in above[1:]:
            return None
        folders[above[0]].append(mask._replace(place=mask.place[:-1]))
    taken = {image.stem for image in images} | {name for image in images for name in image.place}
    if len(folders) < 2 or taken & set(folders):
        return None
    found = {name: match(images, files) for name, files in folders.items()}
    if any(len(found[name]) < len(files) for name, files in folders.items()):
        return None
    check_names(images)
    return collect_classes(root, images, found)


def collect_classes(root: Path, images: list[ImageFile], found: dict[str, Pairs]) -> Collection:
    """The samples, of the pairs of each class."""
    names = sort_values(found)
    united: Pairs = defaultdict(list)
    for name in names:
        for image, files in found[name].items():
            united[image] += files
    collection, classes, missing = collect(root, images, united), Classes(names, names), 0
    masks: list[ClassMasks | None] = []
    for image in images:
        files = [found[name].get(image.name) for name in names]
        parts = tuple(file and MaskFile(file[0].path, image=image.path) for file in files)
        masks.append(ClassMasks(parts, classes) if any(parts) else None)
        missing += sum(part is None for part in parts) if any(parts) else 0
    if missing:
        print(f"classes: {missing} masks of a class are not there, they are read as empty")
    collection.samples["mask"] = masks
    return collection._replace(name="one folder of masks per class")
