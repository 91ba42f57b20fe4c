"""``python -m ffn_ops compare`` with bad texts, folders, devices, numbers: one line, exit code 2, no half result."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from comparing import command

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from ffn_ops.compare import text
from ffn_ops.compare.settings import CompareError

pytestmark = pytest.mark.cpu_only("the comparison runs on the CPU")

BAD_TEXTS = {
    "missing": "no such file",
    "folder": "expected a regular file, got a folder",
    "empty": "the file is empty",
    "short": "too short: 100 bytes, at least",
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_text_is_one_line_and_exit_code_2(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / kind, tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"x" * 100)
    assert command("--text", str(path), "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert BAD_TEXTS[kind] in printed.err and str(path) in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such devices")
def test_endless_text_is_refused() -> None:
    with pytest.raises(CompareError, match="device, pipe or socket"):
        text.load(Path("/dev/zero"), 32)


def test_unreadable_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "text"
    path.write_bytes(b"x" * 10_000)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CompareError, match="cannot be read: Permission denied"):
        text.load(path, 32)


def test_bad_folder_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert command("--out", str(tmp_path / "file")) == 2
    assert command("--out", str(tmp_path / "file" / "below")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("error: --out" in line for line in lines)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_bad_device_is_exit_code_2(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--device", device, "--out", str(tmp_path / "out")) == 2
    assert f"error: --device {device}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps", "--seeds", "--repeats"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_bad_number_is_exit_code_2(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(f"{option}={value}")
    assert stopped.value.code == 2
    assert "expected a whole number of at least 1" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command() == 2
    assert "matplotlib and rich not installed: pip install 'ffn_ops[compare]'" in capsys.readouterr().err
