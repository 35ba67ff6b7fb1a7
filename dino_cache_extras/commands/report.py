"""report: one HTML file to look at in the morning."""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    ChunkFacts,
    TrajectorySample,
    colours_of_patches,
    failure_causes,
    first_camera,
    frames_to_picture,
    night_rate,
    read_patches,
    stored_columns,
)
from progress_utils import (
    Failure,
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
    read_lock_owner,
    state_remarks,
    write_durably,
)

if TYPE_CHECKING:
    import torch


REPORT_FRAME_FILE_BYTES = 2 << 30  # of a trajectory's own file: a video's frame times are read from all of it
REPORT_REMARKS = 4  # on one trajectory
REPORT_NAMES = 20  # of failed trajectories with one cause
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"  # Okabe, Ito
CHUNK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
INK = "#010203"  # stands for the text's colour, light or dark, in figures


def report(cache_dir: Path, *, output: Path, data_folder: Path | None) -> int:
    """Write the report; `data_folder` is where the frames are, if not where the last run read them."""
    progress = load_or_refuse(cache_dir)
    open_library("matplotlib")
    if output.is_dir():
        raise RefusedError(f"-o {output}: is a folder; give the name of a file")
    sample = CacheSample(progress, data_folder or (Path(progress.data_folder) if progress.data_folder else None))
    sections = [
        _summary_section(sample),
        _failures_section(progress.failures),
        _figures_section(sample),
        _trajectories_section(sample),
        _pictures_section(sample),
        _configuration_section(sample),
    ]
    page = _page(f"{progress.dataset_name}: dino_cache report", _problems_section(sample) + "".join(sections))
    write_durably(output, page.encode(errors="replace"))
    print_lines(f"Wrote {output} ({human_bytes(output.stat().st_size)})")
    return 0


def _summary_section(sample: CacheSample) -> str:
    progress = sample.progress
    owner = read_lock_owner(progress.cache_dir)
    state = "idle" if owner is None else "stale" if owner.is_stale else "running"
    total = progress.num_trajectories
    share = f"of {total:,} ({100 * len(progress.records) / total:.1f}%)" if total else "of unknown"
    size = sum(sum(record["bytes"]) for record in progress.records.values())
    rate = night_rate(sample.night)
    tiles = [
        ("completed trajectories", f"{len(progress.records):,}", share),
        ("failed trajectories", f"{len(progress.failures):,}", "see below" if progress.failures else "none"),
        ("frames", f"{sum(sample.num_frames.values()):,}", "each counted once"),
        ("chunks", f"{progress.total_chunks:,}", human_bytes(size)),
        ("pose jumps", *_jumps_tile(progress)),
        ("rate", f"{rate:.1f} frames/s" if rate else "?", "mean of the last night"),
        ("time left", _time_left(sample, owner, rate), state),
        ("working time", f"{progress.elapsed_s / 3600:.1f} h", "of all runs"),
    ]
    cards = "".join(f"<div class=tile><b>{_text(value)}</b>{_text(name)}<i>{_text(more)}</i></div>"
                    for name, value, more in tiles)  # fmt: skip
    remarks = "".join(f"<p class=warn>{_text(remark)}</p>" for remark in _report_remarks(progress))
    where = f"<p><code>{_text(progress.cache_dir)}</code>, last saved {_text(time.ctime(progress.last_update))}</p>"
    return f"<h1>{_text(progress.dataset_name)}</h1>{where}{remarks}<div class=tiles>{cards}</div>"


def _jumps_tile(progress: Progress) -> tuple[str, str]:
    if progress.records and all(is_cut_by_frames(progress.specs[fingerprint]) for fingerprint in progress.fingerprints):
        return "?", "not looked for: chunk_by: frames"
    jumps = sum(len(pieces(progress, name)) > 1 for name in progress.records)
    return f"{jumps:,}", "trajectories with one or more"


def _report_remarks(progress: Progress) -> list[str]:
    remarks = state_remarks(progress)
    if str((progress.weights or {}).get("source", "")).startswith("random"):
        remarks.append("The weights are random: the features, their similarities and their colours mean nothing")
    return remarks


def _time_left(sample: CacheSample, owner: LockOwner | None, rate: float | None) -> str:
    progress, total = sample.progress, sample.progress.num_trajectories
    if owner is not None and not owner.is_stale and owner.run is not None and owner.run.frames_per_s > 0:
        return human_duration(owner.run.frames_left / owner.run.frames_per_s)
    left = (total or 0) - len(progress.records) - len(progress.failures)
    if total is not None and left <= 0:
        return "none"
    if not rate or total is None:
        return "?"
    return human_duration(left * sum(sample.num_frames.values()) / len(progress.records) / rate)


def _problems_section(sample: CacheSample) -> str:
    problems = list(sample.problems)
    items = "".join(f"<li>{_text(problem)}</li>" for problem in problems[:REPORT_NAMES])
    more = f"<p>... and {len(problems) - REPORT_NAMES} more</p>" if len(problems) > REPORT_NAMES else ""
    title = f"<p class=warn>{len(problems)} of the chunk files looked into are not as recorded</p>"
    return f"{title}<ul>{items}</ul>{more}" if problems else ""


def _failures_section(failures: dict[str, Failure]) -> str:
    if not failures:
        return ""
    groups = []
    for cause, members in failure_causes(failures).items():
        shown = "".join(
            f"<li><code>{_text(failure['reason'])}</code> <i>{_count(failure['attempts'], 'attempt')}, last "
            f"{_text(_when(failure['time']))}</i></li>"
            for _, failure in members[:REPORT_NAMES]
        )
        more = f"<li>... and {len(members) - REPORT_NAMES} more</li>" if len(members) > REPORT_NAMES else ""
        title = f"<b>{len(members):,}</b> {_text(members[0][1]['error_type'])}: {_text(cause)}"
        groups.append(f"<details open><summary>{title}</summary><ul>{shown}{more}</ul></details>")
    return f"<h2>{len(failures):,} failed, by cause</h2>{''.join(groups)}"


def _figures_section(sample: CacheSample) -> str:
    """The rate, and histograms of the chunks."""
    lengths = [stop - start for record in sample.progress.records.values() for start, stop in record["spans"]]
    distances = [fact.distance_m for fact in sample.facts if fact.distance_m is not None]
    if not lengths:
        return ""
    sampled = f"{len(distances):,} of {len(lengths):,} chunks" if len(distances) < len(lengths) else "all chunks"
    figures = [_figure(_histogram(lengths, "chunk length [frames]"), "Length of all chunks")]
    if distances:
        figures.append(_figure(_histogram(distances, "chunk distance [m]"), f"Travelled distance of {sampled}"))
    elif sample.facts:
        figures.append(
            _figure("", "No travelled distances: the chunks were cut by number of frames (chunk_by: frames)")
        )
    if night_rate(sample.night):
        begin, end = (time.localtime(sample.night[i].created_at) for i in (0, -1))
        day = "%a %d %b "
        until = time.strftime(("" if begin[:3] == end[:3] else day) + "%H:%M", end)
        caption = f"Rate of the last night, {time.strftime(day + '%H:%M', begin)} to {until}"
        figures.insert(0, _figure(_rate_figure(sample.night), caption))
    return f"<h2>Rate and chunks</h2><div class=grid>{''.join(figures)}</div>"


def _rate_figure(night: list[ChunkFacts]) -> str:

    times = np.array([fact.created_at for fact in night])
    frames = np.cumsum([fact.new_frames for fact in night])
    edges = np.linspace(times[0], times[-1], 1 + max(1, min(30, len(night) // 4)))
    last = np.append(np.diff(times) > 0, True)  # of chunks in one second, the last has them all
    rates = np.diff(np.interp(edges, times[last], frames[last])) / np.diff(edges)

    def draw(axes: Any) -> None:
        length_s = edges[-1] - edges[0]
        unit_s, unit = (3600, "h") if length_s > 7200 else (60, "min") if length_s > 180 else (1, "s")
        axes.stairs(rates, (edges - edges[0]) / unit_s, fill=True, color=BLUE)
        axes.set(xlabel=f"time since its first chunk [{unit}]", ylabel="rate [frames/s]", ylim=(0, None))

    return _svg(draw)


def _histogram(values: list[float], label: str) -> str:
    def draw(axes: Any) -> None:
        whole = all(isinstance(value, int) for value in values)
        bins = range(min(values), max(values) + 2) if whole and max(values) - min(values) < 24 else 24
        axes.hist(values, bins=bins, color=GREEN)
        axes.set(xlabel=label, ylabel="chunks")
        axes.yaxis.get_major_locator().set_params(integer=True)

    return _svg(draw)


def _trajectories_section(sample: CacheSample) -> str:
    if not sample.trajectories:
        return ""
    total = len(sample.progress.records)
    which = f"A seeded sample of {len(sample.trajectories)} of {total:,}." if total > REPORT_TRAJECTORIES else "All."
    keys = [
        f"Maps: each chunk in a colour, wide and narrow in turn, so that overlaps show; {_key(RED)} a pose jump; the "
        "ring is the start.",
        f"Similarity of each frame's features {_key(BLUE)} with the first frame's and {_key(ORANGE)} with the next "
        "frame's. A camera that works leaves the first frame slowly and stays near 1 from frame to frame; a frozen one "
        "is flat, shuffled frames jump up and down.",
    ]
    cards = "".join(map(_trajectory_card, sample.trajectories))
    return f"<h2>Trajectories</h2><p>{which} {' '.join(keys)}</p><div class=grid>{cards}</div>"


def _when(epoch_s: float) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):  # of a record that was tampered with
        return time.ctime(epoch_s)
    return f"at {epoch_s}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _key(colour: str) -> str:
    return f'<span class=key style="background:{colour}"></span>'


def _trajectory_card(sample: TrajectorySample) -> str:
    parts = _count(sample.num_chunks, "chunk")
    if sample.num_chunks > sample.chunks_seen:
        parts = f"the first {sample.chunks_seen} of {parts}"
    jumps = f", {_count(len(sample.jumps), 'pose jump')}" if sample.jumps else ""
    remarks = "".join(f"<p class=warn>{_text(remark)}</p>" for remark in sample.remarks[:REPORT_REMARKS])
    if sample.paths:
        figures = _svg(lambda axes: _draw_map(axes, sample), height_in=2.6)
    else:
        figures = "<p><i>No map: it has no positions.</i></p>"
    if len(sample.frame_index):
        figures += _svg(lambda axes: _draw_similarity(axes, sample), height_in=1.9)
    camera = f", similarity of camera {sample.camera}" if sample.camera else ""
    caption = f"<figcaption><b>{_text(sample.name)}</b> {parts}{jumps}{_text(camera)}</figcaption>"
    return f"<figure>{caption}{remarks}{figures}</figure>"


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


def _pictures_section(sample: CacheSample) -> str:
    """Patch tokens as colours beside the frames that they are of."""
    wanted = frames_to_picture(sample)
    pictures = [
        picture for picture in (sample.tried(read_patches, sample.progress, *frame) for frame in wanted) if picture
    ]
    if not pictures:
        return ""
    colours = colours_of_patches([patches for _, _, patches in pictures])
    cards, unseen = [], set()
    for (name, frame, patches), rgb in zip(pictures, colours):
        try:
            shown = f'<img alt="frame {frame}" src="{_frame_as_url(sample, name, frame)}">'
        except RefusedError as error:
            shown, _ = "", unseen.add(str(error))
        height, width = patches.shape[:2]
        shown += f'<img class=patches alt="its patch tokens" src="{_image_as_url(rgb, "PNG")}">'
        title = camera_name(name, first_camera(sample.progress, name))
        caption = f"<figcaption><b>{_text(title)}</b> frame {frame}, {height} x {width} patches</figcaption>"
        cards.append(f"<figure><div class=pair>{shown}</div>{caption}</figure>")
    notes = "".join(f"<p class=warn>{_text(note)}</p>" for note in sorted(unseen)[:3])
    about = (
        "Each frame as the encoder saw it, and its patch tokens: their first three principal components, common to all "
        "frames shown here, as red, green and blue. Like things should have like colours, from frame to frame."
    )
    return f"<h2>Patch tokens</h2><p>{about}</p>{notes}<div class=grid>{''.join(cards)}</div>"


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


def _configuration_section(sample: CacheSample) -> str:
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
    rows |= {"data folder": sample.data_folder, "data format": progress.data_format}
    cells = "".join(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in rows.items())
    return f"<h2>Configuration</h2><table>{cells}</table>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{_text(caption)}</figcaption>{svg}</figure>"


def _text(value: Any) -> str:
    """For HTML: names and reasons come from strangers' data."""
    return html.escape(printable(str(value)))


def _svg(draw: Callable[[Any], None], height_in: float = 2.2) -> str:
    """A figure as wide as a card, in the page's text colour."""
    import matplotlib
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
    return re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor")


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f4f5f7;--ink:#1b1e23;--soft:#5a6270;--line:#d9dce2;--warn:#9a3b00}
@media(prefers-color-scheme:dark){:root{--back:#14161a;--card:#1e2127;--ink:#e8eaee;--soft:#a5adba;--line:#363b45;
--warn:#ffa566}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1180px;background:var(--back);color:var(--ink);
font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:24px;margin:8px 0}h2{font-size:19px;margin:28px 0 8px}p{margin:6px 0}i{color:var(--soft);font-style:normal}
.warn{color:var(--warn);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(max(130px,23%),1fr));gap:10px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:12px;align-items:start}
.tile,figure,details{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px;margin:0}
.tile b{display:block;font-size:20px}.tile i{display:block;font-size:13px}
figcaption{font-size:13px;color:var(--soft)}figcaption b{color:var(--ink)}
svg{display:block;width:100%;height:auto}details{margin:8px 0}summary{cursor:pointer}ul{margin:6px 0;padding-left:20px}
code{font-size:13px}.key{display:inline-block;width:14px;height:4px;border-radius:2px;vertical-align:middle}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:6px;margin-bottom:6px}.pair img{width:100%;border-radius:4px}
.patches{image-rendering:pixelated}
table{border-collapse:collapse;font-size:13px;width:100%}th,td{text-align:left;padding:3px 8px 3px 0;vertical-align:top;
border-bottom:1px solid var(--line)}th{font-weight:400;color:var(--soft);width:35%}
"""


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing comes from elsewhere
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{_text(title)}</title><meta name=viewport "
        f'content="width=device-width,initial-scale=1"><meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<style>{_STYLE}</style></head><body>{body}<p><i>dino_cache report of {_text(time.ctime())}</i></p></body>"
        "</html>\n"
    )


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
