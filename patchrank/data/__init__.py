"""Pictures, labels and captions: `load_dataset(name)` reads one row of the catalog, `batches` feeds a tower."""

from patchrank.data.catalog import CATALOG
from patchrank.data.dataset import BrokenImage, Dataset, Item, batches, few_shot
from patchrank.data.load import load_dataset

__all__ = ["CATALOG", "BrokenImage", "Dataset", "Item", "batches", "few_shot", "load_dataset"]
