"""What to write instead: a refused configuration is answered with the line, what was found there and what is meant."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from dino_cache import DINOV2_NAMES, DINOV3_NAMES, FRAME_PATTERN, MODEL_NAMES, DatasetPaths, recordable_name
from progress_utils import printable

CHANNELS = (1, 3, 4)  # what an image_size of three numbers has beside height and width
FOLDERS_LOOKED_INTO = 100  # below data_folder, for pictures of another name
SHOWN_ENTRIES = 5  # of a folder
SIZES = {"s": "small", "splus": "small_plus", "b": "base", "l": "large", "g": "giant", "hplus": "huge_plus", "7b": "7b"}
NUMBERED_PICTURE = re.compile(r"(.*?)(\d+)\.(jpe?g|png)", re.IGNORECASE | re.DOTALL)


def advised(path: Path, messages: Iterable[str], set_otherwise: Collection[str]) -> list[str]:
    """The lines of a refusal with what helps added to them; those on keys in `set_otherwise`, which the command line
    sets, as they are."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return [*messages]
    try:
        places = key_places(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return [*messages, *_tab_advice(path, text), *_quotes_advice(path, text, error)]
    known = sorted(places.keys() - set_otherwise, key=len, reverse=True)
    patterns = {_plain(node) for key, (_, node) in places.items() if key.rpartition(".")[2] == "frame_pattern"}
    return [f"{_with_place(path, message, known, places)}{_frames_advice(message, patterns)}" for message in messages]


def key_places(top: yaml.Node | None) -> dict[str, tuple[int, yaml.Node]]:
    """Each key of a configuration, those of datasets as datasets.<name>.<key>: its line, from 1, and its value."""
    places: dict[str, tuple[int, yaml.Node]] = {}

    def take(node: yaml.Node | None, prefix: str, depth: int) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                name = f"{prefix}{key.value}"
                places.setdefault(name, (key.start_mark.line + 1, value))
                if name == "datasets" or depth == 1:
                    take(value, f"{name}.", depth + 1)

    take(top, "", 0)
    return places


def _with_place(path: Path, message: str, known: list[str], places: dict[str, tuple[int, yaml.Node]]) -> str:
    said = message.removeprefix(f"{path}: ").removeprefix("unknown key ")
    key = next((key for key in known if said.startswith(f"{key}:")), None)
    if key is None:
        return message
    line, node = places[key]
    value = _plain(node)
    advice = _ADVICE.get(key.rpartition(".")[2] if key.startswith("datasets.") else key, lambda *_: None)
    hint = advice(path, key, value, message)
    return f"{message} (line {line}{f': {hint}' if hint else ''})"


def _plain(node: yaml.Node) -> Any:
    """A value of a few texts and numbers; None for anything else. Anchors can make a few lines gigabytes."""
    if isinstance(node, yaml.ScalarNode):
        try:
            return yaml.safe_load(node.value) if node.style is None else node.value
        except (yaml.YAMLError, ValueError):
            return node.value
    if isinstance(node, yaml.SequenceNode) and len(node.value) <= SHOWN_ENTRIES:
        return [_plain(item) if isinstance(item, yaml.ScalarNode) else item for item in node.value]
    return None


def _tab_advice(path: Path, text: str) -> list[str]:
    depth, opens = 0, False  # of the line before: its spaces, and whether a mapping begins behind it
    for number, line in enumerate(text.splitlines(), 1):
        said = line.lstrip()
        indent = line[: len(line) - len(said)]
        if "\t" in indent:
            spaces = " " * (depth + 2 * opens) + said
            return [f"{path}: line {number} is indented by a tab: {line[:100]!r}; write spaces: {spaces[:100]!r}"]
        if said and not said.startswith("#"):
            depth, opens = len(indent), said.partition(" #")[0].rstrip().endswith(":")
    return []


def _quotes_advice(path: Path, text: str, error: Exception) -> list[str]:
    """Of a regular expression in double quotes, in which YAML reads a backslash as an escape."""
    mark = getattr(error, "problem_mark", None)
    if mark is None or "unknown escape character" not in str(error):
        return []
    line = text.splitlines()[mark.line]
    if (found := re.search(r"""^\s*([\w]+):\s*"([^"']*)"(?:\s|$)""", line)) is None:
        return []
    key, value = found.groups()
    return [f"{path}: line {mark.line + 1}: a backslash in double quotes is an escape; write `{key}: '{value}'`"]


def _image_size(_: Path, key: str, value: Any, message: str) -> str | None:
    numbers = [value, value] if isinstance(value, int) else value
    if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers):
        return None
    if numbers == value and len(numbers) == 2:
        return None  # its form is right
    if len(numbers) == 3:
        numbers = numbers[1:] if numbers[0] in CHANNELS else numbers[:2] if numbers[2] in CHANNELS else []
    return f"write `image_size: {numbers}`, height and width, without channels" if len(numbers) == 2 else None


def known_model(name: str) -> str | None:
    """The dino_model_type that a model's official name means, on the torch hub, the Hugging Face hub or in timm."""
    short = name.rpartition("/")[2].lower().replace("_", "-").replace("dinov2-with-registers-", "dinov2-reg-")
    for ours, timm_name in MODEL_NAMES.items():
        if short in (
            timm_name.replace("_", "-"),
            timm_name.partition(".")[0].replace("_", "-"),
            ours.replace("_", "-"),
        ):
            return ours
    found = re.match(r"dinov([23])-(reg-)?(?:vit)?(7b|[a-z]+?)(?:14|16)?(plus)?(-reg)?(?:-lc|-pretrain.*)?$", short)
    if found is None:
        return None
    version, reg_before, size, plus, reg_after = found.groups()
    size = SIZES.get(f"{size}{plus or ''}", size)
    ours = size + ("_reg" if reg_before or reg_after else "") if version == "2" else f"dinov3_{size}"
    return ours if ours in (DINOV2_NAMES if version == "2" else DINOV3_NAMES) else None


def _model(_: Path, key: str, value: Any, message: str) -> str | None:
    ours = known_model(value) if isinstance(value, str) else None
    return f"write `dino_model_type: {ours}`" if ours else None


def _datasets(_: Path, key: str, value: Any, message: str) -> str | None:
    if not isinstance(value, list):
        return None
    name = "my_robot"
    settings = {"data_folder": "/data/my_robot"}
    for item in value[:1]:
        pairs = item.value if isinstance(item, yaml.MappingNode) else ()
        found = {one.value: _plain(other) for one, other in pairs if isinstance(one, yaml.ScalarNode)}
        if isinstance(found.get("data_folder"), str):
            settings["data_folder"] = found["data_folder"]
        name = next((found[one] for one in ("name", "dataset_name") if isinstance(found.get(one), str)), name)
    return f"it is a list; write names: `datasets: {{{name}: {{data_folder: {settings['data_folder']}}}}}`"


def _of_a_dataset(_: Path, key: str, value: Any, message: str) -> str | None:
    if key.startswith("datasets."):
        return None
    said = value if isinstance(value, str) else "..."
    return f"it belongs below a dataset: `datasets: {{my_robot: {{{key}: {said}}}}}`"


def _data_folder(path: Path, key: str, value: Any, message: str) -> str | None:
    if (hint := _of_a_dataset(path, key, value, message)) or not isinstance(value, str):
        return hint
    folder = Path(os.path.expandvars(os.path.expanduser(value)))
    if folder.is_absolute() or " is not a folder" not in message:
        return None
    here, meant = path.absolute().parent, Path.cwd() / folder
    said = f"{value!r} is relative to the folder of this file, {here}"
    if meant.is_dir():
        return f"{said}; write `data_folder: {meant}`"
    above = Path(os.path.abspath(here / folder))
    above = next(parent for parent in above.parents if parent.is_dir())
    names = sorted(entry.name for entry in os.scandir(above) if entry.is_dir())
    return f"{said}; {above} holds {', '.join(names[:SHOWN_ENTRIES]) or 'no folder'}; write the whole path"


def _frames_advice(message: str, patterns: Collection[Any]) -> str:
    """Where no trajectories were found: the frame_pattern of pictures there, unless it is among those that are set."""
    before, found, _ = message.partition(": no trajectories below it")
    for _, _, files in itertools.islice(os.walk(before.rpartition(": ")[2]), FOLDERS_LOOKED_INTO if found else 0):
        if (pattern := pattern_for(files)) and yaml.safe_load(pattern) not in patterns:
            return f" It holds pictures that frame_pattern: {printable(pattern)} reads"
    return ""


def pattern_advice(names: Iterable[str]) -> str:
    """The frame_pattern that reads pictures among a folder's files, as a sentence; none where it has none."""
    pattern = pattern_for(names)
    return f". frame_pattern: {printable(recordable_name(pattern))} reads its pictures" if pattern else ""


def pattern_for(names: Iterable[str]) -> str | None:
    """The frame_pattern, as a configuration has it, that reads pictures of which one is among `names`; None where none
    is numbered."""
    for name in sorted(names):
        if (found := NUMBERED_PICTURE.fullmatch(name)) and not re.fullmatch(FRAME_PATTERN, name):
            before, _, suffix = found.groups()
            pattern = rf"{re.escape(before)}(\d+)\.{suffix}"
            return "'" + pattern.replace("'", "''") + "'"
    return None


_ADVICE: dict[str, Callable[[Path, str, Any, str], str | None]] = {
    **dict.fromkeys(DatasetPaths.model_fields, _of_a_dataset),
    "data_folder": _data_folder,
    "image_size": _image_size,
    "dino_model_type": _model,
    "datasets": _datasets,
}
