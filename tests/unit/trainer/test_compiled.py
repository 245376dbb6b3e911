"""What compiling asks for, and what it tells."""

import itertools
import logging
import os
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.support.configuration import configuration
from trainer.config.reading import ConfigError
from trainer.engine.compiled import CompileReport, check_compiler, prepare_compiler
from trainer.engine.protocol import EngineConfigError
from trainer.training.validate import validate

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("device", "variable"), [(CPU, "CXX"), (GPU, "CC")])
def test_a_compiler_that_is_missing_is_named(device, variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "no-such-compiler")
    with pytest.raises(EngineConfigError, match=rf"no-such-compiler.*\${variable}.*compile=off"):
        check_compiler(device)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineConfigError, match="needs the compiler g"):
        check_compiler(device)


@pytest.mark.parametrize("has_headers", [True, False])
def test_headers_that_are_missing_are_named(has_headers, monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    if has_headers:
        (tmp_path / "Python.h").touch()
        check_compiler(CPU)
        return
    with pytest.raises(EngineConfigError, match=r"Python\.h is not.*python3-dev"):
        check_compiler(CPU)


def test_zero_3_is_refused_with_the_reason():
    settings = ("+exp=digits", "engine.compile=blocks")
    validate(configuration(*settings, "engine.zero_stage=1"))
    with pytest.raises(ConfigError, match=r"zero_stage=3, which gathers.*zero_stage=2 or 1"):
        validate(configuration(*settings, "engine.zero_stage=3"))


def test_compiled_code_is_kept_in_the_nodes_cache_unless_told_otherwise(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "compile_threads", 7)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of this test")  # so that it is undone
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    prepare_compiler(Path("/home/cache"), ranks=1000)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/home/cache/compiled"
    assert config.compile_threads == 7
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    prepare_compiler(Path("/elsewhere"), ranks=1000)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/home/cache/compiled"
    assert config.compile_threads == 1


def test_the_first_update_tells_how_long_it_compiled_and_a_later_one_warns(caplog):
    clock = itertools.count()
    report = CompileReport(rank=0, now=lambda: next(clock))
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", dynamic=False)
    with caplog.at_level(logging.INFO):
        compiled(torch.zeros(2))
        report.after_update(None)
        assert "compiled 1 passes of blocks in 1.0 s" in caplog.text
        caplog.clear()
        compiled(torch.zeros(2))
        report.after_update(None)
        assert not caplog.text
        compiled(torch.zeros(3))
        report.after_update(None)
    assert "compiled again" in caplog.text
