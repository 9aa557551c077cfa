"""Images in memory, folders and tar shards, transforms and loaders. Needs `pip install 'fastroute[train]'`."""

from fastroute._extras import extra

with extra("train", "fastroute.data"):
    from fastroute.data.module import ImageDataModule

__all__ = ["ImageDataModule"]
