"""The audit of what is installed: it finds what it is for, and this project's pins pass it."""

from importlib.metadata import distributions
from pathlib import Path

import pytest

from install import audit

ROOT = Path(__file__).resolve().parents[2]
PINS = (ROOT / "constraints.txt").read_text()
BAD = (ROOT / "install/known-bad.txt").read_text()


def installed(folder: Path, name: str, version: str = "1.0", **metadata: str) -> Path:
    """Install a package of one file, as pip would."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    lines = {"Metadata-Version": "2.4", "Name": name, "Version": version, **metadata}
    (about / "METADATA").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    module = folder / f"{name}.py"
    module.write_text("answer = 42\n")
    record = audit.digest(module, "sha256")
    (about / "RECORD").write_text(f"{name}.py,{record},12\n{about.name}/RECORD,,\n")
    return module


def found(folder: Path) -> list:
    return list(distributions(path=[str(folder)]))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Apache-2.0 AND MIT", "permissive"),
        ("BSD License", "permissive"),
        ("LGPL-2.1-or-later", "LGPL"),
        ("GNU Lesser General Public License v2 or later (LGPLv2+)", "LGPL"),
        ("GNU Affero General Public License v3", "GPL"),
        ("GPL-3.0-only", "GPL"),
        ("MPL-2.0 AND MIT", "MPL"),
        ("LicenseRef-NVIDIA-Proprietary", "proprietary"),
        ("", "unknown"),
    ],
)
def test_kinds_of_licences(text, kind):
    assert audit.kind_of(text) == kind


def test_licences_that_must_be_named_are(tmp_path):
    installed(tmp_path, "lesser", **{"License-Expression": "LGPL-2.1-only"})
    installed(tmp_path, "copyleft", **{"License": "GPL-3.0"})
    installed(tmp_path, "silent")
    installed(tmp_path, "free", **{"Classifier": "License :: OSI Approved :: MIT License"})
    wrong = list(audit.licences(found(tmp_path), "nothing"))
    assert wrong == [
        "silent: its licence is unknown",
        "copyleft: GPL cannot be linked here",
        "lesser: LGPL, and README.md does not name it",
    ]
    assert len(list(audit.licences(found(tmp_path), "uses lesser"))) == 2


def test_the_readme_names_what_is_installed_here():
    assert list(audit.licences(list(distributions()), (ROOT / "README.md").read_text())) == []


def test_bad_and_other_versions_are_refused(tmp_path):
    installed(tmp_path, "torch", "2.5.1+cpu")
    installed(tmp_path, "ray", "2.60.1")
    wrong = list(audit.versions(found(tmp_path), PINS, BAD))
    assert [line.partition(" is ")[0] for line in wrong] == [
        "torch 2.5.1+cpu",
        "ray 2.60.1",
        "torch 2.5.1+cpu",
    ]
    assert "CVE-2025-32434" in wrong[0]


def test_no_pin_is_known_to_be_bad(tmp_path):
    for pin, _ in audit.requirements(PINS):
        (version,) = (each.version for each in pin.specifier)
        installed(tmp_path, pin.name, version)
    assert list(audit.versions(found(tmp_path), PINS, BAD)) == []


def test_every_bad_version_has_its_reason():
    assert all("CVE-" in why and wanted.specifier for wanted, why in audit.requirements(BAD))


def test_changed_and_missing_files_are_found(tmp_path):
    changed = installed(tmp_path, "changed")
    gone = installed(tmp_path, "gone")
    installed(tmp_path, "whole")
    assert list(audit.files(found(tmp_path))) == []
    changed.write_text("answer = 43\n")
    gone.unlink()
    wrong = sorted(audit.files(found(tmp_path)))
    assert [line.rpartition(" ")[2] for line in wrong] == ["changed", "gone"]


def test_another_build_of_the_same_version_is_found(tmp_path):
    """Its files are those of its own record, so nothing but its contents tells."""
    for name in ("same", "other", "new"):
        installed(tmp_path, name)
    (tmp_path / "other.py").write_text("answer = 42\n\nimport antigravity\n")
    heading, pins = "# What was tested\n", "same==1.0\nother==1.0\nnew==1.0\ngone==1.0\n"
    tested = audit.note_contents(found(tmp_path), pins, heading)
    assert tested.startswith(heading)
    assert list(audit.builds(found(tmp_path), tested)) == []
    tested = "".join(line for line in tested.splitlines(True) if not line.startswith("new"))
    about = tmp_path / "other-1.0.dist-info/RECORD"
    record = audit.digest(tmp_path / "other.py", "sha256")
    about.write_text(f"other.py,{record},30\n")
    assert list(audit.files(found(tmp_path))) == []
    (wrong,) = audit.builds(found(tmp_path), tested)
    assert wrong.startswith("other==1.0 has other contents than the build that was tested")
    both = audit.note_contents(found(tmp_path), pins, tested)
    assert list(audit.builds(found(tmp_path), both)) == []
    assert both.count("other==1.0 ") == 2
    assert list(audit.builds(found(tmp_path), tested, ("CPython 3.12", "Linux", "x86_64"))) == []


def test_what_an_installer_adds_is_no_part_of_the_contents(tmp_path):
    installed(tmp_path, "plain")
    (plain,) = found(tmp_path)
    before = audit.contents(plain)
    with (tmp_path / "plain-1.0.dist-info/RECORD").open("a") as record:
        record.write("../../../bin/plain,sha256=x,1\nplain-1.0.dist-info/INSTALLER,sha256=y,4\n")
    assert audit.contents(plain) == before


def test_contents_are_known_of_pinned_versions_and_of_no_others():
    tested = (ROOT / "install/contents.txt").read_text()
    known = {line.partition(" ")[0] for line in tested.splitlines() if not line.startswith("#")}
    pins = {
        f"{audit.canonicalize_name(pin.name)}{pin.specifier}" for pin, _ in audit.requirements(PINS)
    }
    assert known <= pins
    assert len(known) > 0.9 * len(pins)


def test_a_file_that_two_packages_install_is_one_of_theirs(tmp_path):
    shared = installed(tmp_path, "shared", "1.0")
    other = tmp_path / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.4\nName: other\nVersion: 1.0\n")
    (other / "RECORD").write_text("shared.py,sha256=something_else,12\n")
    assert list(audit.files(found(tmp_path))) == []
    shared.write_text("neither\n")
    assert len(list(audit.files(found(tmp_path)))) == 1


def test_messages_advise_no_package_that_nobody_has_registered():
    code = [
        path
        for part in ("trainer", "pipelines", "models", "cluster", "docs", "benchmarks")
        for path in (ROOT / part).rglob("*")
        if path.suffix in {".py", ".md"}
    ]
    assert [path for path in code if "lapflow-trainer[" in path.read_text()] == []
