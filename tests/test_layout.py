"""The house: imports run one way, two files do the job alone, what is optional is opened by name, rooms stay small."""

from __future__ import annotations

import ast
import graphlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import dino_cache
import progress_utils
from support import ROOT, make_trajectory, tree

WING = "dino_cache_extras"
OWN = ("dino_cache", "progress_utils", WING)
MAY_IMPORT = {"progress_utils": set(), "dino_cache": {"progress_utils"}, WING: set(OWN)}  # which of ours, statically
MOST_LINES = {"dino_cache.py": 7_000, "progress_utils.py": 1_900}  # of any other file: 800
MOST_LINES_OF_A_ROOM = 800
MOST_LINES_OF_A_FUNCTION = 60  # of its body, the docstring apart
SOURCES = sorted([ROOT / "dino_cache.py", ROOT / "progress_utils.py", *(ROOT / WING).rglob("*.py")])
needs_wing = pytest.mark.skipif(not (ROOT / WING).is_dir(), reason=f"{WING} is not here")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(node: ast.AST) -> list[str]:
    """Absolute names of what an import statement imports: `from a import b` imports a, and a.b if that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def static_imports(path: Path) -> Iterator[str]:
    """All modules that a file imports anywhere but in its last lines, `if __name__ == "__main__"`."""
    body = [node for node in parsed(path).body if not is_main_guard(node)]
    for statement in body:
        for node in ast.walk(statement):
            yield from imported_modules(node)


def of_ours(modules: Iterator[str] | list[str]) -> set[str]:
    return {module for module in modules if module.partition(".")[0] in OWN}


# ---------------------------------------------------------------------------------------------------------------------
# Arrows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    own = module_name(path).partition(".")[0]
    assert {module.partition(".")[0] for module in of_ours(static_imports(path))} <= MAY_IMPORT[own]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_module_of_ours_is_imported_inside_a_function(path: Path) -> None:
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = [name for function in functions for node in ast.walk(function) for name in imported_modules(node)]
    assert of_ours(inside) == set()


def test_no_modules_import_each_other_in_a_ring() -> None:
    names = {module_name(path) for path in SOURCES}
    graph = {module_name(path): of_ours(static_imports(path)) & names for path in SOURCES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_a_script_ends_by_running_itself_under_its_own_name() -> None:
    """One module, never two: what a script opens must find the classes that its main catches."""
    for name in ("dino_cache", "progress_utils"):
        last = parsed(ROOT / f"{name}.py").body[-1]
        assert is_main_guard(last)
        assert ast.unparse(last).splitlines()[1:] == [f"    import {name}", f"    sys.exit({name}.main())"]


def test_the_record_needs_the_standard_library_only() -> None:
    """At the top of the file; filelock is imported where a lock is taken."""
    top = [name for node in parsed(ROOT / "progress_utils.py").body for name in imported_modules(node)]
    assert {name.partition(".")[0] for name in top} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("statement", "not_imported"),
    [
        ("import dino_cache", ("torch", "timm", "torchvision", "h5py", WING)),
        ("import progress_utils", ("numpy", "pydantic", "dino_cache")),
        pytest.param("from dino_cache import CacheWindows", ("timm", "torchvision"), marks=needs_wing),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement: str, not_imported: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {*not_imported} & {*done.stdout.split()}


# ---------------------------------------------------------------------------------------------------------------------
# Doors
# ---------------------------------------------------------------------------------------------------------------------


@needs_wing
@pytest.mark.parametrize("name", dino_cache.FORMAT_MODULES)
def test_a_formats_module_ends_with_the_format(name: str) -> None:
    assert isinstance(dino_cache.format_named(name), dino_cache.Format)
    last = parsed(Path(importlib.import_module(dino_cache.FORMAT_MODULES[name]).__file__)).body[-1]
    assert ast.unparse(last).startswith("FORMAT = Format(")


@needs_wing
@pytest.mark.parametrize("name", progress_utils.COMMAND_MODULES)
def test_a_commands_module_adds_arguments_and_runs(name: str) -> None:
    module = progress_utils.open_door(progress_utils.COMMAND_MODULES[name].module)
    assert callable(module.add_arguments)
    assert callable(module.run)


@needs_wing
@pytest.mark.parametrize("name", dino_cache.EXECUTOR_MODULES)
def test_an_executors_module_has_workers(name: str) -> None:
    assert callable(progress_utils.open_door(dino_cache.EXECUTOR_MODULES[name]).workers)


@needs_wing
@pytest.mark.parametrize("name", dino_cache.ENGINE_MODULES)
def test_an_engines_module_checks_and_loads(name: str) -> None:
    pytest.importorskip(name)
    module = progress_utils.open_door(dino_cache.ENGINE_MODULES[name])
    assert callable(module.check)
    assert callable(module.load)


@needs_wing
def test_every_public_name_is_there() -> None:
    for name in dino_cache.__all__:
        assert getattr(dino_cache, name) is not None
    assert {"encode_images", "CacheWindows", "load_config", "cache_trajectories"} <= {*dino_cache.__all__}


@needs_wing
def test_no_room_is_left_out_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert {*project["packages"]} == folders
    assert {module_name(path).rpartition(".")[0] for path in SOURCES if path.parent != ROOT} - {""} <= folders
    assert {*project["py-modules"]} == {"dino_cache", "progress_utils"}


@needs_wing
def test_what_is_no_module_is_in_the_package_too() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    taken = {
        path
        for package, found in patterns.items()
        for pattern in found
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {path for path in (ROOT / WING).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files - {*SOURCES} == taken


def test_the_version_is_said_in_one_place_and_by_both_commands() -> None:
    assert dino_cache.__version__ is progress_utils.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", progress_utils.__version__)
    for script in ("dino_cache.py", "progress_utils.py"):
        done = subprocess.run([sys.executable, ROOT / script, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"dino_cache {progress_utils.__version__}\n"


# ---------------------------------------------------------------------------------------------------------------------
# The two files alone
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two files, config/ and sample/, in which the sample is cached."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("dino_cache.py", "progress_utils.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("config", "sample"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("dino_cache_*"))
    done = run(folder, "dino_cache.py", "--config", "config/data/sample.yaml")
    assert done.returncode == 0, done.stderr
    assert "rendered_rooms: 4/4 trajectories completed, 0 failed, 10 chunks" in done.stdout
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of `folder`, which sees no other copy of our modules."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **environment}, check=False,
    )  # fmt: skip


CACHE = "sample/rendered_rooms/dino_cache_small"


@pytest.mark.slow
def test_two_files_alone_cache_and_look_at_progress(alone: Path) -> None:
    assert "Completed trajectories: 4" in run(alone, "progress_utils.py", "show", "--cache-dir", CACHE).stdout
    assert "rendered_rooms" in run(alone, "progress_utils.py", "list", "--root", "sample").stdout
    again = run(alone, "dino_cache.py", "--config", "config/data/sample.yaml")
    assert (again.returncode, "Remaining trajectories: 0" in again.stdout) == (0, True)
    dry = run(alone, "dino_cache.py", "--config", "config/data/sample.yaml", "--dry-run")
    assert (dry.returncode, "to do now: 0" in dry.stdout) == (0, True)


def test_two_files_alone_reset(alone: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(alone / CACHE, tmp_path / "cache")
    assert run(alone, "progress_utils.py", "reset-failed", "--cache-dir", str(cache)).returncode == 0
    assert run(alone, "progress_utils.py", "reset", "--yes", "--cache-dir", str(cache)).returncode == 0
    assert "Completed trajectories: 0" in run(alone, "progress_utils.py", "show", "--cache-dir", str(cache)).stdout


@pytest.mark.parametrize("command", progress_utils.COMMAND_MODULES)
def test_a_command_beyond_the_two_files_says_what_is_missing(alone: Path, command: str) -> None:
    before = tree(alone / CACHE)
    done = run(alone, "progress_utils.py", command, "--cache-dir", CACHE)
    assert done.returncode == 2
    assert WING in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(alone / CACHE) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"format": "recon"},
        {"format": "video"},
        {"executor": "ray"},
        {"engine": "openvino"},
        {"notify": [{"command": "true"}]},
        {"metrics_file": "m.prom"},
    ],
    ids=str,
)
def test_a_setting_beyond_the_two_files_says_what_is_missing(alone: Path, tmp_path: Path, settings: dict) -> None:
    config = yaml.safe_load((alone / "config/data/sample.yaml").read_text())
    make_trajectory(tmp_path / "data" / "t")
    config["datasets"] = {"robot": {"data_folder": str(tmp_path / "data"), **settings}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = run(alone, "dino_cache.py", "--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 2
    assert WING in done.stderr
    assert "Traceback" not in done.stderr


def test_data_of_another_format_are_not_taken_for_nothing(alone: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/t.hdf5").touch()
    config = {"weights": "random", "datasets": {"robot": {"data_folder": str(tmp_path / "data")}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = run(alone, "dino_cache.py", "--config", str(tmp_path / "config.yaml"))
    assert done.returncode == 2
    assert f"other formats need the folder {WING}" in done.stderr


def test_the_reader_is_an_import_error_where_it_is_missing(alone: Path) -> None:
    done = run(alone, "-c", "from dino_cache import CacheWindows")
    assert "ImportError: this needs dino_cache_extras.windows, which is not there" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A library that is missing
# ---------------------------------------------------------------------------------------------------------------------


def hide_library(folder: Path, library: str) -> None:
    """With this folder in PYTHONPATH, the library cannot be imported, as if it were not installed."""
    (folder / f"{library}.py").write_text(f"raise ModuleNotFoundError('No module named {library}', name='{library}')")


SHOW = ("progress_utils.py", "show", "--cache-dir", CACHE)
RUN = ("dino_cache.py", "--config", "config/data/sample.yaml", "--force-rebuild")


@pytest.mark.parametrize(
    ("library", "arguments", "code"),
    [
        ("numpy", RUN, 2),
        ("pydantic", ("dino_cache.py", "--help"), 2),
        ("torch", RUN, 2),
        *(pytest.param(library, RUN, 2, marks=pytest.mark.slow) for library in ("h5py", "torchvision")),
        pytest.param("timm", (*RUN, "--dry-run"), 2, marks=pytest.mark.slow),
        ("filelock", RUN, 2),
        ("filelock", ("progress_utils.py", "reset", "--yes", "--cache-dir", CACHE), 2),
        ("numpy", SHOW, 0),  # which needs none
    ],
)
def test_a_missing_library_ends_a_command_with_what_to_install(
    alone: Path, tmp_path: Path, library: str, arguments: tuple[str, ...], code: int
) -> None:
    hide_library(tmp_path, library)
    before = tree(alone / CACHE)
    done = run(alone, *arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert f"this needs {library}" in done.stderr
        assert "pip install" in done.stderr
    after = tree(alone / CACHE)
    assert {path: after[path] for path in before if path.endswith((".json", ".h5"))} == {
        path: before[path] for path in before if path.endswith((".json", ".h5"))
    }


def test_a_program_that_imports_us_gets_an_import_error(alone: Path, tmp_path: Path) -> None:
    hide_library(tmp_path, "yaml")
    done = run(alone, "-c", "import dino_cache", PYTHONPATH=str(tmp_path))
    assert "ImportError: this needs yaml, which cannot be imported" in done.stderr


def test_the_command_that_installs_a_library_fits_how_we_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert progress_utils.install_command("av") == "pip install -r requirements-lerobot.txt"
    assert progress_utils.install_command("lance") == "pip install -r requirements-lance.txt"
    assert progress_utils.install_command("openvino") == "pip install -r requirements-openvino.txt"
    assert progress_utils.install_command("h5py") == "pip install -r requirements.txt"
    monkeypatch.setattr(progress_utils, "__file__", str(tmp_path / "site-packages/progress_utils.py"))
    assert progress_utils.install_command("pyarrow.parquet") == 'pip install "dino-cache[lerobot]"'
    assert progress_utils.install_command("h5py") == "pip install h5py"
    monkeypatch.setattr(progress_utils, "__file__", str(tmp_path / "copied/progress_utils.py"))
    assert progress_utils.install_command("pyarrow.parquet") == "pip install pyarrow"
    assert progress_utils.install_command("yaml") == "pip install pyyaml"


def test_messages_name_a_program_as_the_user_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for started in ("/opt/dino_cache.py", "/opt/train.py"):
        monkeypatch.setattr(sys, "argv", [started])
        assert progress_utils.program_name("progress_utils.py") == "progress_utils.py"
    for started in ("/opt/bin/dino-cache", "/opt/bin/dino-cache-progress"):
        monkeypatch.setattr(sys, "argv", [started])
        assert progress_utils.program_name("progress_utils.py") == "dino-cache-progress"
        with pytest.raises(progress_utils.RefusedError, match="`dino-cache-progress rebuild --cache-dir"):
            progress_utils.Progress.parse(tmp_path, progress_utils.StoredRecord("{}", b""))


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("dino_cache.py", "--config", "config/data/sample.yaml", "--force"),
        ("dino_cache.py", "--conf", "config/data/sample.yaml"),
        ("progress_utils.py", "show", "--cache", CACHE),
        ("progress_utils.py", "reset", "--cache-dir", CACHE, "--ye"),
        ("progress_utils.py", "nonsense"),
    ],
)
def test_nothing_is_taken_for_what_it_only_resembles(alone: Path, arguments: tuple[str, ...]) -> None:
    before = tree(alone / CACHE)
    done = run(alone, *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert tree(alone / CACHE) == before


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_room_stays_small(path: Path) -> None:
    most = MOST_LINES.get(path.relative_to(ROOT).as_posix(), MOST_LINES_OF_A_ROOM)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_function_fits_a_screen(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None
            lines = node.end_lineno - (first.end_lineno if has_docstring else node.lineno)
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"
