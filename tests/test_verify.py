# SPDX-License-Identifier: BSD-3-Clause
"""``python -m ffn_ops verify``: steps with tools that pass, fail, crash and hang, the budget and the report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ffn_ops import _verify_steps as steps
from ffn_ops import verify
from ffn_ops._verify_steps import Place, Step

pytestmark = pytest.mark.cpu_only("verify itself, which is what runs these tests on a GPU")

CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--device")
    parser.addoption("--slow", action="store_true")
"""
GOOD = """
import pytest
@pytest.mark.parametrize("case", ["one", "two words: a, b", "with/slash"])
def test_good(case): pass
def test_device(request): assert request.config.getoption("--device") == "cpu"
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""
BAD = """
import pytest
def test_bad(): assert 1 + 1 == 3, "sums - are off"
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_error(broken): pass
def test_good(): pass
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A repository with its tests."""
    tests = tmp_path / "tests"
    tests.mkdir()
    for name, text in {
        "conftest.py": CONFTEST,
        "problems.py": "",
        "test_good.py": GOOD,
        "test_bad.py": BAD,
        "test_crash.py": "import os\ndef test_first(): pass\ndef test_crash(): os.abort()\n",
        "test_hang.py": "import time\ndef test_first(): pass\ndef test_hang(): time.sleep(3600)\n",
        "test_import.py": "import nothing_of_this_name\n",
        "test_none.py": "",
    }.items():
        (tests / name).write_text(text)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # importing plugins takes most of such a run
    return Place("cpu", tests)


def heard() -> tuple[list[str], Callable[[str], None]]:
    lines: list[str] = []
    return lines, lines.append


def test_output_comes_line_by_line(place: Place) -> None:
    lines, each = heard()
    code = "import sys, os; print('é'); print(os.environ['MORE']); sys.stderr.write('no end'); sys.exit(3)"
    more = Place(place.device, place.tests, (("MORE", "given"),))
    ended = steps.run_process([sys.executable, "-c", code], more, 60, each)
    assert (ended.code, ended.lines, lines) == (3, ["é", "given", "no end"], ["é", "given"])


def limit_for(code: str, place: Place) -> float:
    """Seconds in which this machine, however busy, runs the code several times."""
    start = time.monotonic()
    steps.run_process([sys.executable, "-c", code], place, 300, lambda line: None)
    return max(3.0, 6 * (time.monotonic() - start))


def test_out_of_time_is_interrupted_then_killed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.5)
    limit = limit_for("import time", place)
    saves = "import time\nprint('on')\ntry: time.sleep(3600)\nexcept KeyboardInterrupt: print('saved')\n"
    stubborn = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('on')\ntime.sleep(3600)\n"
    for code, expected in ((saves, ["on", "saved"]), (stubborn, ["on"])):
        ended = steps.run_process([sys.executable, "-c", code], place, limit, lambda line: None)
        assert ended.code is None and ended.lines == expected


def test_a_child_that_keeps_the_pipe_open_is_not_waited_for(place: Place) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '60']); print('done')"
    start = time.monotonic()
    ended = steps.run_process([sys.executable, "-c", code], place, 60, lambda line: None)
    assert ended.code == 0 and ended.lines == ["done"] and time.monotonic() - start < 40


def test_tests_are_counted(place: Place) -> None:
    lines, say = heard()
    found = steps.tests_of("test_good.py")(place, 300, say)
    assert found["status"] == "passed" and found["counts"] == {"passed": 4, "skipped": 1} and found["failures"] == []
    assert lines[-1] == "test_good.py · 4 passed · 1 skipped"


def test_failures_are_listed_and_later_files_run(place: Place) -> None:
    found = steps.tests_of("test_bad.py", "test_crash.py", "test_import.py", "test_good.py")(
        place, 300, lambda text: None
    )
    assert found["status"] == "failed" and found["counts"] == {"passed": 6, "failed": 1, "error": 1, "skipped": 1}
    assert [each["test"] for each in found["failures"]] == [
        "test_bad.py::test_error", "test_bad.py::test_bad", "test_crash.py", "test_import.py",
    ] or [each["test"] for each in found["failures"]] == [
        "test_bad.py::test_bad", "test_bad.py::test_error", "test_crash.py", "test_import.py",
    ]  # fmt: skip
    messages = {each["test"]: each["message"] for each in found["failures"]}
    assert "sums - are off" in messages["test_bad.py::test_bad"]
    assert "no fixture" in messages["test_bad.py::test_error"] and "exit status -6" in messages["test_crash.py"]
    assert "exit status 2" in messages["test_import.py"]
    assert any("nothing_of_this_name" in line for line in found["output"]["test_import.py"])
    assert found["files"]["test_good.py"] == "complete"


def test_a_hang_costs_its_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 1.0)
    start = time.monotonic()
    steps.tests_of("test_good.py")(place, 300, lambda text: None)
    limit = max(3.0, 5 * (time.monotonic() - start))  # the tests before the hang have the time that this machine needs
    found = steps.tests_of("test_hang.py", "test_good.py")(place, limit, lambda text: None)
    assert found["status"] == "incomplete" and found["counts"]["passed"] == 1
    assert found["files"] == {"test_hang.py": "out of time", "test_good.py": "no time"}


def test_nothing_for_a_device_is_skipped(place: Place) -> None:
    found = steps.tests_of("test_none.py")(place, 300, lambda text: None)
    assert found["status"] == "skipped" and "for cpu" in found["why"]


@pytest.mark.parametrize(
    ("script", "status", "errors"),
    [
        ('echo "========= ERROR SUMMARY: 0 errors"; echo $PYTORCH_NO_CUDA_MEMORY_CACHING', "passed", 0),
        ('echo "========= ERROR SUMMARY: 2 errors"; exit 99', "failed", 2),
        ('echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"; exit 99', "failed", 1),
        ("echo Segmentation fault; exit 139", "failed", None),
        ("exit 0", "failed", None),
    ],
    ids=["clean", "errors", "hazards", "crash", "says nothing"],
)
def test_sanitizer(
    script: str, status: str, errors: int | None, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    lines, say = heard()
    found = steps.sanitizer("memcheck", few=True)(Place("cuda", place.tests), 20, say)
    assert (found["status"], found["errors"]) == (status, errors)
    assert status != "passed" or lines[-1] == "1"


def test_no_sanitizer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    run = steps.sanitizer("memcheck", few=True)
    assert run(place, 20, lambda text: None)["status"] == "skipped"
    assert "no compute-sanitizer on PATH" in run(Place("cuda", place.tests), 20, lambda text: None)["why"]


BENCHMARK = """
import json, pathlib, sys, time
print("[1/2, 0 s] the first row", flush=True)
file = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps({"rows": [{"name": "first"}], "targets": [{"measured": 1.0, "reached": True}]}))
{}
"""


@pytest.mark.parametrize(
    ("end", "status"), [("", "passed"), ("sys.exit(1)", "failed"), ("time.sleep(3600)", "incomplete")]
)
def test_benchmark_keeps_its_rows(end: str, status: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.5)
    assert steps.benchmark("dense")(place, 20, lambda text: None)["status"] == "skipped"
    folder = place.root / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()  # else an installed package of this name comes first
    (folder / "dense.py").write_text(BENCHMARK.replace("{}\n", end + "\n"))
    lines, say = heard()
    limit = limit_for("import json, pathlib", place) if status == "incomplete" else 300
    found = steps.benchmark("dense")(place, limit, say)
    assert found["status"] == status and found["rows"] == [{"name": "first"}] and lines == ["[1/2, 0 s] the first row"]


# ---- the whole ------------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *arguments])


class Steps:
    """Steps that say what they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **records: Any) -> None:
        self.ran: list[str] = []
        self.seconds: list[float] = []
        self.records = {"facts": {"status": "passed", "device": "cpu", "cpu": "this"}, **records}
        made = tuple(Step(name, name, 1.0, self._runner(name)) for name in self.records)
        monkeypatch.setattr(verify, "STEPS", made)
        monkeypatch.setattr(verify, "BY_NAME", {step.name: step for step in made})

    def _runner(self, name: str) -> Callable[..., Any]:
        def run(place: Place, seconds: float, say: Callable[[str], None]) -> Any:
            self.ran.append(name)
            self.seconds.append(seconds)
            record = self.records[name]
            if isinstance(record, BaseException):
                raise record
            return dict(record)

        return run


def test_steps_share_the_time_and_are_saved(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Steps(monkeypatch, a={"status": "passed", "counts": {"passed": 3}}, b={"status": "skipped", "why": "none"})
    out = tmp_path / "new" / "report.json"
    assert verify.run(parsed("--tests", str(place.tests), "--out", str(out), "--minutes", "3")) == 0
    assert fake.ran == ["facts", "a", "b"] and fake.seconds == pytest.approx([60, 90, 180], rel=0.01)
    report = json.loads(out.read_text(encoding="utf-8"))["steps"]
    assert report["a"]["counts"] == {"passed": 3} and report["a"]["limit"] == 90 and report["a"]["seconds"] < 5
    printed = capsys.readouterr().out
    assert "3 passed" in printed and "skipped" in printed and "none" in printed


def test_it_goes_on_where_it_ended(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    arguments = ["--tests", str(place.tests), "--out", str(out)]
    fake = Steps(
        monkeypatch, a={"status": "failed"}, b={"status": "incomplete"}, c=KeyboardInterrupt(), d={"status": "passed"}
    )
    assert verify.run(parsed(*arguments)) == 1
    saved = json.loads(out.read_text(encoding="utf-8"))["steps"]
    assert {name: record["status"] for name, record in saved.items()} == {
        "facts": "passed", "a": "failed", "b": "incomplete", "c": "interrupted",
    }  # fmt: skip
    fake.records |= {"b": {"status": "passed"}, "c": RuntimeError("odd output")}
    fake.ran.clear()
    assert verify.run(parsed(*arguments)) == 1
    assert fake.ran == ["facts", "b", "c", "d"]
    assert "odd output" in json.loads(out.read_text(encoding="utf-8"))["steps"]["c"]["why"]
    fake.ran.clear()
    fake.records |= {"a": {"status": "passed"}}
    assert verify.run(parsed(*arguments, "--steps", "a")) == 0 and fake.ran == ["facts", "a"]
    assert verify.run(parsed(*arguments)) == 1  # c


def test_no_time_left(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Steps(monkeypatch, a={"status": "passed"})
    out = tmp_path / "report.json"
    assert verify.run(parsed("--tests", str(place.tests), "--out", str(out), "--minutes", "1e-9")) == 1
    assert fake.ran == []


def test_a_report_of_another_machine_is_kept(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    fake = Steps(monkeypatch, a={"status": "passed"})
    assert verify.run(parsed("--tests", str(place.tests), "--out", str(out))) == 0
    before = out.read_text(encoding="utf-8")
    fake.records["facts"] = {"status": "passed", "device": "cpu", "cpu": "another"}
    assert verify.run(parsed("--tests", str(place.tests), "--out", str(out))) == 2
    assert "cpu this, here another" in capsys.readouterr().err and out.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tests", "."], "the repository's tests are not in "),
        (["--steps", "nothing"], "expected some of facts, kernels"),
        (["--minutes", "0"], "expected a positive number"),
        (["--minutes", "nan"], "expected a positive number"),
        (["--device", "cuda"], "torch.cuda.is_available() is false"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_it_says_what_is_missing(
    arguments: list[str],
    message: str,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "report.json"
    assert verify.run(parsed("--out", str(out), "--tests", str(place.tests), *arguments)) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_tests_are_found_in_the_working_directory(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ffn_ops is installed elsewhere."""
    monkeypatch.setattr(verify, "__file__", str(tmp_path / "site-packages" / "ffn_ops" / "verify.py"))
    monkeypatch.chdir(place.root)
    assert verify._ready(parsed()) == ("", place)


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"steps": []}'])
def test_another_file_is_not_overwritten(
    text: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "notes.json"
    out.write_text(text)
    assert verify.run(parsed("--tests", str(place.tests), "--out", str(out))) == 2
    assert "no report of verify" in capsys.readouterr().err and out.read_text() == text


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run(parsed("--list")) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(verify.BY_NAME)


def test_steps_name_files_that_exist() -> None:
    """And every file of tests that is for a GPU belongs to a step."""
    folder = Path(__file__).parent
    named = {
        file
        for step in verify.STEPS
        for cell in step.run.__closure__ or ()
        if isinstance(cell.cell_contents, tuple)
        for file in cell.cell_contents
    }
    cpu_only = {"test_abi.py", "test_cuda_build.py", "test_vectors.py"}
    cpu_only |= {
        path.name for path in folder.glob("test_*.py") if "pytestmark = pytest.mark.cpu_only" in path.read_text()
    }
    assert named == {path.name for path in folder.glob("test_*.py")} - cpu_only
