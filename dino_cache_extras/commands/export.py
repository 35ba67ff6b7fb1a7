"""export: write a cache in a layout that other training code reads."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dino_cache import (
    COLUMN_SHAPES,
    POSE_SHAPES,
    POSE_TYPES,
    TOKEN_DATASETS,
    ChunkFile,
    InputError,
    cameras_of,
    extra_dataset,
    free_bytes,
    read_file,
)
from dino_cache_extras.chunk_files import NewRows, is_cut_by_frames, pieces, recorded_chunk, token_datasets
from dino_cache_extras.commands.export_folder import is_folder
from dino_cache_extras.commands.export_rows import ExportJob
from dino_cache_extras.commands.workers import with_bar
from dino_cache_extras.smaller_tokens import read_rows, read_type
from progress_utils import (
    Progress,
    RefusedError,
    add_cache_dir,
    fsync_path,
    human_bytes,
    load_or_refuse,
    open_door,
    print_lines,
    write_durably,
)

# Layouts of modules of their own, each with write(job) -> what was written, in words
LAYOUT_MODULES = {
    "lerobot": "dino_cache_extras.commands.export_lerobot",
    "lance": "dino_cache_extras.commands.export_lance",
}

FLAT_DESCRIPTION = (
    "flat: one HDF5 file in stable-worldmodel's dialect. Every dataset but ep_len and ep_offset is a column, one row "
    "a frame, one episode after the other. An episode is a piece of a trajectory that was stored without a gap: it "
    "ends where a pose jump cut the trajectory. A frame that lies in two chunks appears once. Poses that no trajectory "
    "has (chunk_by: frames) are no columns; where only some have them, the others' rows are NaN. So are those of "
    "timestamp and delta in chunks that have none. What extra_keys named is in extra.<name>, where every chunk has it. "
    "Of several cameras, each has columns of its own: front.cls_token, left.cls_token. Patch tokens that are stored as "
    "int8 are de-quantised to float16."
)
VINT_DESCRIPTION = (
    "vint: a folder with one .pt file a chunk (features (L, D) float16: the CLS tokens; positions, yaws, indices) and "
    "cache_metadata.json, as visualnav-transformer's feature cache has them. Chunks overlap as in the cache. "
    "Refused where a trajectory has no poses. It holds one camera; --camera says which of several."
)
LEROBOT_DESCRIPTION = (
    "lerobot: a LeRobot v3.0 dataset, a folder: observation.cls_token and the like, observation.state (x, y, yaw), "
    "action (dx, dy, dyaw to the next frame, in the axes of the frame), extra.<name>, task. An episode ends at a pose "
    "jump or a gap; its last action is 0, and next.done is true there. Its rate is --fps, else by the stored times."
)
LANCE_DESCRIPTION = (
    "lance: a Lance table in stable-worldmodel's layout, a folder named *.lance: the same columns, without dots in "
    "their names, with position and yaw apart, episode_idx and step_idx."
)
VINT_METADATA = "cache_metadata.json"
VINT_SETTINGS = ("max_chunk_distance_m", "overlap_distance_m", "min_chunk_distance_m")
MADE_BY = "dino_cache export"  # what tells our metadata; those of 0.2.0 and before have these keys and no others:
OLD_VINT_KEYS = {"name", *VINT_SETTINGS, "feature_dim", "cache_path", "chunks"}
FLAT_ATTRIBUTES = {"ep_trajectory", "dataset_name", "specs", "weights"}
EXPORT_BLOCK_BYTES = 1 << 24  # read and written at a time
LONGEST_CHUNK_ID = 200  # bytes, so that a file can have it as its name


def export(
    cache_dir: Path,
    *,
    layout: str,
    output: Path,
    tokens: list[str] | None,
    allow_mixed: bool,
    force: bool,
    camera: str | None = None,
    fps: float | None = None,
) -> int:
    """Write what is recorded in another layout; the output appears under its name when it is complete.

    Raises:
        RefusedError: the cache is empty, mixed without `allow_mixed`, or a chunk file is not as recorded; or the output
            exists without `force`, or is something that no export made.
    """
    progress = load_or_refuse(cache_dir)
    _refuse_unexportable(progress, allow_mixed)
    cameras = _cameras(progress)
    output = Path(os.path.abspath(output))
    if output.is_relative_to(os.path.abspath(cache_dir)):
        raise RefusedError(f"-o {output}: lies inside the cache; an export belongs beside it")
    if not output.parent.is_dir():
        raise RefusedError(f"-o {output}: there is no folder {output.parent}")
    if layout != "vint" and camera is not None:
        raise RefusedError(f"--camera {camera}: the {layout} layout holds all cameras; leave it out")
    if layout != "lerobot" and fps is not None:
        raise RefusedError(f"--fps {fps:g}: the {layout} layout has no rate; leave it out")
    if layout in LAYOUT_MODULES:
        datasets = _exported_datasets(progress, tokens)
        job = ExportJob(progress, output, datasets, _common_extras(progress), fps, force)
        done = open_door(LAYOUT_MODULES[layout]).write(job)
    elif layout == "flat":
        done = _export_flat(progress, output, _exported_datasets(progress, tokens), force=force)
    else:
        if tokens not in (None, ["cls"]):
            raise RefusedError("--tokens: the vint layout holds one vector a frame, the CLS token")
        if camera not in cameras:
            named = ", ".join(filter(None, cameras))
            asked = "the vint layout holds one camera" if camera is None else f"is not among them: {camera}"
            ways = f"this cache has {named}; {asked}" if named else "this cache has one camera, without a name"
            raise RefusedError(f"--camera: {ways}")
        done = _export_vint(progress, output, _vint_dataset(progress, camera), force=force)
    print_lines(f"Exported {len(progress.records)} trajectories: {done} -> {output}")
    return 0


def _refuse_unexportable(progress: Progress, allow_mixed: bool) -> None:
    if not progress.records:
        raise RefusedError(f"{progress.cache_dir}: no trajectory is completed, there is nothing to export")
    if len(progress.fingerprints) > 1 and not allow_mixed:
        raise RefusedError(
            f"{progress.cache_dir}: is mixed: made with {len(progress.fingerprints)} different configurations (`show` "
            "says which). Give --allow-mixed to export it all the same, or redo it with --force-rebuild"
        )


def _cameras(progress: Progress) -> tuple[str | None, ...]:
    """The names of its cameras; (None,) for a single one. RefusedError where trajectories have different ones."""
    found = {cameras_of(progress.specs[fingerprint].get("image_key")) for fingerprint in progress.fingerprints}
    if len(found) > 1:
        kinds = " or ".join(sorted(", ".join(camera or "one camera" for camera in cameras) for cameras in found))
        raise RefusedError(f"{progress.cache_dir}: its trajectories have {kinds}; no layout holds both. Redo the cache")
    return found.pop()


def _exported_datasets(progress: Progress, tokens: list[str] | None) -> list[str]:
    """Names of the token datasets to export: those asked for, else those that every chunk has."""
    specs = [progress.specs[fingerprint] for fingerprint in progress.fingerprints]
    if len({tuple(spec.get("layers") or ()) for spec in specs}) > 1:
        raise RefusedError(f"{progress.cache_dir}: its trajectories have tokens of different layers. Redo the cache")
    common = [token for token in TOKEN_DATASETS if all(token in spec.get("tokens", ()) for spec in specs)]
    for token in tokens or common:
        if token not in common:
            raise RefusedError(
                f"{progress.cache_dir}: has no {token} tokens, or not in all chunks; it has {', '.join(common)}"
            )
    chosen = [token for token in TOKEN_DATASETS if token in (tokens or common)]
    return [name for token in chosen for name in token_datasets(specs[0], token)]


def _vint_dataset(progress: Progress, camera: str | None) -> str:
    """The dataset that the vint layout holds: one vector a frame, the class token of one camera and one layer."""
    datasets = [name for name in _exported_datasets(progress, ["cls"]) if name.rpartition("/")[0] == (camera or "")]
    if len(datasets) > 1:
        raise RefusedError(
            f"{progress.cache_dir}: the vint layout holds one vector a frame, and this cache has {len(datasets)} "
            f"class tokens a frame: {', '.join(datasets)}. Make a cache with one layer, or export it --to flat"
        )
    return datasets[0]


def _export_flat(progress: Progress, output: Path, token_datasets: list[str], *, force: bool) -> str:
    """Write the flat file; returns what it holds, in words."""
    _refuse_foreign_file(output, force)
    found = [(name, episode) for name in progress.records for episode in pieces(progress, name)]
    temporary = output.with_name(output.name + ".partial")
    if os.path.lexists(temporary) and (temporary.is_symlink() or not temporary.is_file()):
        raise RefusedError(f"{temporary}: is in the way, and no export made it; move it away")
    try:
        temporary.unlink(missing_ok=True)  # of an export that was killed
        with ChunkFile(temporary, "x+") as raw:
            _write_flat(progress, raw, found, token_datasets, output.parent)
            raw.check()
            os.fsync(raw.fileno())
        os.replace(temporary, output)
        fsync_path(output.parent)
    finally:
        temporary.unlink(missing_ok=True)
    frames = sum(rows.stop - rows.start for _, episode in found for rows in episode)
    return f"{len(found)} episodes, {frames} frames, {human_bytes(output.stat().st_size)}"


def _write_flat(
    progress: Progress, raw: Any, found: list[tuple[str, list[NewRows]]], token_datasets: list[str], folder: Path
) -> None:
    """Fill an empty file with the episodes found, block by block."""
    lengths = [sum(rows.stop - rows.start for rows in episode) for _, episode in found]
    parts = [(name, rows) for name, episode in found for rows in episode]
    with h5py.File(raw, "w", libver="v110") as file:  # attributes may exceed 64 kB then
        columns = _make_columns(progress, file, token_datasets + _common_extras(progress), sum(lengths), folder)
        _write_episodes(progress, file, [name for name, _ in found], lengths)
        position, filled = 0, set()
        for name, rows in with_bar(parts, "Exporting"):
            with recorded_chunk(progress, name, rows.index, deep=True) as chunk:
                filled |= _copy_rows(chunk, rows, columns, position)
            raw.check()
            position += rows.stop - rows.start
        for name in columns.keys() - filled:
            del file[_column_name(name)]  # nothing was written to it, so that it takes no space


def _common_extras(progress: Progress) -> list[str]:
    """The datasets of extra_keys that every chunk has."""
    keys = [progress.specs[fingerprint].get("extra_keys", ()) for fingerprint in progress.fingerprints]
    return [extra_dataset(key) for key in keys[0] if all(key in others for others in keys)]


def _make_columns(progress: Progress, file: Any, common: list[str], num_frames: int, folder: Path) -> dict[str, Any]:
    """Dataset -> an empty column, for each that a chunk can have and those `common` to all; RefusedError where the disk
    cannot hold them."""
    rows = {name: (shape, np.dtype(POSE_TYPES[name])) for name, shape in POSE_SHAPES.items()}
    rows |= {name: (shape, np.dtype(np.float64)) for name, shape in COLUMN_SHAPES.items()}
    if all(map(is_cut_by_frames, progress.specs.values())):
        del rows["travelled_distance"]
    with recorded_chunk(progress, next(iter(progress.records)), 0, deep=False) as chunk:
        rows |= {name: (chunk[name].shape[1:], read_type(chunk, name)) for name in common}
        empty = {name for name in COLUMN_SHAPES if name not in chunk}  # as in all others, most likely
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in rows.items()}
    needed = num_frames * sum(size for name, size in sizes.items() if name not in empty)
    if needed > (free := free_bytes(folder)):
        raise RefusedError(f"{folder}: the export takes {human_bytes(needed)} and {human_bytes(free)} are free")
    blanks = {name: math.nan if dtype.kind == "f" else None for name, (_, dtype) in rows.items()}
    return {
        name: file.create_dataset(_column_name(name), (num_frames, *shape), dtype, fillvalue=blanks[name])
        for name, (shape, dtype) in rows.items()
    }


def _column_name(dataset: str) -> str:
    """Columns lie at the top of the file: front/cls_token is front.cls_token, extra/action extra.action."""
    return dataset.replace("/", ".")


def _write_episodes(progress: Progress, file: Any, names: list[str], lengths: list[int]) -> None:
    """Where each episode begins and ends, as datasets and as columns; where it is from, as attributes."""
    lengths = np.array(lengths, np.int64)
    file["ep_len"] = lengths
    file["ep_offset"] = offsets = np.cumsum(lengths) - lengths
    file["ep_idx"] = np.repeat(np.arange(len(lengths)), lengths)
    file["step_idx"] = np.arange(lengths.sum()) - np.repeat(offsets, lengths)
    file.attrs["ep_trajectory"] = np.array(names, h5py.string_dtype())
    file.attrs["dataset_name"] = str(progress.dataset_name)
    file.attrs["specs"] = json.dumps(progress.specs)
    file.attrs["weights"] = json.dumps(progress.weights)


def _copy_rows(chunk: Any, rows: NewRows, columns: dict[str, Any], position: int) -> set[str]:
    """Copy a chunk's rows into the columns from `position` on; returns the columns that it has."""
    there = {name: column for name, column in columns.items() if name in chunk}
    for name, column in there.items():
        found, kept = (chunk[name].shape[1:], read_type(chunk, name)), (column.shape[1:], column.dtype)
        if found != kept:
            what = "rows of shape {0}" if found[0] != kept[0] else "{1} values"
            here, before = (what.format(*it) for it in (found, kept))
            raise RefusedError(
                f"{chunk.filename}: {name} has {here}, those before have {before.removeprefix('rows of shape ')}: one "
                "column cannot hold both. Choose other --tokens, or redo the cache"
            )
        block = max(1, EXPORT_BLOCK_BYTES // max(1, math.prod(column.shape[1:]) * column.dtype.itemsize))
        for start in range(rows.start, rows.stop, block):
            stop = min(start + block, rows.stop)
            target = position + start - rows.start
            column[target : target + stop - start] = read_rows(chunk, name, slice(start, stop))
    return set(there)


def _refuse_foreign_file(output: Path, force: bool) -> None:
    """Raise RefusedError unless the place is free, or an earlier flat export's that may be replaced."""
    if not os.path.lexists(output):
        return
    if not force:
        raise RefusedError(f"-o {output}: exists; --force replaces an earlier export")
    try:
        if output.is_symlink() or not output.is_file():
            raise RefusedError(f"-o {output}: is not a regular file; give another name")
        with h5py.File(output, locking=False) as file:
            is_ours = set(file.attrs) >= FLAT_ATTRIBUTES and "ep_offset" in file
    except (OSError, RuntimeError, ValueError, KeyError):
        is_ours = False
    if not is_ours:
        raise RefusedError(f"-o {output}: no export made it, or it is damaged; remove it, or give another name")


def _export_vint(progress: Progress, output: Path, token_dataset: str, *, force: bool) -> str:
    """Write the folder of .pt files; returns what it holds, in words."""
    chunks = _vint_chunks(progress)
    if _own_files(output, chunks) and not force:
        raise RefusedError(f"-o {output}: exists; --force replaces an earlier export")
    temporary = output.with_name(output.name + ".partial")
    _remove_export(temporary, chunks)  # of an export that was killed
    temporary.mkdir()
    try:
        spec = progress.processing_config
        settings = {key: None if is_cut_by_frames(spec) else spec.get(key) for key in VINT_SETTINGS}
        metadata = {"made_by": MADE_BY, "name": progress.dataset_name, **settings, "cache_path": output.name}
        metadata |= {"chunks": list(chunks)}
        _write_metadata(temporary, metadata)  # first: by it the files are known as an export's, also after a kill
        width = _write_vint_chunks(progress, temporary, chunks, token_dataset)
        _write_metadata(temporary, {**metadata, "feature_dim": width})
        _remove_export(output, chunks)
        os.rename(temporary, output)
        fsync_path(output.parent)
    finally:
        _remove_export(temporary, chunks)
    return f"{len(chunks)} chunks, features of width {width}"


def _write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    write_durably(folder / VINT_METADATA, json.dumps(metadata, indent=2).encode())


def _own_files(folder: Path, chunks: Iterable[str]) -> list[str]:
    """The names of what an export left in a folder: its metadata, what that lists, and what this export will write.

    Raises:
        RefusedError: anything else is there.
    """
    if not is_folder(folder):
        return []
    names = sorted(os.listdir(folder))
    listed = _listed_chunks(folder)
    own = {f"{chunk_id}.pt" for chunk_id in (*(listed or ()), *chunks)} | {f"{VINT_METADATA}.tmp"}
    own |= set() if listed is None else {VINT_METADATA}
    for name in names:
        if name not in own or not stat.S_ISREG(os.lstat(folder / name).st_mode):
            raise RefusedError(f"-o {folder}: holds {name}, which no export made; give another folder, or move it away")
    return names


def _listed_chunks(folder: Path) -> list[str] | None:
    """The chunks that an export's metadata list; None where there are none, or no export made them."""
    try:
        metadata = json.loads(read_file(folder / VINT_METADATA).tobytes())
        is_ours = metadata.get("made_by") == MADE_BY or metadata.keys() == OLD_VINT_KEYS
        return [chunk_id for chunk_id in metadata["chunks"] if isinstance(chunk_id, str)] if is_ours else None
    except (OSError, InputError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None


def _remove_export(folder: Path, chunks: Iterable[str]) -> None:
    """Remove an export's folder, file by file: what came into it meanwhile, and is not an export's, stays."""
    names = _own_files(folder, chunks)
    for name in sorted(names, key=VINT_METADATA.__eq__):  # the metadata last: by them the others are known
        os.unlink(folder / name)
    if os.path.lexists(folder):
        os.rmdir(folder)


def _vint_chunks(progress: Progress) -> dict[str, tuple[str, int]]:
    """Chunk id -> trajectory, and the chunk's number in it."""
    flat_names = _flat_names(progress.records)
    return {
        f"{flat_names[name]}_{start:05d}": (name, index)
        for name, record in progress.records.items()
        for index, (start, _) in enumerate(record["spans"])
    }


def _write_vint_chunks(progress: Progress, folder: Path, chunks: dict[str, tuple[str, int]], token_dataset: str) -> int:
    """Write a .pt file for each chunk; returns the width of their features."""
    import torch

    widths = set()
    for chunk_id, (name, index) in with_bar(list(chunks.items()), "Exporting"):
        with recorded_chunk(progress, name, index, deep=True) as chunk:
            if not {"position", "yaw"} <= set(chunk):
                raise RefusedError(
                    f"{chunk.filename}: has no position or no yaw (chunk_by: frames), and the vint layout holds both; "
                    "--to flat does without"
                )
            content = {
                "features": torch.from_numpy(chunk[token_dataset][...]),  # (L, D) float16
                "positions": chunk["position"][...].tolist(),  # L times [x, y] [m]
                "yaws": chunk["yaw"][...].tolist(),  # L numbers [rad]
                "indices": chunk["frame_index"][...].tolist(),  # L rows of the source's poses
            }
        widths.add(content["features"].shape[1])
        if len(widths) > 1:
            raise RefusedError(f"{progress.cache_dir}: its features are of widths {sorted(widths)}; redo the cache")
        data = io.BytesIO()
        torch.save(content, data)  # into memory: for a full disk it has an error of its own
        (folder / f"{chunk_id}.pt").write_bytes(data.getbuffer())
        fsync_path(folder / f"{chunk_id}.pt")
    return widths.pop()


def _flat_names(names: Iterable[str]) -> dict[str, str]:
    """Trajectory name -> one that can be a file's: without `/`, not too long, and that no other one has."""
    flat: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        candidate = name.replace("/", "__")
        if candidate.casefold() in taken or len(candidate.encode()) > LONGEST_CHUNK_ID:
            short = candidate.encode()[: LONGEST_CHUNK_ID - 10].decode(errors="ignore")
            candidate = f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        taken.add(candidate.casefold())
        flat[name] = candidate
    return flat


def _positive(text: str) -> float:
    """A number above 0; argparse names the option where it is none."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.description += f" {FLAT_DESCRIPTION} {VINT_DESCRIPTION} {LEROBOT_DESCRIPTION} {LANCE_DESCRIPTION}"
    add_cache_dir(parser)
    parser.add_argument(
        "--to", choices=("flat", "vint", *LAYOUT_MODULES), required=True, dest="layout", help="the layout"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help="the file or folder")
    parser.add_argument(
        "--tokens", nargs="+", choices=tuple(TOKEN_DATASETS), help="which of them (default: all that there are)"
    )
    parser.add_argument("--camera", metavar="NAME", help="which of several cameras (vint)")
    parser.add_argument("--fps", type=_positive, metavar="RATE", help="kept frames a second (lerobot)")
    parser.add_argument("--allow-mixed", action="store_true", help="also of several configurations")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    return export(
        arguments.cache_dir,
        layout=arguments.layout,
        output=arguments.output,
        tokens=arguments.tokens,
        allow_mixed=arguments.allow_mixed,
        force=arguments.force,
        camera=arguments.camera,
        fps=arguments.fps,
    )
