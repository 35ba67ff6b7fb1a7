"""Render the small synthetic dataset `rendered_rooms`: a robot's camera drives through a corridor and two rooms.

    python sample/render_sample.py                 # writes sample/rendered_rooms, overwriting files of the same names
    python sample/render_sample.py --output DIR    # writes the trajectory folders into DIR
    python sample/render_sample.py --check         # renders again, compares with what is there; exit 1 if it differs

Data flow: TRAJECTORIES (legs) -> poses -> rays of one camera -> nearest of BOXES -> texture and light -> JPEG.
The layout is that of GNM and ViNT, DIR/<trajectory>/{0.jpg, 1.jpg, ..., T-1.jpg, traj_data.pkl}, where the pickle holds
{"position": float64 (T, 2) [m], "yaw": float64 (T,) [rad, counter-clockwise from +x, wrapped into -pi..pi]}.

Guaranteed: two runs on one installation write the same bytes. Not guaranteed: the same bytes from another Pillow
(JPEG encoders differ) or numpy (pickled module names differ); so --check compares pixels within a tolerance, and the
unpickled poses exactly.
Needs only numpy and Pillow. Axes: x, y span the floor, z points up; T frames, P rays of one frame, N boxes.
"""

import argparse
import pickle
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 160, 120  # pixels
SUPERSAMPLING = 2  # rays per pixel and axis; one ray makes distant tiles flicker from frame to frame
HALF_FOV_TANGENT = 1.0  # horizontal field of view of 90 degrees
CAMERA_HEIGHT_M = 0.6
CEILING_M = 2.7
JPEG_QUALITY = 75
PIXEL_TOLERANCE = 2.0  # mean absolute difference in grey levels of 0..255


# ---------------------------------------------------------------------------------------------------------------------
# Scene: a floor plan of solid boxes along the axes, each with one texture of regular cells.


@dataclass(frozen=True)
class Texture:
    """Cells of one size with darker joints between them; each next row is moved by row_shift of a width."""

    red: float
    green: float
    blue: float
    width_m: float
    height_m: float
    row_shift: float = 0.0
    joint_m: float = 0.0
    jitter: float = 0.0  # random brightness per cell, as a part of 1
    checker: float = 0.0  # brightness difference of neighbouring cells, as a part of 1


FLOOR = Texture(150, 138, 122, 0.5, 0.5, joint_m=0.02, jitter=0.1, checker=0.4)
CEILING = Texture(205, 205, 200, 0.6, 0.6, joint_m=0.03, jitter=0.04)
PLASTER = Texture(196, 188, 168, 1.2, 2.7, joint_m=0.02, jitter=0.08)
BRICK = Texture(164, 92, 72, 0.3, 0.12, row_shift=0.5, joint_m=0.02, jitter=0.3)
GREEN_TILE = Texture(120, 160, 140, 0.3, 0.3, joint_m=0.015, jitter=0.15)
WOOD = Texture(140, 98, 58, 0.16, 1.4, row_shift=0.37, joint_m=0.012, jitter=0.25)
CRATE = Texture(190, 145, 80, 0.6, 0.14, joint_m=0.025, jitter=0.2)
STEEL = Texture(110, 120, 135, 0.45, 0.5, joint_m=0.02, jitter=0.1)
WINDOW = Texture(215, 232, 250, 0.5, 0.7, joint_m=0.06)
LAMP = Texture(255, 250, 230, 0.6, 0.6)
RED, BLUE, YELLOW = (Texture(*rgb, 0.5, 0.5, checker=0.3) for rgb in ((200, 45, 40), (50, 85, 180), (225, 185, 50)))

LAMPS = np.array([(2, 0), (6, 0), (10, 0), (14, 0), (2.2, 4.6), (5.8, 4.6), (10.2, 4.6), (13.8, 4.6)])  # (x, y) [m]

# fmt: off
BOXES = (  # two opposite corners, low x, y, z and high x, y, z [m], and what they are made of
    (0, -1, -0.1, 16, 8, 0, FLOOR), (0, -1, CEILING_M, 16, 8, 2.8, CEILING),
    # outer walls; the wall between corridor and rooms, with two doorways; the wall between the rooms
    (-0.2, -1.2, 0, 0, 8.2, CEILING_M, BRICK), (16, -1.2, 0, 16.2, 8.2, CEILING_M, BRICK),
    (0, -1.2, 0, 16, -1, CEILING_M, PLASTER), (0, 8, 0, 16, 8.2, CEILING_M, GREEN_TILE),
    (0, 1, 0, 3, 1.2, CEILING_M, PLASTER), (3, 1, 2.1, 4.4, 1.2, CEILING_M, PLASTER),
    (4.4, 1, 0, 10.6, 1.2, CEILING_M, PLASTER), (10.6, 1, 2.1, 12, 1.2, CEILING_M, PLASTER),
    (12, 1, 0, 16, 1.2, CEILING_M, PLASTER), (7.9, 1.2, 0, 8.1, 8, CEILING_M, BRICK),
    # corridor: three doors; two notice boards; a radiator, a bin, and a cupboard at the end
    (2.5, -1, 0, 3.4, -0.95, 2.05, WOOD), (7.2, -1, 0, 8.1, -0.95, 2.05, BLUE), (12.4, -1, 0, 13.3, -0.95, 2.05, WOOD),
    (4.6, -1, 0.9, 6, -0.97, 1.7, YELLOW), (6.2, 0.97, 0.8, 7.4, 1, 1.6, RED),
    (8.6, 0.85, 0.1, 9.8, 1, 0.7, STEEL), (10, -1, 0, 10.35, -0.7, 0.6, RED), (15.4, -0.5, 0, 16, 0.7, 1.8, STEEL),
    # first room: a pillar, two windows; shelves, a sofa; crates
    (3.7, 4.3, 0, 4.3, 4.9, CEILING_M, STEEL), (1.5, 7.95, 0.9, 3.5, 8, 2.3, WINDOW),
    (4.7, 7.95, 0.9, 6.7, 8, 2.3, WINDOW), (0, 3.2, 0, 0.4, 5.6, 2, WOOD),
    (6.8, 4, 0, 7.9, 6, 0.45, BLUE), (7.5, 4, 0.45, 7.9, 6, 0.9, BLUE),
    (0.4, 6.9, 0, 1.2, 7.7, 0.8, CRATE), (5.6, 1.2, 0, 6.6, 1.9, 1.1, CRATE), (0.2, 1.3, 0, 1, 2.1, 0.5, YELLOW),
    # second room: a window, shelves, a cupboard; crates, a pillar
    (12.6, 7.95, 0.9, 15, 8, 2.3, WINDOW), (12.9, 1.2, 0, 14.3, 1.6, 2, WOOD), (15.6, 2.4, 0, 16, 4.4, 1.6, BLUE),
    (13.2, 4.9, 0, 14.1, 5.8, 0.9, CRATE), (13.4, 5.1, 0.9, 13.9, 5.6, 1.4, YELLOW),
    (9.3, 3, 0, 9.6, 3.3, CEILING_M, RED),
    *((x - 0.3, y - 0.3, CEILING_M - 0.06, x + 0.3, y + 0.3, CEILING_M, LAMP) for x, y in LAMPS),
)
# fmt: on
BOX_CORNERS = np.array([box[:6] for box in BOXES]).reshape(-1, 2, 3)  # (N, low and high, xyz)
BOX_TEXTURES = np.array([astuple(box[6]) for box in BOXES])  # (N, 9), columns in the order of Texture's fields


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories: a start pose and legs of equal steps.


@dataclass(frozen=True)
class Trajectory:
    """A start pose (x [m], y [m], yaw [rad]), legs of (steps, forward_m, turn_rad) per step, and the light's colour."""

    name: str
    start: tuple[float, float, float]
    legs: tuple[tuple[int, float, float], ...]
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)


TRAJECTORIES = (
    Trajectory("corridor_straight", (1.0, 0.0, 0.0), ((48, 0.25, 0.0),)),
    Trajectory("room_loop", (3.8, 3.4, 0.1), ((3, 0.2, 0.0), (7, 0.2, np.pi / 14)) * 4),
    Trajectory(
        "evening/s_curve",
        (9.45, 0.0, 0.0),
        ((3, 0.2, 0.0), (10, 0.2, np.pi / 20), (3, 0.2, 0.0), (10, 0.2, -np.pi / 20), (4, 0.2, 0.0)),
        light=(0.72, 0.56, 0.42),
    ),
    Trajectory(
        "stop_and_go",
        (9.2, 6.2, -0.6),
        ((2, 0.15, 0.0), (4, 0.25, 0.0), (1, 0.15, 0.0), (8, 0.0, 0.0), (2, 0.15, 0.0), (5, 0.25, 0.04)),
    ),
)


def poses(trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Return the camera's position (T, 2) in metres and yaw (T,) in radians, both float64."""
    steps = np.concatenate([np.tile(leg[1:], (leg[0], 1)) for leg in trajectory.legs])  # (T - 1, 2)
    forward, turn = steps.T
    x, y, start_yaw = trajectory.start
    yaw = start_yaw + np.concatenate([[0.0], np.cumsum(turn)])  # (T,)
    heading = yaw[:-1] + turn / 2  # the chord of an arc points halfway between the yaws at its ends
    moves = forward[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    position = np.concatenate([[(x, y)], (x, y) + np.cumsum(moves, axis=0)])
    # Rounded, as the last bits of sine and cosine differ between processors and --check compares poses exactly.
    return np.round(position, 6), np.round((yaw + np.pi) % (2 * np.pi) - np.pi, 6)


# ---------------------------------------------------------------------------------------------------------------------
# Camera: one frame by casting rays, with the textures computed where the rays hit.


def camera_rays(yaw: float) -> np.ndarray:
    """Directions (3, P) of all rays in row order; their part along the optical axis is 1, so none has length 1."""
    columns, rows = WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING
    left = (1 - 2 * (np.arange(columns) + 0.5) / columns) * HALF_FOV_TANGENT
    up = (1 - 2 * (np.arange(rows) + 0.5) / rows) * HALF_FOV_TANGENT * HEIGHT / WIDTH
    up, left = (grid.ravel() for grid in np.meshgrid(up, left, indexing="ij"))
    rays = np.stack([np.cos(yaw) - left * np.sin(yaw), np.sin(yaw) + left * np.cos(yaw), up])
    return np.where(np.abs(rays) < 1e-9, 1e-9, rays)  # a zero would make 0 * inf = nan in nearest_hits


def nearest_hits(origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each ray first enters a box: its depth [m], the box's index, and the axis normal to the face, each (P,).

    Slab method: a ray is inside a box from the last of its three entries to the first of its three exits.
    """
    depth = np.full(rays.shape[1], np.inf)
    box_index, axis = np.zeros((2, rays.shape[1]), dtype=np.intp)
    inverse = 1 / rays
    for index, corners in enumerate(BOX_CORNERS - origin):
        at_low, at_high = corners[:, :, None] * inverse  # (3, P) each
        entries = np.minimum(at_low, at_high)
        enter, leave = entries.max(axis=0), np.maximum(at_low, at_high).min(axis=0)
        nearer = (enter <= leave) & (enter > 0) & (enter < depth)
        depth[nearer], box_index[nearer] = enter[nearer], index
        axis[nearer] = entries[:, nearer].argmax(axis=0)
    return depth, box_index, axis


def cell_noise(column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Uniform values in [0, 1) that depend only on the integer cell; integer arithmetic, so alike on every machine."""
    mixed = (column.astype(np.int64) * 374761393 + row.astype(np.int64) * 668265263).astype(np.uint32)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(1274126177)
    return (mixed ^ (mixed >> np.uint32(16))) / 2.0**32


def smooth_noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Stains: cell_noise at the corners of unit cells, interpolated to (u, v); values in [0, 1)."""
    column, row = np.floor(u), np.floor(v)
    right, top = ((t * t * (3 - 2 * t)) for t in (u - column, v - row))
    low = cell_noise(column, row) * (1 - right) + cell_noise(column + 1, row) * right
    high = cell_noise(column, row + 1) * (1 - right) + cell_noise(column + 1, row + 1) * right
    return low * (1 - top) + high * top


def surface_colour(points: np.ndarray, box_index: np.ndarray, axis: np.ndarray, blur_m: np.ndarray) -> np.ndarray:
    """Unlit colour (3, P) in 0..255 at points (3, P) [m] on faces normal to axis (P,).

    blur_m (P,) is the width that one ray stands for: cells not much larger than it fade to their mean brightness.
    """
    u = np.where(axis == 0, points[1], points[0])
    v = np.where(axis == 2, points[1], points[2])
    *rgb, width_m, height_m, row_shift, joint_m, jitter, checker = BOX_TEXTURES[box_index].T  # each (P,)
    row = np.floor(v / height_m)
    column = np.floor(u / width_m + row * row_shift)
    edge_u = np.abs((u / width_m + row * row_shift - column + 0.5) % 1 - 0.5) * width_m  # distance to a joint [m]
    edge_v = np.abs((v / height_m - row + 0.5) % 1 - 0.5) * height_m
    on_joint = np.minimum(edge_u, edge_v) < joint_m / 2
    pattern = jitter * (cell_noise(column, row + 97 * box_index) - 0.5) + checker * ((column + row) % 2 - 0.5)
    pattern -= 0.4 * on_joint * np.exp(-((0.3 * blur_m / np.maximum(joint_m, 1e-3)) ** 2))
    pattern *= np.exp(-((blur_m / np.minimum(width_m, height_m)) ** 2))
    stains = 0.16 * (smooth_noise(u / 0.35 + 31 * axis, v / 0.35) - 0.5)
    return np.stack(rgb) * (1 + pattern + stains)


def brightness(points: np.ndarray, axis: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Light (P,) at points (3, P) [m]: the lamps' glow, a shade per face direction, dark corners, and haze."""
    glow = np.full(points.shape[1], 0.4)
    for x, y in LAMPS:
        glow += 1.5 / (2.0 + (points[0] - x) ** 2 + (points[1] - y) ** 2 + (points[2] - CEILING_M) ** 2)
    face_shade = np.array([0.8, 1.0, 0.92])[axis]  # equal shades would hide the edges between walls of one colour
    foot_shade = np.where(axis == 2, 1.0, 1 - 0.35 * np.exp(-np.maximum(points[2], 0.0) / 0.12))
    return glow * face_shade * foot_shade * (0.25 + 0.75 * np.exp(-depth / 14.0))


def render_frame(position: np.ndarray, yaw: float, light: tuple[float, float, float]) -> Image.Image:
    """Render the RGB view of WIDTH x HEIGHT from position (2,) [m], looking along yaw [rad]."""
    origin = np.array([*position, CAMERA_HEIGHT_M])
    rays = camera_rays(yaw)
    depth, box_index, axis = nearest_hits(origin, rays)
    points = origin[:, None] + rays * depth
    slant = np.maximum(np.abs(np.take_along_axis(rays, axis[None], axis=0)[0]), 0.02)
    blur_m = depth / slant * 2 * HALF_FOV_TANGENT / (WIDTH * SUPERSAMPLING)
    colour = surface_colour(points, box_index, axis, blur_m) * brightness(points, axis, depth)
    colour = np.clip(colour * np.array(light)[:, None], 0, 255)
    pixels = colour.reshape(3, HEIGHT, SUPERSAMPLING, WIDTH, SUPERSAMPLING).mean(axis=(2, 4))  # (3, HEIGHT, WIDTH)
    return Image.fromarray(np.round(pixels).astype(np.uint8).transpose(1, 2, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Files and command line.


def write_dataset(output: Path) -> None:
    """Write every trajectory's frames and poses under output."""
    for trajectory in TRAJECTORIES:
        folder = output / trajectory.name
        folder.mkdir(parents=True, exist_ok=True)
        position, yaw = poses(trajectory)
        for frame in range(len(yaw)):
            image = render_frame(position[frame], yaw[frame], trajectory.light)
            image.save(folder / f"{frame}.jpg", quality=JPEG_QUALITY)
        # Protocol 4: from 5 on, numpy pickles arrays by another function than the one that numpy 1 and 2 share.
        (folder / "traj_data.pkl").write_bytes(pickle.dumps({"position": position, "yaw": yaw}, protocol=4))
        print(f"{trajectory.name}: {len(yaw)} frames", file=sys.stderr)


def same_content(first: Path, second: Path) -> bool:
    """Whether two frames agree within PIXEL_TOLERANCE, or two pose files hold exactly the same arrays."""
    if first.suffix == ".jpg":
        a, b = (np.asarray(Image.open(path), dtype=np.float64) for path in (first, second))
        return a.shape == b.shape and np.abs(a - b).mean() <= PIXEL_TOLERANCE
    a, b = (pickle.loads(path.read_bytes()) for path in (first, second))
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a)


def differences(rendered: Path, committed: Path) -> list[str]:
    """One line for each file that is missing, superfluous or different in committed; empty if all agree."""
    expected, found = ({path.relative_to(top) for path in top.rglob("*.*")} for top in (rendered, committed))
    lines = [f"{path}: missing" for path in sorted(expected - found)]
    lines += [f"{path}: not made by this script" for path in sorted(found - expected)]
    both = sorted(expected & found)
    return lines + [f"{path}: differs" for path in both if not same_content(rendered / path, committed / path)]


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Render a small synthetic dataset in the GNM/ViNT layout.",
        epilog="example: python sample/render_sample.py --output /tmp/rendered_rooms",
    )
    default = Path(__file__).resolve().parent / "rendered_rooms"
    parser.add_argument("--output", type=Path, default=default, help="folder of trajectories (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if --output differs from a new run")
    arguments = parser.parse_args()
    if not arguments.check:
        write_dataset(arguments.output)
        return 0
    with tempfile.TemporaryDirectory() as rendered:
        write_dataset(Path(rendered))
        lines = differences(Path(rendered), arguments.output)
    print("\n".join(lines) or "no differences", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
