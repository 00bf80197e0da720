"""Half of a data set's classes: `<data set>/even` and `<data set>/odd`, by label, in the data set's own label order.

So a model can learn the names of one half and be judged, zero-shot, on the other half, with any command that takes
a data set. Source: base and new classes of CoCoOp (Zhou et al. 2022, section 4.1): each half is judged among its own
names. Deviation: every second class in place of the first and the second half.
"""

from dataclasses import replace

from patchrank.data.dataset import Dataset
from patchrank.errors import UserError

HALVES = {"even": 0, "odd": 1}
"""Name of a half -> remainder of its labels divided by two."""


def half_of(dataset: Dataset, half: str) -> Dataset:
    """The classes of one half, labelled 0, 1, ... in their order, under the name `<data set>/<half>`.

    Raises: UserError for an unknown half, or a data set without classes.
    """
    name = f"{dataset.name}/{half}"
    if half not in HALVES:
        raise UserError(f"data set {name!r}: no such half; choose {dataset.name}/even or {dataset.name}/odd")
    if len(dataset.class_names) < 2:
        raise UserError(f"data set {name!r}: {dataset.name} has no classes to halve; leave /{half} out")
    first = HALVES[half]
    own = [item for item in dataset.images if item.label is not None and item.label % 2 == first]
    images = [replace(item, label=item.label // 2) for item in own]
    source = f"{dataset.split_source}, {half} labels"
    return replace(dataset, name=name, images=images, class_names=dataset.class_names[first::2], split_source=source)
