"""examples/gpu_queue.py: a dry run that is killed and called again, and the parts of the queue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "gpu_queue.py"
STAGES = ["tests", "bench", "speed", "resnet18", "efficientnet_b0", "resnet50"]
# `make test` has the plugin; without it the stage must say so.
BENCH = "ok" if find_spec("pytest_benchmark") else "cannot"


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        # In a worker of pytest-xdist the pytest of a stage would leave the benchmarks away.
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        import gpu

        yield gpu


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(folder: Path, *words: str) -> list[str]:
    where = ["--out", str(folder / "out"), "--work", str(folder / "work")]
    return [sys.executable, str(SCRIPT), "--dry-run", *where, "--time-limit", "3000", *words]


class TestDryRun:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Of a dry run that was killed while the study ran two runs at once, and called again."""
        folder = tmp_path_factory.mktemp("queue")
        process = subprocess.Popen(command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        runs = folder / "work" / "dry" / "runs.jsonl"
        while not runs.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.communicate()
        before = [line["stage"] for line in lines(folder / "out" / "stages.jsonl")]
        assert before == STAGES[:3]
        assert len(lines(runs)) < 4
        done = subprocess.run(command(folder), capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)
        assert done.returncode == (0 if BENCH == "ok" else 1)
        return folder

    def test_every_stage_ends_well_and_is_not_run_twice(self, folder: Path) -> None:
        known = lines(folder / "out" / "stages.jsonl")
        statuses = {line["stage"]: line["status"] for line in known}
        assert statuses == dict.fromkeys(STAGES, "ok") | {"bench": BENCH}
        twice = ["bench"] if BENCH == "cannot" else []
        assert [line["stage"] for line in known] == [*STAGES[:3], *twice, *STAGES[3:]]
        for line in known:
            assert line["dry_run"]
            assert line["device"] == "cpu"
            assert line["versions"]["torch"]

    def test_no_run_of_the_study_is_lost_or_repeated(self, folder: Path) -> None:
        """Each network's stage has four: plain, CLIMB, noise, untrained."""
        runs = lines(folder / "out" / "runs.jsonl")
        assert len({run["name"] for run in runs}) == len(runs) == 12
        assert sorted(run["settings"]["regulariser"] for run in runs[:4]) == [
            "climb",
            "noise",
            "plain",
            "untrained",
        ]
        assert not list((folder / "work" / "dry").glob(".*.pt"))

    def test_a_stage_has_figures_and_says_what_was_not_checked(self, folder: Path) -> None:
        known = {line["stage"]: line for line in lines(folder / "out" / "stages.jsonl")}
        tests = known["tests"]["figures"]
        assert tests["tests"]["passed"] > 10
        assert any("captured_graph_refuses" in line for line in tests["not_checked"])
        speed = known["speed"]["figures"]
        whole = speed["tables"]["A step of the study: DINO, whole"]
        assert [row["step"] for row in whole] == ["plain, eager", "CLIMB, eager"]
        assert all(float(row["images/s"]) > 0 for row in whole)
        assert any("device is busy" in line for line in speed["not_checked"])
        if BENCH == "ok":
            titles = " ".join(known["bench"]["figures"]["tables"])
            for word in ("Training step", "Sample and terms", "projection head", "graph break"):
                assert word in titles
        else:
            assert "no module named pytest_benchmark" in known["bench"]["reason"]

    def test_a_call_leaves_few_small_files(self, folder: Path) -> None:
        """Eight come back from some machines that are lent."""
        files = list((folder / "out").iterdir())
        assert len(files) <= 8
        assert sum(path.stat().st_size for path in files) < 1e6

    def test_results_that_are_given_back_are_recognised(self, folder: Path, tmp_path: Path) -> None:
        """On another machine: nothing but --out of the former call is there."""
        given = ["--before", str(folder / "out"), "--only", "tests,resnet18,resnet50"]
        again = command(tmp_path, *given, "--again", "resnet18")
        done = subprocess.run(again, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "tests: ok in a former call" in done.stdout
        assert "resnet50: ok in a former call" in done.stdout
        log = (tmp_path / "out" / "resnet18.log").read_text()
        assert "4 of 4 runs are in" in log
        assert lines(tmp_path / "out" / "runs.jsonl") == lines(folder / "out" / "runs.jsonl")


class TestQueue:
    """Stages of a moment."""

    @pytest.fixture
    def call(self, tmp_path: Path) -> Any:
        from gpu.machine import Machine
        from gpu.queue import Call, Folders

        folders = Folders(tmp_path / "out", tmp_path / "work")
        for folder in (folders.out, folders.work):
            folder.mkdir()
        return Call(
            folders=folders,
            machine=Machine(device="a GPU", missing=("nothing_of_this_name",)),
            environment=dict(os.environ),
            revision="abc",
            dry_run=False,
            deadline=time.monotonic() + 100,
        )

    def stage(self, name: str, code: str, **more: Any) -> Any:
        from gpu.stages import Stage

        given: dict[str, Any] = {"limit": 50, "least": 1, "modules": (), **more}
        return Stage(name, "a test", (sys.executable, "-c", code), ROOT, **given)

    def said(self, call: Any) -> list[tuple[str, str]]:
        return [(line["stage"], line["status"]) for line in lines(call.folders.stages)]

    def test_one_that_fails_or_cannot_run_stops_no_other(self, call: Any) -> None:
        from gpu.records import read

        stages = [
            self.stage("broken", "print('before'); raise SystemError('of the test')"),
            self.stage("missing", "", modules=("os", "nothing_of_this_name")),
            self.stage("no data", "", files=(ROOT / "no-such-file",)),
            self.stage("slow", "import time; time.sleep(99)", limit=1),
            self.stage("long", "", least=1000),
            self.stage("good", "print('| a | b |\\n| - | - |\\n| 1 | 2 |')"),
        ]
        assert not call.go(stages)
        known = {line["stage"]: line for line in lines(call.folders.stages)}
        assert {name: line["status"] for name, line in known.items()} == {
            "broken": "failed",
            "missing": "cannot",
            "no data": "cannot",
            "slow": "timeout",
            "good": "ok",
        }
        assert "SystemError: of the test" in known["broken"]["reason"]
        assert "no module named nothing_of_this_name:" in known["missing"]["reason"]
        assert "no-such-file is not there" in known["no data"]["reason"]
        assert list(known["good"]["figures"]["tables"].values()) == [[{"a": "1", "b": "2"}]]
        assert "before" in call.folders.log(stages[0]).read_text()
        with call.folders.stages.open("a") as file:
            file.write('{"cut')  # by a kill
        assert not call.go(stages[:4])
        whole = read(call.folders.stages)
        assert [line["stage"] for line in whole[5:]] == ["missing", "no data"]

    def test_again_and_what_goes_on(self, call: Any) -> None:
        """Exit code 1 of the study says that the time was up; that of an error is one, too."""
        good = self.stage("good", "")
        study = self.stage("study", "raise SystemExit(1)", goes_on=True)
        wrong = self.stage("wrong", "raise ValueError", goes_on=True)
        for _ in range(2):
            call.go([good, study, wrong])
        once = [("good", "ok"), ("study", "timeout"), ("wrong", "failed")]
        assert self.said(call) == [*once, ("study", "timeout")]
        replace(call, again=["good"]).go([good])
        replace(call, revision="mended").go([good, wrong])
        assert self.said(call)[4:] == [("good", "ok"), ("wrong", "failed")]

    def test_one_that_the_end_of_the_call_cuts_is_begun_again(self, call: Any) -> None:
        slow = self.stage("slow", "import time; time.sleep(99)")
        for _ in range(2):
            replace(call, deadline=time.monotonic() + 1.5).go([slow])
        assert self.said(call) == [("slow", "timeout")] * 2

    def test_without_a_gpu_every_stage_says_so(self, call: Any) -> None:
        from gpu.machine import Machine

        assert not replace(call, machine=Machine()).go([self.stage("good", "")])
        (line,) = lines(call.folders.stages)
        assert line["status"] == "cannot"
        assert "no CUDA device: --dry-run" in line["reason"]

    def test_two_calls_at_once(self, call: Any) -> None:
        from gpu.queue import _alone

        lock = call.folders.work / "lock"
        with (
            _alone(lock),
            pytest.raises(RuntimeError, match="another call is at work in"),
            _alone(lock, patience=0.1),
        ):
            pass


class TestRunner:
    FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
print(child.pid, flush=True)
time.sleep(99)
"""

    def child(self, log: Path) -> int:
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.02)
        return int(log.read_text())

    def assert_gone(self, pid: int) -> None:
        for _ in range(200):
            status = Path(f"/proc/{pid}/status")
            if not status.exists() or "State:\tZ" in status.read_text():
                return
            time.sleep(0.05)
        raise AssertionError(f"{pid} lives")

    def test_the_limit_ends_children_too(self, tmp_path: Path) -> None:
        from gpu.runner import run

        log = tmp_path / "log"
        ended = run(
            [sys.executable, "-c", self.FAMILY],
            folder=tmp_path,
            environment=os.environ,
            log=log,
            limit=3,
            mercy=0.2,
        )
        assert ended.code is None
        assert 3 <= ended.seconds < 20
        self.assert_gone(self.child(log))

    def test_a_command_leaves_no_process_behind(self, tmp_path: Path) -> None:
        from gpu.runner import run

        log = tmp_path / "log"
        code = self.FAMILY.replace("\ntime.sleep(99)", "\n")
        words = [sys.executable, "-c", code]
        ended = run(words, folder=tmp_path, environment=os.environ, log=log, limit=50)
        assert ended.code == 0
        self.assert_gone(self.child(log))

    def test_a_killed_queue_leaves_no_process_behind(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        code = f"""
import os, sys
from pathlib import Path
from gpu.runner import run
run([sys.executable, "-c", {self.FAMILY!r}], folder=Path({str(tmp_path)!r}),
    environment=os.environ, log=Path({str(log)!r}), limit=99)
"""
        process = subprocess.Popen([sys.executable, "-c", code], cwd=EXAMPLES)
        child = self.child(log)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.assert_gone(child)

    def test_an_interrupted_command_may_show_what_it_has(self, tmp_path: Path) -> None:
        from gpu.runner import run

        code = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('so far')"
        log = tmp_path / "log"
        words = [sys.executable, "-c", code]
        run(words, folder=tmp_path, environment=os.environ, log=log, limit=2)
        assert log.read_text() == "so far\n"


class TestFigures:
    def test_what_a_log_of_pytest_says(self) -> None:
        from gpu.figures import figures

        log = (
            "FAILED tests/a.py::b[cuda] - c\nSKIPPED [2] conftest.py:1: no d\nNot run: e.\n"
            "== 1 failed, 12 passed, 2 skipped, 1 warning in 3.21s (0:00:03) ==\n"
        )
        assert figures(log) == {
            "tests": {"failed": 1, "passed": 12, "skipped": 2},
            "failed": ["tests/a.py::b[cuda] - c"],
            "not_checked": ["conftest.py:1: no d", "e."],
        }

    def test_tables(self) -> None:
        from gpu.figures import tables

        log = "One\n\n| a | b |\n| - | --- |\n| 1 | - |\n| 2 |  |\n\nTwo\n| c |\n| - |\n"
        assert tables(log) == {"One": [{"a": "1", "b": "-"}, {"a": "2", "b": ""}], "Two": []}


class TestStages:
    @pytest.mark.parametrize("dry_run", [False, True])
    def test_they_fit_a_call_and_name_what_there_is(self, dry_run: bool, tmp_path: Path) -> None:
        from gpu.stages import SWEEP, stages

        data, runs = tmp_path / "c.npz", tmp_path / "r.jsonl"
        common: dict[str, Any] = {"data": data, "files": (data,), "runs": runs, "sweep": SWEEP}
        known = stages(dry_run=dry_run, **common, jobs=3, epochs=9)
        assert [stage.name for stage in known] == STAGES
        for stage in known:
            assert stage.least < stage.limit
            assert stage.goes_on or stage.limit < 540
            assert stage.folder.is_dir()
            for word in stage.arguments(500):
                assert "{" not in word
                if word.endswith(".py"):
                    assert (stage.folder / word).exists()
            for module in set(stage.modules) - {"pytest_benchmark"}:
                assert find_spec(module), module

    def test_the_runs_of_the_study(self, tmp_path: Path) -> None:
        """The command of the real stage, as the study reads it; the first three are a seed's."""
        import cifar10_knn

        from gpu.stages import BACKBONES, SWEEP, stages

        data, runs = tmp_path / "c.npz", tmp_path / "r.jsonl"
        common: dict[str, Any] = {"data": data, "files": (data,), "runs": runs, "sweep": SWEEP}
        known = stages(dry_run=False, **common, jobs=3, epochs=100)
        for name, stage in zip(BACKBONES, known[3:], strict=True):
            args = cifar10_knn.make_parser().parse_args(stage.arguments(500)[2:])
            assert (args.device, args.jobs, args.time_limit) == ("cuda", 3, 455)
            wanted = cifar10_knn.wanted(args)
            assert len(wanted) == 27
            assert {run.backbone for run in wanted} == {name}
            assert [(run.regulariser, run.seed) for run in wanted[:3]] == [
                ("plain", 0),
                ("climb", 0),
                ("noise", 0),
            ]
            assert {run.epochs for run in wanted} == {100}
            assert sum(run.regulariser == "untrained" for run in wanted) == 3

    def test_a_wrong_name_is_refused(self, tmp_path: Path) -> None:
        done = subprocess.run(
            command(tmp_path, "--only", "test"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "no stage test: there are tests, bench, speed" in done.stderr


def write_wheel(path: Path, **files: str) -> None:
    name, number = path.name.split("-")[:2]
    info = f"{name}-{number}.dist-info"
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
    files[f"{info}/RECORD"] = ""
    with zipfile.ZipFile(path, "w") as wheel:
        for inside, text in files.items():
            wheel.writestr(inside, text)


class TestInstall:
    """Without a network."""

    @pytest.fixture
    def wheels(self, tmp_path: Path) -> Path:
        folder = tmp_path / "wheels"
        folder.mkdir()
        write_wheel(folder / "carried-1-py3-none-any.whl", **{"carried_module.py": ""})
        return folder

    def test_wheels_and_the_checkout(self, wheels: Path, tmp_path: Path) -> None:
        """A wheel that does not fit is named and leaves the others."""
        from gpu import machine

        checkout, site = tmp_path / "checkout", tmp_path / "site"
        checkout.mkdir()
        for name in ("climb_plugin", "adapters"):
            shutil.copytree(ROOT / name, checkout / name)
        for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, checkout / name)
        write_wheel(wheels / "ancient-1-cp27-none-any.whl", **{"ancient_module.py": ""})
        problem = machine.install(wheels, checkout, site)
        assert problem.startswith("ancient-1-cp27-none-any.whl: ")
        assert ";" not in problem
        assert (site / "climb_plugin" / "adapters" / "lightly.py").exists()
        modules = ["carried_module", "ancient_module"]
        there = machine.ask(modules, machine.environment(site), EXAMPLES)
        assert there.missing == ("ancient_module",)
        assert there.versions["climb-plugin"]

    @pytest.mark.parametrize("carried", ["a = 1", "a = 2"])
    def test_the_packages_own_wheel(self, wheels: Path, tmp_path: Path, carried: str) -> None:
        from gpu import machine

        source, site = tmp_path / "checkout" / "climb_plugin", tmp_path / "site"
        adapters = source.parent / "adapters"
        for folder in (source, adapters / "hydra"):
            folder.mkdir(parents=True)
        (adapters / "hydra" / "__init__.py").write_text("")  # another package, of another name
        (source / "a.py").write_text("a = 1")
        (adapters / "b.py").write_text("b = 1")
        files = {"climb_plugin/a.py": carried, "climb_plugin/adapters/b.py": "b = 1"}
        write_wheel(wheels / "climb_plugin-1-py3-none-any.whl", **files)
        if carried == "a = 1":
            assert machine.install(wheels, source.parent, site) == ""
            assert (site / "carried_module.py").exists()
            return
        with pytest.raises(ValueError, match=r"made of other files .* \(a.py\): build the wheel"):
            machine.install(wheels, source.parent, site)

    def test_no_wheels(self, tmp_path: Path) -> None:
        done = subprocess.run(
            command(tmp_path, "--wheels", str(tmp_path)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "holds no wheel" in done.stderr
