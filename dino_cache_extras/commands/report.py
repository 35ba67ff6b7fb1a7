"""report: one HTML file to look at in the morning."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image

from dino_cache import (
    CacheSpec,
    FrameDecoder,
    InputError,
    Trajectory,
    camera_name,
    data_keys,
    detect_format,
    format_named,
    format_names,
    open_camera,
    open_source,
    recorded_spec,
)
from dino_cache_extras.chunk_files import is_cut_by_frames, pieces
from dino_cache_extras.commands.report_facts import (
    REPORT_POINTS,
    REPORT_TRAJECTORIES,
    CacheSample,
    TrajectorySample,
    colours_of_patches,
    first_camera,
    frames_to_picture,
    read_patches,
    stored_columns,
)
from dino_cache_extras.commands.report_failures import failure_groups
from dino_cache_extras.commands.report_runs import Rate, charted, known_runs, last_rate, left_out
from dino_cache_extras.commands.report_verdict import CONFIG, num_left, verdict
from dino_cache_extras.smaller_tokens import describe_cosines
from progress_utils import (
    LOG_FILE,
    LockOwner,
    Progress,
    RefusedError,
    add_cache_dir,
    human_bytes,
    human_duration,
    load_or_refuse,
    open_library,
    print_lines,
    printable,
    progress_command,
    read_lock_owner,
    state_remarks,
    waiting_in_shards,
    write_durably,
)

if TYPE_CHECKING:
    import torch


REPORT_FRAME_FILE_BYTES = 2 << 30  # of a trajectory's own file: a video's frame times are read from all of it
REPORT_REMARKS = 4  # on one trajectory
REPORT_NAMES = 20  # of failed trajectories with one cause, of damaged files, of what was left out
REPORT_CAUSES = 30
TEMPLATES = Path(__file__).parent / "templates"
BLUE, ORANGE, GREEN, RED, PURPLE, SLATE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#5c6b7a"
STYLE_OF = {BLUE: "blue", ORANGE: "orange", GREEN: "green", RED: "red", PURPLE: "purple", SLATE: "slate"}
CHUNK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SLATE)
INK = "#010203"  # stands for the text's colour, light or dark, in figures; STYLE_OF's for the page's of that name


class Tile(NamedTuple):
    """A number, what it counts, and what is to be said of it."""

    name: str
    value: str
    more: str
    is_bad: bool = False


class Chart(NamedTuple):
    """A figure and what it shows."""

    caption: str
    svg: Any  # markup; "" where there is nothing to draw


class Card(NamedTuple):
    """What is shown of one trajectory."""

    name: str
    about: str
    remarks: list[str]
    has_map: bool
    figures: list[Any]  # markup


class Picture(NamedTuple):
    """A frame beside its patch tokens."""

    name: str
    frame: int
    height: int  # patches
    width: int
    frame_url: str | None
    patches_url: str


def report(cache_dir: Path, *, output: Path, data_folder: Path | None) -> int:
    """Write the report; `data_folder` is where the frames are, if not where the last run read them."""
    progress = load_or_refuse(cache_dir)
    open_library("matplotlib")
    open_library("jinja2")
    if output.is_dir():
        raise RefusedError(f"-o {output}: is a folder; give the name of a file")
    sample = CacheSample(progress, data_folder or (Path(progress.data_folder) if progress.data_folder else None))
    write_durably(output, page_of(sample).encode(errors="replace"))
    print_lines(f"Wrote {output} ({human_bytes(output.stat().st_size)})")
    return 0


def page_of(sample: CacheSample) -> str:
    """The whole page."""
    progress, owner = sample.progress, read_lock_owner(sample.progress.cache_dir)
    runs = known_runs(sample)
    rate = last_rate(sample, runs)
    pictures, unseen = _pictures(sample)
    configuration = _configuration(sample)
    said = verdict(sample, owner, runs)  # what was found damaged until here counts
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            verdict=said,
            placeholder=CONFIG,
            placeholder_is_shown=any(f"--config {CONFIG}" in command for command in said.commands),
            dataset=progress.dataset_name,
            cache_dir=progress.cache_dir,
            last_saved=_when(progress.last_update),
            remarks=_report_remarks(progress),
            tiles=_tiles(sample, owner, rate),
            problems=list(sample.problems),
            most=REPORT_NAMES,
            num_failures=len(progress.failures),
            groups=failure_groups(progress.failures),
            most_causes=REPORT_CAUSES,
            show_all=progress_command("show --all").strip("`"),
            log_file=LOG_FILE,
            left_out=left_out(progress.cache_dir),
            runs=charted(runs),
            figures=_charts(sample, rate),
            cards=[_card(shown) for shown in sample.trajectories],
            which=_which(sample),
            pictures=pictures,
            unseen=unseen,
            configuration=configuration,
            made=time.ctime(),
        )
    )


def _environment() -> Any:
    """Templates whose every value is escaped and one line: names and reasons come from strangers' data."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    environment.filters |= {
        "day": _when,
        "date": lambda epoch_s: _when(epoch_s, "%d %b"),
        "duration": lambda seconds: "?" if seconds is None else human_duration(seconds),
        "number": lambda number: "?" if number is None else f"{number:,}",
    }
    return environment


def _tiles(sample: CacheSample, owner: LockOwner | None, rate: Rate) -> list[Tile]:
    progress = sample.progress
    state = "idle" if owner is None else "stale" if owner.is_stale else "running"
    total = progress.num_trajectories
    share = f"of {total:,} ({100 * len(progress.records) / total:.1f}%)" if total else "of unknown"
    size = sum(sum(record["bytes"]) for record in progress.records.values())
    failed = "see below" if progress.failures else "none"
    per_s, of = rate.frames_per_s, rate.of
    if _is_at_work(owner):
        per_s, of = owner.run.frames_per_s, "of the run at work"
    return [
        Tile("completed trajectories", f"{len(progress.records):,}", share),
        Tile("failed trajectories", f"{len(progress.failures):,}", failed, bool(progress.failures)),
        Tile("frames", f"{sum(sample.num_frames.values()):,}", "each counted once"),
        Tile("chunks", f"{progress.total_chunks:,}", human_bytes(size)),
        Tile("pose jumps", *_jumps_tile(progress)),
        Tile("rate", f"{per_s:.1f} frames/s" if per_s else "?", of),
        Tile("time left", _time_left(sample, owner, rate.frames_per_s), state),
        Tile("working time", human_duration(progress.elapsed_s), "of all runs"),
    ]


def _is_at_work(owner: LockOwner | None) -> bool:
    return owner is not None and not owner.is_stale and owner.run is not None and owner.run.frames_per_s > 0


def _jumps_tile(progress: Progress) -> tuple[str, str]:
    if progress.records and all(is_cut_by_frames(progress.specs[fingerprint]) for fingerprint in progress.fingerprints):
        return "?", "not looked for: chunk_by: frames"
    jumps = sum(len(pieces(progress, name)) > 1 for name in progress.records)
    return f"{jumps:,}", "trajectories with one or more"


def _report_remarks(progress: Progress) -> list[str]:
    waiting = waiting_in_shards(progress.cache_dir, progress.records)
    remarks = state_remarks(progress) + ([waiting] if waiting else [])
    if str((progress.weights or {}).get("source", "")).startswith("random"):
        remarks.append("The weights are random: the features, their similarities and their colours mean nothing")
    return remarks


def _time_left(sample: CacheSample, owner: LockOwner | None, rate: float | None) -> str:
    progress, left = sample.progress, num_left(sample.progress)
    if _is_at_work(owner):
        return human_duration(owner.run.frames_left / owner.run.frames_per_s)
    if left == 0:
        return "none"
    if not rate or left is None or not progress.records:
        return "?"
    return human_duration(left * sum(sample.num_frames.values()) / len(progress.records) / rate)


def _charts(sample: CacheSample, rate: Rate) -> list[Chart]:
    """The rate, and histograms of the chunks."""
    lengths = [stop - start for record in sample.progress.records.values() for start, stop in record["spans"]]
    distances = [fact.distance_m for fact in sample.facts if fact.distance_m is not None]
    if not lengths:
        return []
    charts = []
    if rate.frames_per_s and rate.facts and rate.facts[-1].created_at > rate.facts[0].created_at:
        begin, end = (time.localtime(rate.facts[i].created_at) for i in (0, -1))
        day = "%a %d %b "
        until = time.strftime(("" if begin[:3] == end[:3] else day) + "%H:%M", end)
        which = "night" if "night" in rate.of else "run"
        caption = f"Rate of the last {which}, {time.strftime(day + '%H:%M', begin)} to {until}"
        charts.append(Chart(caption, _rate_figure(rate, caption)))
    charts.append(Chart("Length of all chunks", _histogram(lengths, "chunk length [frames]")))
    if distances:
        sampled = f"{len(distances):,} of {len(lengths):,} chunks" if len(distances) < len(lengths) else "all chunks"
        caption = f"Travelled distance of {sampled}"
        charts.append(Chart(caption, _histogram(distances, "chunk distance [m]")))
    elif sample.facts:
        charts.append(Chart("No travelled distances: the chunks were cut by number of frames (chunk_by: frames)", ""))
    return charts


def _rate_figure(rate: Rate, caption: str) -> Any:
    times = np.array([fact.created_at for fact in rate.facts])
    frames = np.cumsum([fact.new_frames for fact in rate.facts])
    edges = np.linspace(times[0], times[-1], 1 + max(1, min(30, len(times) // 4)))
    last = np.append(np.diff(times) > 0, True)  # of chunks in one second, the last has them all
    rates = np.diff(np.interp(edges, times[last], frames[last])) / np.diff(edges)

    def draw(axes: Any) -> None:
        length_s = edges[-1] - edges[0]
        unit_s, unit = (3600, "h") if length_s > 7200 else (60, "min") if length_s > 180 else (1, "s")
        axes.stairs(rates, (edges - edges[0]) / unit_s, fill=True, color=BLUE)
        axes.set(xlabel=f"time since its first chunk [{unit}]", ylabel="rate [frames/s]", ylim=(0, None))

    return _svg(draw, caption)


def _histogram(values: list[float], label: str) -> Any:
    def draw(axes: Any) -> None:
        whole = all(isinstance(value, int) for value in values)
        bins = range(min(values), max(values) + 2) if whole and max(values) - min(values) < 24 else 24
        axes.hist(values, bins=bins, color=GREEN)
        axes.set(xlabel=label, ylabel="chunks")
        axes.yaxis.get_major_locator().set_params(integer=True)

    about = f"Histogram: {label} of {_count(len(values), 'chunk')}, from {min(values):.3g} to {max(values):.3g}"
    return _svg(draw, about)


def _which(sample: CacheSample) -> str:
    total = len(sample.progress.records)
    return f"A seeded sample of {len(sample.trajectories)} of {total:,}." if total > REPORT_TRAJECTORIES else "All."


def _when(epoch_s: float, form: str = "%a %d %b %Y %H:%M") -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):  # of a record that was tampered with
        return time.strftime(form, time.localtime(epoch_s))
    return f"at {epoch_s}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _card(sample: TrajectorySample) -> Card:
    parts = _count(sample.num_chunks, "chunk")
    if sample.num_chunks > sample.chunks_seen:
        parts = f"the first {sample.chunks_seen} of {parts}"
    jumps = f", {_count(len(sample.jumps), 'pose jump')}" if sample.jumps else ""
    camera = f", similarity of camera {sample.camera}" if sample.camera else ""
    figures = []
    if sample.paths:
        figures.append(_svg(lambda axes: _draw_map(axes, sample), f"Map of {sample.name}", height_in=2.6))
    if len(sample.frame_index):
        about = f"Similarity of the features of {sample.name}: {_range(sample.to_next)} with the next frame's, "
        about += f"{_range(sample.to_first)} with the first frame's"
        figures.append(_svg(lambda axes: _draw_similarity(axes, sample), about, height_in=1.9))
    return Card(
        name=sample.name,
        about=f"{parts}{jumps}{camera}",
        remarks=sample.remarks[:REPORT_REMARKS],
        has_map=bool(sample.paths),
        figures=figures,
    )


def _range(values: Any) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def _draw_map(axes: Any, sample: TrajectorySample) -> None:
    for number, path in enumerate(sample.paths):
        thin = path[:: max(1, len(path) // REPORT_POINTS)]
        colour = CHUNK_COLOURS[number % len(CHUNK_COLOURS)]
        axes.plot(
            *thin.T, color=colour, linewidth=3.5 - 2 * (number % 2), solid_capstyle="round", zorder=2 + number % 2
        )
    for number in sample.jumps:
        ends = (sample.paths[number - 1][-1], sample.paths[number][0])
        axes.plot(*zip(*ends), color=RED, linestyle=(0, (2, 2)), linewidth=1.2, marker="x", markersize=6, zorder=5)
    axes.plot(*sample.paths[0][0], marker="o", markersize=7, markerfacecolor="none", markeredgecolor=INK, zorder=6)
    axes.set(xlabel="x [m]", ylabel="y [m]")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)


def _draw_similarity(axes: Any, sample: TrajectorySample) -> None:
    axes.plot(sample.frame_index, sample.to_next, color=ORANGE, linewidth=1)
    axes.plot(sample.frame_index, sample.to_first, color=BLUE, linewidth=1.4)
    for frame in sample.jump_frames:
        axes.axvline(frame, color=RED, linestyle=(0, (2, 2)), linewidth=1.2)
    lowest = min(sample.to_first.min(), sample.to_next.min())
    axes.set(xlabel="frame", ylabel="cosine similarity", ylim=(min(lowest - 0.02, 0.9), 1.01))


def _pictures(sample: CacheSample) -> tuple[list[Picture], list[str]]:
    """Patch tokens as colours beside the frames that they are of; and why frames are not shown."""
    wanted = frames_to_picture(sample)
    found = [
        picture for picture in (sample.tried(read_patches, sample.progress, *frame) for frame in wanted) if picture
    ]
    pictures, unseen = [], set()
    for (name, frame, patches), rgb in zip(found, colours_of_patches([patches for _, _, patches in found])):
        frame_url = None
        try:
            frame_url = _frame_as_url(sample, name, frame)
        except RefusedError as error:
            unseen.add(str(error))
        title = camera_name(name, first_camera(sample.progress, name))
        pictures.append(Picture(title, frame, *patches.shape[:2], frame_url, _image_as_url(rgb, "PNG")))
    return pictures, sorted(unseen)[:3]


def _frame_as_url(sample: CacheSample, name: str, frame: int) -> str:
    """A frame, cut and scaled as the encoder saw it. RefusedError where it cannot be had."""
    progress, folder = sample.progress, sample.data_folder
    spec = recorded_spec(progress.specs[progress.records[name]["fingerprint"]])
    if folder is None:
        raise RefusedError("Frames are not shown: give --data-folder, the record does not say where they are")
    try:
        format_name = progress.data_format if progress.data_format in format_names() else None
        trajectory = format_named(format_name or detect_format(folder, data_keys(spec)).name).locate(folder, name)
        if trajectory.path.is_file() and (size := trajectory.path.stat().st_size) > REPORT_FRAME_FILE_BYTES:
            raise RefusedError(f"Frames of {name} are not shown: {trajectory.path} has {human_bytes(size)} to search")
        pixels = read_frame(trajectory, frame, spec)  # (3, H, W) uint8
    except (InputError, OSError, IndexError) as error:
        raise RefusedError(f"Frames of {name} cannot be shown ({error}); are they elsewhere? --data-folder") from error
    return _image_as_url(pixels.permute(1, 2, 0).numpy(), "JPEG")


def read_frame(trajectory: Trajectory, number: int, spec: CacheSpec) -> torch.Tensor:
    """One frame, by its number in the source, as the encoder gets it: (3, H, W) uint8; of several cameras, the first
    one's. A video is read with one seek.

    Raises:
        InputError, OSError: it cannot be had.
    """
    frames = open_camera(open_source(trajectory, data_keys(spec)), [number], spec.cameras[0])
    try:
        (image,) = frames.read([number])
    finally:
        frames.close()
    return (FrameDecoder(spec) if image.ndim == 1 else FrameDecoder(spec).fit)(image, frames.name(number))


def _image_as_url(rgb: Any, kind: str) -> str:
    """An image (h, w, 3) uint8 as a data URL."""

    data = io.BytesIO()
    PIL.Image.fromarray(rgb).save(data, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _configuration(sample: CacheSample) -> dict[str, Any]:
    """What is said of how the cache is made, row by row."""
    progress = sample.progress
    weights = progress.weights or {}
    rows = {
        **progress.processing_config,
        "weights source": weights.get("source"),
        "weights digest": weights.get("digest"),
    }
    if sample.facts:
        versions = json.loads(sample.facts[-1].versions)
        rows["made with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    if columns := sample.tried(stored_columns, progress):
        rows["stored with each frame"] = columns
    if cosines := [value for fact in sample.facts for value in fact.cosines]:
        rows["stored against computed tokens"] = describe_cosines(cosines)
    return rows | {"data folder": sample.data_folder, "data format": progress.data_format}


def _svg(draw: Callable[[Any], None], about: str, height_in: float = 2.2) -> Any:
    """A figure as wide as a card, in the page's colours; `about` is for those who cannot see it, and one on a page."""
    import matplotlib
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif", "svg.hashsalt": "dino_cache"}
    colours = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({**style, **colours}):
        figure = Figure(figsize=(3.6, height_in), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(useOffset=False) if axes.get_xscale() == "linear" else None
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor")
    for colour, name in STYLE_OF.items():
        svg = svg.replace(colour, f"var(--{name})")
    own = hashlib.blake2b(about.encode(errors="replace"), digest_size=6).hexdigest()  # ids are unique in the whole page
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{own}-", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(printable(about))}"', 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_cache_dir(parser)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html, here"
    )
    parser.add_argument(
        "--data-folder", type=Path, metavar="DIR", help="where the frames are (default: where the last run read them)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    return report(arguments.cache_dir, output=arguments.output, data_folder=arguments.data_folder)
