"""Read images from memory, folders and tar shards, transform and load them. Needs `pip install 'fastroute[train]'`."""

from fastroute._extras import extra

with extra("train", "fastroute.data"):
    from fastroute.data.module import ImageDataModule

__all__ = ["ImageDataModule"]
