import jaxtyping
import pytest


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it: the values of annotated names are checked by our own errors alone."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
