# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmarks say of another commit's library, and of the passes that memory limits."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import commits, passes

pytestmark = pytest.mark.cpu_only("of what runs on the CPU")


@pytest.mark.parametrize("kind", [row.kind for row in passes.rows(1)])
def test_passes_are_verified_and_move_what_they_say(kind: str) -> None:
    found, text, record = passes.measure(passes.Row(kind, 64, 48, 1), rounds=2)
    bound = "read" if kind == "column sum" else "copy"
    assert [t.provider for t in found] == [bound, "ffn_ops", "eager"] and not any(t.note for t in found)
    assert found[1].error is not None and found[1].error <= 1 and f"of {bound}" in text
    matrices = {"gated_act": 3, "gated_act backward": 5, "column sum": 1, "dispatch": 9, "combine": 9}
    assert record["bytes"] == matrices[kind] * 64 * 48 * 4


def test_wrong_pass_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = passes.pass_of
    monkeypatch.setattr(
        passes, "pass_of", lambda row: dataclasses.replace(right(row), ours=lambda: [torch.zeros(row.T, row.width)])
    )
    copy, ours, eager = passes.measure(passes.Row("combine", 64, 48, 1), rounds=1)[0]
    assert ours.refused and not ours.seconds and copy.seconds and eager.seconds


@pytest.mark.parametrize("wrong", [["--threads", "0"], ["--rounds", "-1"], ["--rounds", "many"]])
def test_numbers_of_a_command_are_checked(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        passes.main(wrong)
    assert f"{wrong[0]}: expected a whole number of at least 1, got '{wrong[1]}'" in capsys.readouterr().err


def test_a_row_that_became_slower_is_named() -> None:
    def row(name: str, ours: list[float], other: list[float]) -> dict[str, Any]:
        return {"name": name, "providers": {"new": {"seconds": ours}, "old": {"seconds": other}}}

    rows = [
        row("faster", [1.0, 1.0, 1.0], [1.2, 1.1, 0.5]),
        row("slower", [1.0, 1.0, 5.0], [0.8, 0.9, 4.0]),
        row("equal", [1.0, 2.0, 1.0], [0.97, 1.94, 1.0]),
        row("only new", [1.0], []),
    ]
    assert commits.slower_rows(rows, "new", "old") == ["slower: 0.80 of the speed of old"]


def test_package_of_another_commit_is_built_once_beside_these_benchmarks(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "rows.txt").write_text("old")
    build = "pathlib.Path('built').write_text(os.environ['FFN_OPS_CUDA'])\npathlib.Path('build').mkdir()\n"
    (tmp_path / "setup.py").write_text("import os, pathlib\n" + build)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "old")
    commit = commits.commit_of("HEAD", tmp_path)
    (tmp_path / "benchmarks" / "rows.txt").write_text("new")
    folder = commits.package_of(commit, tmp_path)
    assert (folder / "built").read_text() == "0" and not (folder / "build").exists()
    assert (folder / "benchmarks" / "rows.txt").read_text() == "new"
    (folder / "built").write_text("once")
    assert commits.package_of(commit, tmp_path) == folder and (folder / "built").read_text() == "once"
    with pytest.raises(ValueError, match="a commit of this repository, got 'nothing'"):
        commits.commit_of("nothing", tmp_path)
