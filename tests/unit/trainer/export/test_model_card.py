"""Model cards: their Python runs, hubs can read them, and they tell what is known."""

import hashlib
import re
from dataclasses import asdict, replace

import pytest
import torch
from huggingface_hub import ModelCard

from models.flow.sampler_config import SamplerConfig
from tests.unit.trainer.export.runs import IMAGES, RUN, export, same_outputs, save_run
from tests.unit.trainer.measurements import real_figures
from trainer.autoencoder.config import CodecConfig
from trainer.config.job import DataConfig, EvalConfig
from trainer.config.reading import to_dict
from trainer.evaluation.choice import open_checkpoint
from trainer.evaluation.figures import Distance
from trainer.evaluation.reports import (
    CheckpointReport,
    EvaluationReport,
    Measurement,
    Origin,
    evaluation_key,
)
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig


def card_of(run, place, name="out", **options):
    folder = export(run, place / name, **options)
    return (folder / "README.md").read_text()


def run_code(card: str, session: dict) -> int:
    blocks = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)
    return len(blocks)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("store"), "everything")


def test_the_code_of_the_card_runs(run, tmp_path, monkeypatch):
    # A name that has to be quoted with care.
    card = card_of(run, tmp_path, name='it\'s "mine"', weights="both")
    monkeypatch.chdir(tmp_path)
    session: dict = {}
    assert run_code(card, session) == 4
    assert same_outputs(session["pipeline"].transformer, run.ema, run.job)
    assert [picture.size for picture in session["images"]] == [(8, 8)]
    assert session["drawn"].shape == (1, 1, 8, 8)
    # The last block that loads by diffusers is of the other weights; torch's comes after it.
    plain = session["model"]
    assert type(plain).__name__ == "LapFlowTransformer"
    assert same_outputs(plain, run.ema, run.job)


def test_the_code_of_a_card_for_latents_runs(tmp_path, monkeypatch):
    run = save_run(
        tmp_path,
        data=DataConfig(name="kinds", image_size=64, channels=1, classes=3),
        codec=CodecConfig(kind="autoencoder_kl", source="/secret/place"),
        codec_digest="ab" * 32,
    )
    card = card_of(run, tmp_path)
    monkeypatch.chdir(tmp_path)
    session: dict = {}
    assert run_code(card, session) == 3
    assert session["latents"].shape == session["drawn"].shape == (1, 4, 8, 8)
    assert "ab" * 32 in card
    assert "| image size | 64 x 64 |" in card
    assert "secret" not in card


def test_a_hub_reads_the_head(run, tmp_path):
    data = ModelCard(card_of(run, tmp_path)).data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag is None  # no task of the hub is class-conditional generation
    assert {"lapflow", "class-conditional"} <= set(data.tags)
    assert data.license is None
    assert data.metrics is None


def test_a_model_of_one_class_is_said_to_be_unconditional(tmp_path):
    one = DataConfig(name="faces", image_size=8, channels=1, classes=1)
    card = card_of(save_run(tmp_path, data=one), tmp_path)
    data = ModelCard(card).data
    assert data.pipeline_tag == "unconditional-image-generation"
    assert "class-conditional" not in card.lower()


def test_the_card_tells_how_the_model_was_trained(run, tmp_path):
    card = card_of(run, tmp_path)
    parameters = sum(p.numel() for p in run.ema.parameters())
    _, _, manifest = open_checkpoint(run.uri, StoreConfig())
    for line in (
        f"| parameters | {parameters:,} |",
        "| scales | 2 |",
        "| critical times | 0.4 |",
        "| scales that share weights | 0, 1 |",
        "| what they share | mlp, modulation |",
        f"| images seen | {IMAGES} |",
        "| updates | 7 |",
        "| images per update | 256 |",
        "| EMA decay | 0.9999 |",
        "| precision | fp32 |",
        "| data set | kinds |",
        f"| SHA-256 of its index | {'d1' * 32} |",
        f"| saved | {manifest.saved_at} |",
    ):
        assert line in card.splitlines()
    assert "AdamW (learning rate 0.0001, " in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    assert "which license" in card
    assert str(run.place) not in card


def test_the_hashes_are_those_of_the_files(run, tmp_path):
    card = card_of(run, tmp_path, weights="both")
    listed = re.findall(r"^\| `(\S+)` \| .* \| `([0-9a-f]{64})` \|$", card, re.MULTILINE)
    assert len(listed) == 2
    for name, digest in listed:
        data = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest


def test_a_name_cannot_break_the_card(tmp_path):
    odd = "a|b`c`\n| d | <script> [x](y)"
    run = save_run(tmp_path, data=DataConfig(name=odd, image_size=8, channels=1, classes=3))
    card = card_of(run, tmp_path)
    assert r"| data set | a\|b\`c\` \| d \| \<script\> \[x\](y) |" in card.splitlines()


def test_reports_of_the_exported_weights_are_shown(tmp_path):
    run = save_run(tmp_path)
    store = open_store(f"{tmp_path}/runs", StoreConfig())
    _, _, manifest = open_checkpoint(run.uri, StoreConfig())

    def put(name: str, data: bytes) -> None:
        store.put(evaluation_key(RUN, IMAGES, name), data)

    own = EvaluationReport(
        images=IMAGES,
        samples=1000,
        features="random_conv",
        frechet=0.1251,
        frechet_untrained=9.0,
        real=real_figures(0.0625),
        network_evaluations=80.0,
        segment_evaluations=(40.0, 40.0),
        settings=to_dict(EvalConfig()),
        origin=Origin(run=RUN, attempt=manifest.attempt, held_out_index="y", extractor=""),
    )
    put("report.json", own.to_json())
    measurement = Measurement(
        attempt=manifest.attempt,
        weights="master",
        samples=50_000,
        seed=1,
        sampler=asdict(SamplerConfig(solver="dopri5", guidance_scale=1.5)),
        extractors={"inception": "x"},
        held_out_index="y",
    )
    later = CheckpointReport(
        checkpoint=run.uri,
        run=RUN,
        images=IMAGES,
        real_images=10_000,
        network_evaluations=300.0,
        distances=(Distance(features="inception", frechet=12.5, real=real_figures(3.25)),),
        measurement=measurement,
    )
    put("aaaa/report.json", later.to_json())
    stale = replace(later, measurement=replace(measurement, attempt="another"))
    put("bbbb/report.json", stale.to_json())
    put("cccc/report.json", b"no report at all")
    put("cccc/grid.png", b"no report either")

    of_ema = "| ema | `random_conv` | 0.1251 | 0.0625 | 1,000 | `heun, 40 steps, guidance 1.0` |"
    of_master = "| master | `inception` | 12.5 | 3.25 | 50,000 | `dopri5, guidance 1.5` |"
    shown = {
        weights: card_of(run, tmp_path, name=weights, weights=weights)
        for weights in ("ema", "master", "both")
    }
    assert {weights: card.count(of_ema) for weights, card in shown.items()} == {
        "ema": 1,
        "master": 0,
        "both": 1,
    }
    assert {weights: card.count(of_master) for weights, card in shown.items()} == {
        "ema": 0,
        "master": 1,
        "both": 1,
    }
    metrics = {weights: ModelCard(card).data.metrics for weights, card in shown.items()}
    assert metrics == {
        "ema": ["frechet_random_conv"],
        "master": ["fid"],
        "both": ["fid", "frechet_random_conv"],
    }
