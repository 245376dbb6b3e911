"""An autoencoder's two files: what they say, and where they are: a folder, S3 or the hub.

Weights are read from safetensors only: the older .bin files are pickles, which run code when read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipelines.addresses import may_carry_credentials, quote_address
from pipelines.console import visible
from pipelines.documents import DocumentError, read_json, validate_as
from pipelines.files import take_lock
from trainer.storage.errors import StoreError
from trainer.storage.kept import KeptFiles, group_name
from trainer.storage.open import open_store
from trainer.storage.store import Store, StoreConfig

MAX_CONFIG_BYTES = 1 << 20
_CLASS = "AutoencoderKL"

_Channels = Annotated[int, Field(ge=1, le=8192)]
_Blocks = Annotated[tuple[str, ...], Field(min_length=1, max_length=10)]


class AutoencoderError(ValueError):
    """An autoencoder that is missing, damaged, or not the one the settings describe."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings:
    """The arguments of `diffusers.AutoencoderKL`, with its defaults for what is left out.

    Attributes:
        in_channels: Channels of the images that it encodes.
        out_channels: Channels of those that it decodes to.
        down_block_types: Names of the encoder's blocks.
        up_block_types: Names of the decoder's blocks.
        block_out_channels: Channels of each block; each but the first halves height and width.
        layers_per_block: Layers in each.
        act_fn: Name of the non-linearity.
        latent_channels: Channels of a latent.
        norm_num_groups: Groups of the normalisations.
        sample_size: Height and width of the images it was trained on.
        scaling_factor: Brings latents near unit variance.
        shift_factor: What is subtracted before; None subtracts nothing.
        latents_mean: Mean of each channel; no codec here knows what to do with it.
        latents_std: Deviation of each channel; likewise.
        force_upcast: Whether it fails in half precision.
        use_quant_conv: Whether a convolution follows the encoder.
        use_post_quant_conv: Whether one comes before the decoder.
        mid_block_add_attention: Whether the middle blocks attend.
    """

    in_channels: _Channels = 3
    out_channels: _Channels = 3
    down_block_types: _Blocks = ("DownEncoderBlock2D",)
    up_block_types: _Blocks = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[_Channels, ...], Field(min_length=1, max_length=10)] = (64,)
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 1
    act_fn: str = "silu"
    latent_channels: _Channels = 4
    norm_num_groups: _Channels = 32
    sample_size: Annotated[int, Field(ge=1, le=1 << 20)] | tuple[int, ...] = 32
    scaling_factor: Annotated[float, Field(ge=1e-6, le=1e6)] = 0.18215
    shift_factor: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool | None = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def factor(self) -> int:
        """Pixels for one element of a latent, along each side."""
        return 1 << (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """A config.json that was read and checked.

    Attributes:
        written: All that it says.
        settings: What of it decides the autoencoder.
    """

    written: Mapping[str, Any]
    settings: AutoencoderSettings

    def arguments(self) -> dict[str, Any]:
        """Return what it says of the autoencoder, which was checked, without what it leaves out."""
        known = {field.name for field in fields(AutoencoderSettings)}
        return {name: value for name, value in self.written.items() if name in known}

    def for_diffusers(self) -> dict[str, Any]:
        """Return what diffusers is to read: nothing else that it may act on."""
        return {"_class_name": _CLASS, **self.arguments()}


def read_config(file: Path, *, place: str) -> AutoencoderConfig:
    """Read a config.json.

    Args:
        file: Where it is.
        place: What the user named, for messages.

    Raises:
        AutoencoderError: It cannot be read, or is not that of an AutoencoderKL.
    """
    try:
        written = read_json(file, max_bytes=MAX_CONFIG_BYTES)
    except (OSError, DocumentError) as error:
        raise AutoencoderError(f"codec.source={place}: {file} cannot be read: {error}") from error
    kind = written.get("_class_name") if isinstance(written, dict) else None
    if kind != _CLASS:
        shown = visible(kind)[:80] if isinstance(kind, str) and kind else "something else"
        raise AutoencoderError(
            f"codec.source={place} holds {shown}, not an {_CLASS}; give an autoencoder of that "
            "class"
        )
    try:
        settings = validate_as(AutoencoderSettings, written)
    except DocumentError as error:
        raise AutoencoderError(
            f"codec.source={place}: {file} cannot be used: {error}; copy it again from where the "
            "autoencoder was made"
        ) from error
    return AutoencoderConfig(written=written, settings=settings)


def fetch(store: Store, keys: Mapping[str, str], *, cache: Path, uri: str) -> Path:
    """Return a folder with an autoencoder's files; the ranks of a machine fetch them once.

    Args:
        store: Where they come from.
        keys: Key of each file in that store, by its name here.
        cache: Folder of all autoencoders that were fetched.
        uri: What the user named, for messages.

    Raises:
        AutoencoderError: They cannot be kept, or change while they are fetched.
        MissingObject: One is not there.
        StoreError: The store fails or refuses.
    """
    kept, made_of = KeptFiles(cache), _version(store, keys, uri=uri)
    if found := kept.whole(made_of=made_of):
        return found
    with _explain_errors(cache, uri=uri):
        lock = take_lock(cache / f"{group_name(made_of)}.lock")
    with lock:
        if found := kept.whole(made_of=made_of):
            return found
        with _explain_errors(cache, uri=uri):
            kept.put_aside(made_of=made_of)
        data = {name: store.get(key) for name, key in keys.items()}
        if _version(store, keys, uri=uri) != made_of:
            raise AutoencoderError(
                f"the autoencoder of codec.source={uri} was replaced while it was fetched; start "
                "again once its files stay as they are"
            )
        with _explain_errors(cache, uri=uri):
            return kept.keep(data, made_of=made_of)


def _version(store: Store, keys: Mapping[str, str], *, uri: str) -> str:
    return json.dumps([uri, *((key, store.fingerprint(key)) for key in keys.values())])


@contextmanager
def _explain_errors(cache: Path, *, uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, StoreError) as error:
        raise AutoencoderError(
            f"the autoencoder of codec.source={uri} cannot be kept at {cache} ({error}); free some "
            "space, or set home to a folder you may write"
        ) from error


_CONFIG = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
MAX_WEIGHTS_BYTES = 1 << 33
_MAX_BYTES = {_CONFIG: MAX_CONFIG_BYTES, WEIGHTS_NAME: MAX_WEIGHTS_BYTES}
_FOLDERS = ("", "vae/")  # an autoencoder by itself, or inside a whole pipeline
_HUB_NAME = re.compile(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class AutoencoderFiles:
    """An autoencoder on this machine's disk.

    Attributes:
        folder: Holds its config.json and its weights.
        config: What config.json says, checked.
        sha256: Digest of architecture, scaling and weights; where the files lie, and which version
            of diffusers wrote them, does not change it.
    """

    folder: Path
    config: AutoencoderConfig
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
            (copy := Path(name) / _CONFIG).write_text(json.dumps(self.config.for_diffusers()))
            try:
                shutil.copyfile(self.folder / WEIGHTS_NAME, copy.with_name(WEIGHTS_NAME))
            except OSError as error:
                raise AutoencoderError(
                    f"the weights in {self.folder} cannot be copied to {name} ({error}); free some "
                    "space, or set TMPDIR to a folder with more of it"
                ) from error
            if _digest(self.config, copy.with_name(WEIGHTS_NAME)) != self.sha256:
                raise AutoencoderError(
                    f"the weights in {self.folder} have changed since they were checked; leave "
                    "them alone while a run starts, and start it again"
                )
            yield Path(name)

    @property
    def settings(self) -> AutoencoderSettings:
        """What decides the autoencoder."""
        return self.config.settings


def find_autoencoder(source: str, *, cache: Path, store: StoreConfig) -> AutoencoderFiles:
    """Find an autoencoder, and fetch it when it is elsewhere.

    Every rank may call this at the same time: the ranks of one machine fetch it once.

    Args:
        source: A local folder, "s3://bucket/prefix", or the name of a repository on the hub; each
            holds config.json and safetensors weights, or has them in a sub-folder "vae".
        cache: Folder on this machine for what is fetched from S3.
        store: How to reach an object store.

    Raises:
        AutoencoderError: It is not there, not reachable, incomplete, or not an AutoencoderKL; or
            its place may carry credentials.
        StoreError: The object store fails or refuses.
    """
    if may_carry_credentials(source):
        raise AutoencoderError(
            f"codec.source={quote_address(source)} may carry credentials, which would reach logs; "
            "give them by the environment"
        )
    if source.startswith("s3://"):
        folder = _from_store(source, cache=cache, config=store)
    elif (local := Path(source.removeprefix("file://")).expanduser()).is_dir():
        folder = local
    elif _HUB_NAME.fullmatch(source):
        folder = _from_hub(source)
    else:
        raise AutoencoderError(
            f"there is no folder {local} for codec.source={source}; give a folder, an s3:// "
            "prefix or the name of a repository on the Hugging Face hub, such as "
            "stabilityai/sd-vae-ft-ema"
        )
    prefix = _prefix(_names(folder), place=source)
    folder = folder / prefix
    config, weights = read_config(folder / _CONFIG, place=source), folder / WEIGHTS_NAME
    try:
        _check_size(weights.stat().st_size, MAX_WEIGHTS_BYTES, name=WEIGHTS_NAME, place=source)
        sha256 = _digest(config, weights)
    except OSError as error:
        raise AutoencoderError(
            f"codec.source={source}: {weights} cannot be read: {error}"
        ) from error
    return AutoencoderFiles(folder=folder.resolve(), config=config, sha256=sha256)


def _prefix(names: Collection[str], *, place: str) -> str:
    """Choose the sub-folder that holds the autoencoder among the names of all files."""
    found = [folder for folder in _FOLDERS if folder + _CONFIG in names]
    if not found:
        raise AutoencoderError(
            f"codec.source={place} has no {_CONFIG}, nor vae/{_CONFIG}; give the folder that "
            "AutoencoderKL.save_pretrained has written, or that of a whole diffusers pipeline"
        )
    (prefix, *_) = found
    if prefix + WEIGHTS_NAME in names:
        return prefix
    if any(name.startswith(prefix) and name.endswith((".bin", ".pt", ".ckpt")) for name in names):
        raise AutoencoderError(
            f"codec.source={place} has its weights only as a pickle, which can run code when it is "
            f"read; write {WEIGHTS_NAME} by AutoencoderKL.save_pretrained on a machine you can "
            "spare"
        )
    raise AutoencoderError(
        f"codec.source={place} has no weights: {prefix}{WEIGHTS_NAME} is missing; copy the folder "
        "again"
    )


def _names(folder: Path) -> set[str]:
    paths = (path for prefix in _FOLDERS for path in (folder / prefix).glob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in paths}


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [folder + file for folder in _FOLDERS for file in (_CONFIG, WEIGHTS_NAME)]
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
    sizes = store.list("")
    prefix = _prefix(sizes, place=uri)
    for name, max_bytes in _MAX_BYTES.items():
        _check_size(sizes[prefix + name], max_bytes, name=name, place=uri)
    keys = {name: prefix + name for name in _MAX_BYTES}
    return fetch(store, keys, cache=cache / "autoencoders", uri=uri)


def _check_size(size: int, max_bytes: int, *, name: str, place: str) -> None:
    if size > max_bytes:
        raise AutoencoderError(
            f"codec.source={place}: {name} has {size} bytes, more than the {max_bytes} that one "
            "may have; give an autoencoder"
        )


def _digest(config: AutoencoderConfig, weights: Path) -> str:
    own = {key: value for key, value in config.written.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    with open(weights, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
