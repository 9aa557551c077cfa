"""Choose the images to evaluate a trained network on: those on the command line, or else those of its run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Chosen(NamedTuple):
    """The chosen images.

    Attributes:
        dataset, data_dir: as `validation_loader` takes them.
        options: further arguments of `validation_loader`.
        line: a line that says which images they are.
    """

    dataset: str
    data_dir: Path | None
    options: dict[str, Any]
    line: str


def choose_images(data: Mapping[str, Any], dataset: str | None, data_dir: Path | None) -> Chosen:
    """Choose the images of a command.

    Args:
        data: the checkpoint's state of `ImageDataModule`; empty if it has none.
        dataset, data_dir: as on the command line. A folder alone determines the dataset; without both, they are those
            of the run.

    Returns:
        the images.

    Raises:
        FileNotFoundError: the folder of the run is gone, or the given one has no images.
        ValueError: neither the command line nor the checkpoint names a dataset.
    """
    from fastroute.data.layout import expanded

    own, remembered = data.get("dataset"), data.get("data_dir")
    if dataset is None and data_dir is not None:
        dataset = _held(data_dir, own)
    dataset = dataset or own
    if dataset is None:
        raise ValueError(
            "dataset is missing, and the checkpoint does not say which one it was trained on: give --dataset"
        )
    if dataset == "digits" and data_dir is not None:
        raise ValueError(f"data_dir is {data_dir}; the dataset 'digits' is scikit-learn's own and reads no folder")
    as_trained = dataset == own and (data_dir is None or _same(data_dir, remembered))
    if as_trained and data_dir is None and remembered is not None:
        data_dir = Path(remembered)
        if expanded(data_dir) is None and not data_dir.exists():
            raise FileNotFoundError(f"data_dir is {data_dir}, as in training; there is no such folder: give --data-dir")
    options = {}
    if dataset == own:
        classes = data["classes"] if data.get("class_map") else None
        names = ("interpolation", "in_chans", "input_key", "on_bad_image")
        options = {name: data[name] for name in names if data.get(name) is not None} | {"classes": classes}
    share = data.get("val_split", 0.0) if as_trained else 0.0
    if share:
        options |= {"val_split": share, "split_seed": data["split_seed"]}
    where = "" if data_dir is None else f" in {data_dir}"
    aside = f", the {share:.0%} that seed {data['split_seed']} sets aside" if share else ""
    return Chosen(dataset, data_dir, options, f"images: {dataset}{where}{aside}{', as in training' * as_trained}")


def _held(data_dir: Path, own: str | None) -> str:
    """Return the dataset of a folder: that of the run if the folder has it, or else the one it has."""
    from fastroute.data.layout import choose, layouts

    held = [layout.dataset for layout in layouts(data_dir)]
    if own in held:
        return own
    if not held and own not in (None, "digits"):
        return own  # its reader says what is missing
    return choose(data_dir, any_split=True).dataset


def _same(data_dir: Path, remembered: str | None) -> bool:
    if remembered is None:
        return False
    try:
        return os.path.samefile(data_dir, remembered)
    except OSError:  # such as of a pattern of tar files
        return os.path.abspath(data_dir) == remembered


def check_fit(data: Mapping[str, Any], images: Chosen, classes: list[str], count: int) -> None:
    """Check that images fit the training of a network, as far as their classes and number tell.

    Args:
        data: the checkpoint's state of `ImageDataModule`; empty if it has none.
        images: as `choose_images` returns them.
        classes: of the images.
        count: their number.

    Raises:
        ValueError: they have other classes, or are not those that the run set aside.
    """
    from fastroute.data.tar import some

    trained = data.get("classes", classes)
    if trained != classes:
        missing = [name for name in trained if name not in classes]
        new = [name for name in classes if name not in trained]
        differences = [f"{what}: {some(names)}" for what, names in (("missing", missing), ("new", new)) if names]
        raise ValueError(
            f"data_dir is {images.data_dir}; its {len(classes)} classes are not the {len(trained)} of the training; "
            f"{'; '.join(differences) or 'they have another order'}"
        )
    if "val_split" in images.options and count != data.get("val_count", count):
        raise ValueError(
            f"data_dir is {images.data_dir}; the run set {data['val_count']:,} of its images aside, but now that would "
            f"be {count:,}: files were added or removed, so it would set aside images that it trained on; give other "
            "images by data_dir"
        )
