"""The docs are whole: what the program has stands in them, what they show runs, where they point there is something."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import dino_cache
import progress_utils
from support import ROOT

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))  # what describes the program
LINKING_PAGES = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
MOST_README_LINES = 200
BLOCK_TIMEOUT_S = 120

# The commands of progress_utils.py itself, and those of dino_cache_extras, whose modules are opened one at a time.
OWN_COMMANDS = ("show", "list", "reset", "reset-failed")
EXTRA_COMMANDS = tuple(progress_utils.COMMAND_MODULES)
COMMANDS = (*OWN_COMMANDS, *EXTRA_COMMANDS)


def without_code(text: str) -> str:
    """Markdown without what stands in fences or is indented as code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def section(page: Path, title: str) -> str:
    """What stands under a heading of that title, up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return parts[parts.index(title) + 1]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row in a text, without heads and rules."""
    lines = text.splitlines()
    is_rule = [re.fullmatch(r"\|[-:| ]+\|", line) is not None for line in lines]
    heads = {place - 1 for place, rule in enumerate(is_rule) if rule}
    rows = [line for place, line in enumerate(lines) if line.startswith("|") and place not in heads | {-1}]
    return [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
        for row in rows
        if not re.fullmatch(r"\|[-:| ]+\|", row)
    ]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def documented_options(cell: str) -> set[str]:
    """--option and -o among the code spans of a cell."""
    return {word for span in code_spans(cell) for word in re.findall(r"(?<!\S)--?[a-z][a-z-]*", span)}


# ======================================================================================================================
# Commands, options and exit codes
# ======================================================================================================================


def options_of(*command: str) -> set[str]:
    """What the help of a command line names, but -h."""
    script, *arguments = command
    line = [sys.executable, str(ROOT / script), *arguments, "--help"]
    shown = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout
    heads = re.findall(r"^  (-.+?)(?:  |$)", shown, flags=re.MULTILINE)  # `  -o PATH, --output PATH  the file`
    found = {option for head in heads for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", head)}
    return found - {"-h", "--help"}


def test_every_option_of_a_run_has_a_row() -> None:
    rows = table_rows(section(ROOT / "docs" / "operations.md", "The run"))
    documented = set().union(*(documented_options(row[0]) for row in rows))
    assert documented == options_of("dino_cache.py")


def test_every_command_has_a_row() -> None:
    rows = table_rows(section(ROOT / "docs" / "operations.md", "Looking at a cache, and mending it"))
    assert sorted(row[0].strip("`") for row in rows) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_in_its_row(command: str) -> None:
    rows = table_rows(section(ROOT / "docs" / "operations.md", "Looking at a cache, and mending it"))
    (options,) = [row[1] for row in rows if row[0] == f"`{command}`"]
    assert documented_options(options) == options_of("progress_utils.py", command)


def test_version_of_progress_utils_is_documented() -> None:
    assert "progress_utils.py --version" in (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert options_of("progress_utils.py") == {"--version"}


def error_exit_codes() -> set[int]:
    """Those that errors of the program carry."""
    errors = [dino_cache.DinoCacheError]
    for error in errors:
        errors += error.__subclasses__()
    return {error.exit_code for error in errors if hasattr(error, "exit_code")}


def test_every_exit_code_has_a_row() -> None:
    text = section(ROOT / "docs" / "operations.md", "Exit codes")
    of_runs, of_commands = text.split("Of `progress_utils.py`:")
    run_codes = {int(row[0]) for row in table_rows(of_runs)}
    assert run_codes == {0, 1, 2, 3, 4, 5, 128 + signal.SIGINT, 128 + signal.SIGTERM}
    assert {int(row[0]) for row in table_rows(of_commands)} == {0, 1, 2, 4, 128 + signal.SIGINT}
    assert error_exit_codes() <= run_codes
    assert {value for name, value in vars(dino_cache).items() if name.startswith("EXIT_")} <= run_codes
    assert all(str(128 + number) in text for number in dino_cache.STOP_SIGNALS)


# ======================================================================================================================
# Configuration keys
# ======================================================================================================================

MODELS_AND_TITLES = [
    (dino_cache.CacheSpec, "What is stored"),
    (dino_cache.RunOptions, "How it runs"),
    (dino_cache.DatasetPaths, "Datasets"),
]


def documented_keys(title: str) -> dict[str, str]:
    """Key -> the default that the table under a heading of configuration.md states."""
    rows = table_rows(section(ROOT / "docs" / "configuration.md", title))
    return {row[0].strip("`"): row[1] for row in rows}


@pytest.mark.parametrize(("model", "title"), MODELS_AND_TITLES)
def test_every_configuration_key_has_a_row_and_no_other(model: type, title: str) -> None:
    keys = [key for key in documented_keys(title) if key != "datasets"]
    assert keys == list(model.model_fields)


@pytest.mark.parametrize(("model", "title"), MODELS_AND_TITLES)
def test_documented_defaults_are_those_of_the_program(model: type, title: str) -> None:
    for key, cell in documented_keys(title).items():
        if cell == "required":
            assert key == "datasets" or model.model_fields[key].is_required()
        else:
            default = model.model_fields[key].default
            stated = yaml.safe_load(cell.strip("`"))
            assert stated == (list(default) if isinstance(default, tuple) else default), key


def test_every_model_is_named() -> None:
    rows = table_rows(section(ROOT / "docs" / "configuration.md", "Models"))
    assert [name for row in rows for name in code_spans(row[0])] == [
        *(name for name in dino_cache.MODEL_NAMES if name in ("small", "base", "large", "giant")),
        *(name for name in dino_cache.MODEL_NAMES if name.endswith("_reg")),
        *(name for name in dino_cache.MODEL_NAMES if name.startswith("dinov3_")),
    ]


# ======================================================================================================================
# Messages
# ======================================================================================================================

LEAST_WORDS = 3  # of a text that a test looks for, to be a message and not a name in one


def flat(text: str) -> str:
    return " ".join(text.replace("`", "").replace(r"\|", "|").lower().split())


def constants(node: ast.expr) -> list[str]:
    """The texts that an expression is put together of, without what it fills in."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [text for part in node.values for text in constants(part)]
    return [*constants(node.left), *constants(node.right)] if isinstance(node, ast.BinOp) else []


def pinned_messages() -> dict[str, str]:
    """Where -> the longest text of every `<text> in <outcome>.err` (or .stderr) of the tests."""
    pinned = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
                said = max(constants(node.left), key=len, default="").strip(" .,:;()'\"\n")
                if re.search(r"\.(std)?err\b", ast.unparse(node.comparators[0])) and len(said.split()) >= LEAST_WORDS:
                    pinned[f"{path.name}:{node.lineno}"] = said
    return pinned


def words_of(text: str) -> list[str]:
    return [word for word in (word.strip(".,:;()?'\"") for word in flat(text).split()) if word]


def is_documented(said: str, spans: list[str]) -> bool:
    """Whether half of a message's words, and two at least, stand in this order in one documented message."""
    words = words_of(said)
    for span in spans:
        lengths = [0] * (len(words) + 1)  # of the longest common sequence, row by row
        for word in words_of(span):
            row = [0]
            for place, other in enumerate(words):
                row.append(lengths[place] + 1 if word == other else max(row[-1], lengths[place + 1]))
            lengths = row
        if lengths[-1] >= max(2, len(words) / 2):
            return True
    return False


def test_every_message_that_tests_look_for_is_documented() -> None:
    """On a page as it is, or by what stays of a documented message, of which `...` stands for the rest."""
    pages = [ROOT / "docs" / name for name in ("troubleshooting.md", "operations.md")]
    text = flat(" ".join(page.read_text(encoding="utf-8") for page in pages))
    spans = [span for row in table_rows(section(pages[0], "Messages")) for span in code_spans(row[0])]
    pinned = pinned_messages()
    assert len(pinned) > 80
    pinned = {where: said for where, said in pinned.items() if flat(said) not in text}
    missing = {where: said for where, said in pinned.items() if not is_documented(said, spans)}
    assert missing == {}, "\n".join(f"{where}: {said}" for where, said in missing.items())


# ======================================================================================================================
# Python blocks
# ======================================================================================================================


class Block(NamedTuple):
    """A ```python block of a page."""

    page: Path
    line: int
    code: str


def python_blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, match.start()) + 1, match[1])


BLOCKS = list(python_blocks())


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with the project where a user's PYTHONPATH has it."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=BLOCK_TIMEOUT_S, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def cached_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sample/, cached as the README says, and config/."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "config", folder / "config")
    shutil.copytree(ROOT / "sample", folder / "sample", ignore=shutil.ignore_patterns("dino_cache_*"))
    done = run_python(folder, str(ROOT / "dino_cache.py"), "--config", "config/data/sample.yaml")
    *_, summary, verdict = done.stdout.splitlines() or ["", ""]
    assert summary == "rendered_rooms: 4/4 trajectories completed, 0 failed, 10 chunks", done.stderr
    readme = README.read_text(encoding="utf-8")
    assert summary in readme
    assert verdict.partition(" left")[0] + " left" in readme
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_every_python_block_runs(block: Block, cached_sample: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cached_sample, tmp_path / "clone")
    (folder / "block.py").write_text(block.code, encoding="utf-8")
    done = run_python(folder, "block.py")
    assert done.returncode == 0, done.stderr


# ======================================================================================================================
# Links and length
# ======================================================================================================================


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", without_code(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def relative_links(page: Path) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [link for link in links if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", LINKING_PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in relative_links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_docs_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in relative_links(README)}
    assert {page.resolve() for page in PAGES} - {README.resolve()} <= linked


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES
