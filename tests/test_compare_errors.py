# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ffn_ops compare`` with bad texts, folders, devices, numbers: one line, exit code 2, no partial result."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from comparing import command, parsed

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from ffn_ops import compare
from ffn_ops.__main__ import main as ffn_ops_main
from ffn_ops._files import whole
from ffn_ops.compare import plots, report, results, text
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
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "1000000", "9" * 5000])
def test_bad_number_is_exit_code_2(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(f"{option}={value}")
    assert stopped.value.code == 2
    assert "expected a whole number of at least 1 and at most 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", ["ffn_ops compare", "ffn_ops verify", "benchmarks.dense", "benchmarks.expert_parallel"]
)
def test_empty_name_of_a_file_is_exit_code_2(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a path it would be the working directory."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    from benchmarks import command, dense, expert_parallel

    main = {
        "benchmarks.dense": functools.partial(command.main, dense.SUITE),
        "benchmarks.expert_parallel": expert_parallel.main,
    }.get(module, ffn_ops_main)
    with pytest.raises(SystemExit) as stopped:
        main([*module.split()[1:], "--out", ""])
    assert stopped.value.code == 2 and "--out: expected a name, got ''" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_interrupted_leaves_the_last_ones_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file it was writing: no partial file, and never files of two runs."""
    files = {"plots": "loss.png", "report": "report.md", "write_json": "results.json"}
    run = ["first"]

    def writer(place: str) -> Callable[..., None]:
        def write(_results: object, *where: object) -> None:
            target = where[-1] if isinstance(where[-1], Path) else tmp_path
            file = target / files[place] if place == "plots" else target
            file.write_text(run[0][:3])
            if run[0] == place:
                raise KeyboardInterrupt
            file.write_text(run[0])

        return write

    monkeypatch.setattr(plots, "write", writer("plots"))
    monkeypatch.setattr(report, "write", writer("report"))
    monkeypatch.setattr(results, "write_json", writer("write_json"))
    record = SimpleNamespace(seconds={})
    compare.write(record, tmp_path)  # type: ignore[arg-type]
    expected = dict.fromkeys(sorted(files.values()), "first")
    assert {file.name: file.read_text() for file in sorted(tmp_path.iterdir())} == expected
    for run[0] in files:
        with pytest.raises(KeyboardInterrupt):
            compare.write(record, tmp_path)  # type: ignore[arg-type]
        assert {file.name: file.read_text() for file in sorted(tmp_path.iterdir())} == expected


def test_interrupted_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", interrupted)
    assert command("--out", str(tmp_path)) == 1
    assert "interrupted, nothing is written" in capsys.readouterr().err


def test_whole_files(tmp_path: Path) -> None:
    """What a reader sees is the old file, then the new one."""
    file = tmp_path / "new" / "file.json"
    with whole(file) as fresh:
        fresh.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(file) as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    with whole(file) as fresh:
        fresh.write_text("new")
        assert file.read_text() == "old" and fresh.suffix == ".json"
    assert file.read_text() == "new" and [f.name for f in file.parent.iterdir()] == ["file.json"]


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command() == 2
    assert "matplotlib and rich not installed: pip install 'ffn_ops[compare]'" in capsys.readouterr().err
