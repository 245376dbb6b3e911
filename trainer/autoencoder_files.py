"""Where an autoencoder's two files are: a folder, an S3 prefix or the Hugging Face hub.

Weights are read from safetensors only: the older .bin files are pickles, which run code when read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.store import StoreConfig, open_store

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FOLDERS = ("", "vae/")  # an autoencoder by itself, or inside a whole pipeline
_HUB_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+")


class AutoencoderError(ValueError):
    """An autoencoder that is missing, damaged, or not the one the settings describe."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderFiles:
    """An autoencoder on this machine's disk.

    Attributes:
        folder: Holds its config.json and its weights.
        config: What config.json says.
        sha256: Digest of architecture, scaling and weights; where the files lie, and which version
            of diffusers wrote them, does not change it.
    """

    folder: Path
    config: Mapping[str, Any]
    sha256: str

    @contextmanager
    def exactly(self) -> Iterator[Path]:
        """Give a private folder that holds what the digest covers and nothing else.

        A loader that looks around in the folder that was named finds other files too, such as an
        index of weights that lie elsewhere; and a file may change after it was hashed.

        Raises:
            AutoencoderError: The weights have changed since, or cannot be copied.
        """
        with tempfile.TemporaryDirectory(prefix="lapflow-autoencoder-") as name:
            (copy := Path(name) / _CONFIG).write_text(json.dumps(dict(self.config)))
            try:
                shutil.copyfile(self.folder / _WEIGHTS, copy.with_name(_WEIGHTS))
            except OSError as error:
                raise AutoencoderError(
                    f"the weights in {self.folder} cannot be copied to {name} ({error}); free some "
                    "space, or set TMPDIR to a folder with more of it"
                ) from error
            if _digest(self.config, copy.with_name(_WEIGHTS)) != self.sha256:
                raise AutoencoderError(
                    f"the weights in {self.folder} have changed since they were checked; leave "
                    "them alone while a run starts, and start it again"
                )
            yield Path(name)

    # What config.json leaves out has diffusers' default.

    @property
    def factor(self) -> int:
        """Pixels for one element of a latent, along each side."""
        return int(2 ** (len(self.config.get("block_out_channels", [64])) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of its latents."""
        return int(self.config.get("latent_channels", 4))

    @property
    def image_channels(self) -> int:
        """Channels of the images it takes."""
        return int(self.config.get("in_channels", 3))

    @property
    def scale(self) -> float:
        """Its own factor, which brings latents near unit variance."""
        return float(self.config.get("scaling_factor", 0.18215))

    @property
    def shift(self) -> float:
        """What it subtracts before."""
        return float(self.config.get("shift_factor") or 0.0)


def find_autoencoder(source: str, *, cache: Path, store: StoreConfig) -> AutoencoderFiles:
    """Find an autoencoder, and fetch it when it is elsewhere.

    Every rank may call this at the same time: the ranks of one machine fetch it once.

    Args:
        source: A local folder, "s3://bucket/prefix", or the name of a repository on the hub; each
            holds config.json and safetensors weights, or has them in a sub-folder "vae".
        cache: Folder on this machine for what is fetched from S3.
        store: How to reach an object store.

    Raises:
        AutoencoderError: It is not there, not reachable, incomplete, or not an AutoencoderKL.
        StoreError: The object store fails or refuses.
    """
    if source.startswith("s3://"):
        folder = _from_store(source, cache=cache, config=store)
    elif (local := Path(source.removeprefix("file://")).expanduser()).is_dir():
        folder = local
    elif _HUB_NAME.fullmatch(source):
        folder = _from_hub(source)
    else:
        raise AutoencoderError(
            f"there is no folder {local} for codec.source={source}; give a folder, an s3:// prefix "
            "or the name of a repository on the Hugging Face hub, such as stabilityai/sd-vae-ft-ema"
        )
    prefix = _prefix(_names(folder), place=source)
    folder = folder / prefix
    config = _read_config(folder / _CONFIG, place=source)
    return AutoencoderFiles(
        folder=folder.resolve(), config=config, sha256=_digest(config, folder / _WEIGHTS)
    )


def _prefix(names: Collection[str], *, place: str) -> str:
    """Choose the sub-folder that holds the autoencoder among the names of all files."""
    found = [folder for folder in _FOLDERS if folder + _CONFIG in names]
    if not found:
        raise AutoencoderError(
            f"codec.source={place} has no {_CONFIG}, nor vae/{_CONFIG}; give the folder that "
            "AutoencoderKL.save_pretrained has written, or that of a whole diffusers pipeline"
        )
    (prefix, *_) = found
    if prefix + _WEIGHTS in names:
        return prefix
    if any(name.startswith(prefix) and name.endswith((".bin", ".pt", ".ckpt")) for name in names):
        raise AutoencoderError(
            f"codec.source={place} has its weights only as a pickle, which can run code when it is "
            f"read; write {_WEIGHTS} by AutoencoderKL.save_pretrained on a machine you can spare"
        )
    raise AutoencoderError(
        f"codec.source={place} has no weights: {prefix}{_WEIGHTS} is missing; copy the folder again"
    )


def _names(folder: Path) -> set[str]:
    paths = (path for prefix in _FOLDERS for path in (folder / prefix).glob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [folder + file for folder in _FOLDERS for file in (_CONFIG, _WEIGHTS)]
    try:
        # Gives what an earlier call has fetched when the hub cannot be reached.
        return Path(snapshot_download(name, allow_patterns=wanted))
    except OSError as error:  # also the hub's own errors and those of the connection
        raise AutoencoderError(
            f"codec.source={name} is no folder here and cannot be had from the Hugging Face hub "
            f"({type(error).__name__}); without a network, fetch it elsewhere and set codec.source "
            "to its folder or s3:// prefix; with one, check the name and your access"
        ) from error


def _from_store(uri: str, *, cache: Path, config: StoreConfig) -> Path:
    store = open_store(uri, config)
    prefix = _prefix(store.list(""), place=uri)
    names = [prefix + _CONFIG, prefix + _WEIGHTS]
    # Other content is another folder, so what was fetched once never grows old.
    version = json.dumps([uri, *((name, store.fingerprint(name)) for name in names)])
    folder = cache / "autoencoders" / hashlib.sha256(version.encode()).hexdigest()[:32]
    try:
        with _locked(folder.with_suffix(".lock")):
            if folder.is_dir():
                return folder
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for name in names:
                (partial / name.removeprefix(prefix)).write_bytes(store.get(name))
            partial.replace(folder)
    except OSError as error:
        raise AutoencoderError(
            f"the autoencoder of codec.source={uri} cannot be kept at {folder} ({error}); free "
            "some space, or set home to a folder you may write"
        ) from error
    return folder


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when its holder dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_config(file: Path, *, place: str) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise AutoencoderError(f"codec.source={place}: {file} cannot be read: {error}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKL":
        raise AutoencoderError(
            f"codec.source={place} holds {kind or 'something else'}, not an AutoencoderKL; give an "
            "autoencoder of that class"
        )
    return dict(config)


def _digest(config: Mapping[str, Any], weights: Path) -> str:
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    with open(weights, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
