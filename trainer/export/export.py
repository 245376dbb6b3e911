"""Exports of a checkpoint's weights: one safetensors file, or a folder with a model card.

Either appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.files import sync, sync_all
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.objects import safetensors_header
from trainer.config.reading import ConfigError, to_dict
from trainer.evaluation.model_record import ModelRecord, kind_of_weights
from trainer.evaluation.reports import MeasuredDistance, evaluation_key, read_distances
from trainer.export.config import ExportSettings
from trainer.export.model_card import ModelCard, WeightsFile
from trainer.storage.store import Store


def write_weights(path: Path, store: Store, manifest: Manifest, which: str) -> str:
    """Write whole weights, of which memory holds one copy meanwhile.

    Equal weights make equal files.

    Args:
        path: The file.
        store: The store of the run.
        manifest: The checkpoint.
        which: A moving average, or the weights as trained: see `kind_of_weights`.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        CheckpointError: If the checkpoint is damaged, holds values that are not finite or lacks
            such weights, or the store fails.
        OSError: The file cannot be written.
    """
    weights = load_weights(store, manifest, kind_of_weights(manifest, which))
    metadata = {
        "format": "pt",
        "run": manifest.run,
        "images": str(manifest.images),
        "weights": which,
        "science_hash": manifest.config_fingerprint,
    }
    shapes = {name: tuple(each.shape) for name, each in weights.items()}
    parts: list[bytes | memoryview] = [safetensors_header(shapes, metadata)]
    parts += [_values(each) for each in weights.values()]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _values(tensor: Tensor) -> memoryview:
    """Return the bytes of a float32 tensor, which are not copied."""
    return tensor.reshape(-1).numpy().data


_CARD = "README.md"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MASTER = "diffusion_pytorch_model.master.safetensors"

FILES = (_CARD, "config.json", "model_index.json", _WEIGHTS, _MASTER)
"""Names of all files that may be in an exported folder."""


def write_folder(
    folder: Path,
    *,
    name: str,
    store: Store,
    manifest: Manifest,
    record: ModelRecord,
    weights: Sequence[str],
) -> None:
    """Write a folder that both diffusers and torch can load.

    Args:
        folder: Where to; it must not exist.
        name: What the folder will be called.
        store: The store of the run.
        manifest: The checkpoint.
        record: Its model.
        weights: The weights; the first are loaded by default, and master beside them is diffusers'
            variant "master".

    Raises:
        CheckpointError: If the checkpoint is damaged or lacks such weights, or the store fails.
        OSError: The folder cannot be written.
    """
    folder.mkdir()
    files = [
        WeightsFile(
            name=file,
            weights=which,
            sha256=write_weights(folder / file, store, manifest, which),
        )
        for which, file in zip(weights, (_WEIGHTS, _MASTER), strict=False)
    ]
    _write_settings(folder, record)
    card = ModelCard(
        folder=name,
        manifest=manifest,
        model=record,
        files=files,
        results=_results(store, manifest, weights),
    )
    (folder / _CARD).write_text(card.text(), encoding="utf-8")


def _write_settings(folder: Path, record: ModelRecord) -> None:
    """Let diffusers write its own files, of a model that takes no memory."""
    from trainer.export.diffusers_model import LapFlowTransformer2DModel
    from trainer.export.diffusers_pipeline import LapFlowPipeline

    with torch.device("meta"):
        model = LapFlowTransformer2DModel(**_arguments(record))
    model.save_config(folder)
    LapFlowPipeline(model).save_config(folder)


def _arguments(record: ModelRecord) -> dict[str, Any]:
    """Return what `LapFlowTransformer2DModel` is built from, as JSON values."""
    codec = record.codec
    # Where the autoencoder was is nobody's business outside; which one it is, everybody's.
    latents = {
        "factor": codec.factor,
        "scale": codec.scale,
        "shift": codec.shift,
        "sha256": record.autoencoder_sha256,
    }
    return {
        "transformer": to_dict(record.transformer),
        "flow": to_dict(record.flow),
        "in_channels": record.shape.channels,
        "sample_size": record.shape.size,
        "num_classes": record.shape.classes,
        "label_dropout": record.label_dropout,
        "latents": latents if record.on_latents else None,
    }


def _results(store: Store, manifest: Manifest, weights: Sequence[str]) -> list[MeasuredDistance]:
    """Return what was measured of these weights."""
    run, images = manifest.run, manifest.images
    found = read_distances(
        store,
        run,
        images,
        keys=store.list(evaluation_key(run, images, "")),
        attempts=(manifest.attempt,),
    )
    return [each for each in found if each.measurement.weights in weights]


def export_checkpoint(store: Store, manifest: Manifest, settings: ExportSettings) -> Path:
    """Write a checkpoint's weights, whole or not at all, and return where they are.

    Host memory holds one set of weights at a time, in float32.

    Args:
        store: The store of the run.
        manifest: The checkpoint.
        settings: What to export, and where to.

    Raises:
        ConfigError: For an output that exists or cannot be written, or an average that is not kept.
        CheckpointError: If the checkpoint is damaged, holds values that are not finite or other
            weights than its model has, lacks those asked for, or if the store fails.
    """
    # Normalised, for "." has no name to give to what is written beside it.
    output = Path(os.path.abspath(Path(settings.output).expanduser()))
    if settings.file == "folder":
        check_folder(output, own=FILES, overwrite=settings.overwrite)
    else:
        check_file(output, overwrite=settings.overwrite)
    record = ModelRecord.of(manifest)
    record.check_parameters(manifest)
    weights = ("ema", "master") if settings.weights == "both" else (settings.weights,)
    kind_of_weights(manifest, weights[0])
    with write_whole(output) as partial:
        if settings.file == "folder":
            write_folder(
                partial,
                name=output.name,
                store=store,
                manifest=manifest,
                record=record,
                weights=weights,
            )
        else:
            write_weights(partial, store, manifest, weights[0])
    return output


def check_file(output: Path, *, overwrite: bool) -> None:
    """Refuse a place where a file must not be written.

    Raises:
        ConfigError: There is a folder, or a file that may not be replaced.
    """
    if output.is_dir():
        raise ConfigError(f"output={output} is a folder; name a file in it")
    if output.exists() and not overwrite:
        raise ConfigError(
            f"output={output} exists; choose another, or set overwrite=true to replace it"
        )


def check_folder(output: Path, *, own: Collection[str], overwrite: bool) -> None:
    """Refuse a place where a folder must not be written.

    Args:
        output: The place.
        own: Names of all files that may be in a folder that is replaced.
        overwrite: Whether one may be replaced.

    Raises:
        ConfigError: There is a file, a folder that may not be replaced, or one that holds something
            else.
    """
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise ConfigError(f"output={output} is not a folder; choose another place")
    names = {entry.name for entry in output.iterdir()}
    if names and not overwrite:
        raise ConfigError(
            f"output={output} exists and is not empty; choose another, or set overwrite=true to "
            "replace an earlier export"
        )
    if foreign := sorted(names - set(own)):
        raise ConfigError(
            f"output={output} holds {foreign[0]}, which no export has written, so overwrite=true "
            "does not replace it; choose another folder, or move that away"
        )


@contextmanager
def write_whole(output: Path) -> Iterator[Path]:
    """Give a place beside `output` to write to; what is there at the end becomes `output`.

    Whatever fails, an interrupt too, leaves `output` as it was, and nothing beside it. A process
    that is killed leaves a hidden folder or file beside it; an earlier folder it may leave there
    alone, renamed, if it is killed between two renames.

    Args:
        output: A file or folder, checked before; what is there is replaced.

    Yields:
        The place, where nothing is yet.

    Raises:
        ConfigError: It cannot be written, as on a full disk; or what was there cannot be put back,
            and lies beside it.
    """
    name = f".{output.name}.{secrets.token_hex(4)}"
    partial, replaced = output.with_name(f"{name}.partial"), output.with_name(f"{name}.replaced")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync_all(partial)
        if output.is_dir():
            output.rename(replaced)
        partial.rename(output)
        sync(output.parent)
    except OSError as error:
        raise ConfigError(
            f"output={output} cannot be written, and nothing of it is left: {error}"
        ) from error
    finally:
        _settle(output, partial=partial, replaced=replaced)


def _settle(output: Path, *, partial: Path, replaced: Path) -> None:
    """Put an earlier folder back if nothing has come to its place, and remove what is left over.

    Raises:
        ConfigError: It cannot be put back, and is not removed either.
    """
    try:
        # An interrupt, too, may come between the renames.
        if replaced.exists() and not os.path.lexists(output):
            replaced.rename(output)
    except OSError as error:
        raise ConfigError(
            f"output={output} cannot be written, and what was there is now at {replaced}, which "
            f"cannot be renamed back: {error}"
        ) from error
    finally:
        _remove(partial)
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
