"""Stored latents: their format, DALI against the reference and the formula, exact resume."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from models.pyramid import split
from pipelines.augment import SampleKey
from pipelines.decode.contract import LatentDecodeConfig
from pipelines.decode.make import make_decoder
from pipelines.errors import DataError, UndecodableImageError, UnsplittableImageError
from pipelines.latent_format import LatentFormat
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Cursor, Loader
from pipelines.shards import ShardedDataset

DECODERS = ("dali", "pillow")
COUNT = 20


def stored(dtype: str = "float16", views: int = 2, size: int = 8) -> LatentFormat:
    return LatentFormat(dtype=dtype, views=views, channels=4, size=size)


def samples(form: LatentFormat, count: int = COUNT, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    moments = rng.normal(size=(count, *form.shape))
    moments[:, :, 1] = np.abs(moments[:, :, 1])
    return list(moments.astype(form.dtype))


def config(form: LatentFormat, **settings: object) -> LatentDecodeConfig:
    return LatentDecodeConfig(
        **{"format": form, "scales": 2, "scale": 0.5, "shift": 0.25, "decode_threads": 1} | settings
    )


def keys(count: int = COUNT, *, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(3, epoch, sample_id) for sample_id in range(count)]


def write(folder: Path, arrays: list[np.ndarray], form: LatentFormat) -> None:
    from streaming.base.format.mds import MDSWriter

    with MDSWriter(
        out=str(folder),
        columns={"moments": form.encoding, "label": "int"},
        hashes=["sha256"],
        size_limit=6 * form.sample_bytes,
    ) as writer:
        for label, moments in enumerate(arrays):
            writer.write({"moments": moments, "label": label % 3})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_encoding_names_the_format(dtype: str, views: int) -> None:
    form = stored(dtype, views)
    assert LatentFormat.parse(form.encoding) == form
    data = samples(form, 1)[0]
    assert len(data.tobytes()) == form.sample_bytes
    mean, std = form.moments(data.tobytes(), mirrored=views == 2)
    assert (mean == data[-1, 0]).all()
    assert (std == data[-1, 1]).all()


@pytest.mark.parametrize(
    "encoding",
    [
        "ndarray",
        "ndarray:float16",
        "ndarray:float64:2,2,4,8,8",
        "ndarray:float16:3,2,4,8,8",
        "ndarray:float16:2,3,4,8,8",
        "ndarray:float16:2,2,4,8,16",
        "ndarray:float16:2,2,0,8,8",
        "ndarray:float16:2,2,4,99999,99999",
        "ndarray:float16:2,2,4,8,8,8",
        "pkl",
    ],
)
def test_other_arrays_are_not_latents(encoding: str) -> None:
    assert LatentFormat.parse(encoding) is None


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("posterior", ["sample", "mean"])
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_decoders_agree_with_each_other_and_with_the_formula(
    dtype: str, posterior: str, scales: int
) -> None:
    form = stored(dtype)
    arrays = samples(form)
    chosen = config(form, posterior=posterior, scales=scales, flip=True)
    data = [array.tobytes() for array in arrays]
    dali, reference = (make_decoder(name, chosen, device="cpu") for name in DECODERS)
    latents = []
    for array, key in zip(arrays, keys(), strict=True):
        mean, std = array[int(key.uniforms(5)[0] < 0.5)].astype(np.float64)
        normals = key.normals(mean.size).reshape(mean.shape)
        latents.append(mean + std * normals if posterior == "sample" else mean)
    expected = split(torch.from_numpy((np.stack(latents) - 0.25) * 0.5).float(), scales)
    for name, bands in (("dali", dali(data, keys())), ("reference", reference(data, keys()))):
        assert len(bands) == scales, name
        for band, wanted in zip(bands, expected, strict=True):
            assert band.dtype == torch.float32
            torch.testing.assert_close(band, wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", DECODERS)
def test_without_keys_the_mean_of_the_image_as_it_is(name: str) -> None:
    form = stored()
    arrays = samples(form, 3)
    decode = make_decoder(name, config(form, scales=1, flip=True), device="cpu")
    (bands,) = decode([array.tobytes() for array in arrays])
    means = torch.from_numpy(np.stack([array[0, 0] for array in arrays]).astype(np.float32))
    torch.testing.assert_close(bands, (means - 0.25) * 0.5, rtol=0, atol=1e-6)


def test_latents_are_drawn_from_the_posterior_anew_in_each_epoch() -> None:
    form = stored("float32", 1)
    data = samples(form, 1)[0]
    decode = make_decoder("dali", config(form, scales=1, scale=1.0, shift=0.0), device="cpu")
    drawn = torch.cat(
        [decode([data.tobytes()] * 50, [SampleKey(0, e, 7) for e in range(s, s + 50)])[0]
         for s in range(0, 2000, 50)]
    ).numpy()  # fmt: skip
    mean, std = data[0]
    error = (drawn.mean(0) - mean) / (std / np.sqrt(len(drawn)))
    assert np.abs(error).max() < 5
    assert abs(error.std() - 1) < 0.2
    assert np.abs(drawn.std(0) / std - 1).max() < 5 / np.sqrt(2 * len(drawn))


def test_normals_are_normal_and_belong_to_their_key() -> None:
    normals = np.concatenate([SampleKey(1, 0, i).normals(4097) for i in range(50)])
    assert np.isfinite(normals).all()
    assert len(np.unique(normals)) > 0.99 * len(normals)
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normals**power).mean() - expected) < 5 * np.sqrt(spread / len(normals))
    assert (SampleKey(1, 0, 4).normals(7) == SampleKey(1, 0, 4).normals(7)).all()
    assert (SampleKey(1, 1, 4).normals(7) != SampleKey(1, 0, 4).normals(7)).all()


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("damage", ["short", "not finite", "negative"])
def test_bad_latents_are_named(name: str, damage: str) -> None:
    form = stored()
    arrays = samples(form, 3)
    if damage == "not finite":
        arrays[1][0, 0, 0, 0, 0] = np.inf
    elif damage == "negative":
        arrays[1][0, 1] *= -1
    data = [array.tobytes() for array in arrays]
    if damage == "short":
        data[1] = data[1][:-2]
    with pytest.raises(UndecodableImageError) as caught:
        make_decoder(name, config(form), device="cpu")(data)
    assert caught.value.indices == (1,)


def test_settings_that_the_latents_cannot_serve_are_refused() -> None:
    with pytest.raises(DataError, match=r"flip=true needs latents of mirrored images"):
        config(stored(views=1), flip=True)
    with pytest.raises(UnsplittableImageError, match=r"8 x 8 .* into 5 scales"):
        config(stored(), scales=5)


def test_resuming_on_other_ranks_gives_the_same_bits(tmp_path: Path) -> None:
    form = stored()
    write(tmp_path / "latents", samples(form), form)
    dataset = ShardedDataset(str(tmp_path / "latents"))
    assert dataset.latents == form
    assert len(dataset.shard_sizes) > 2

    def batches(start: int, count: int, rank: int = 0, world: int = 1) -> list[torch.Tensor]:
        with Loader(
            dataset,
            config=LoaderConfig(),
            decode=config(form, flip=True),
            seed=5,
            batch_images=6,
            rank=rank,
            world_size=world,
        ) as source:
            return [
                torch.cat([band.flatten(1) for band in batch.bands], dim=1)
                for batch, _ in islice(source.batches(Cursor(start)), count)
            ]

    whole = batches(0, 8)
    assert not torch.equal(torch.cat(whole[:4]), torch.cat(whole[4:]))
    for one, other in zip(whole[3:], batches(18, 5), strict=True):
        assert torch.equal(one, other)
    ranks = [batches(0, 8, rank, 3) for rank in range(3)]
    for number, one in enumerate(whole):
        assert torch.equal(one, torch.cat([rank[number] for rank in ranks]))
