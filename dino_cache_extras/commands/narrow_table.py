"""A list of caches that fits into a terminal."""

from __future__ import annotations

from progress_utils import in_columns

SHORTEST_NAME = 8  # characters that are left of a dataset's name in the narrowest terminal


def fitted(lines: list[tuple[str, ...]], width: int) -> list[str]:
    """The lines of a table, its head first: the dataset's name, figures, and the folder in the last column. Where they
    are wider than the terminal, the folder has a line of its own below, and long names are cut."""
    whole = in_columns(lines)
    if max(map(len, whole)) <= width:
        return whole
    figures = in_columns([("", *_short(line[1:-1])) for line in lines])
    most = max(SHORTEST_NAME, width - max(map(len, figures)))
    names = [name if len(name) <= most else name[: most - 1] + "…" for name, *_ in lines]
    head, *rows = in_columns([(name, *_short(line[1:-1])) for name, line in zip(names, lines)])
    below = [f"  {line[-1]}" for line in lines[1:]]
    return [head, *(text for pair in zip(rows, below) for text in pair)]


def _short(cells: tuple[str, ...]) -> tuple[str, ...]:
    """The last one, a time like `Mon Jan 10 15:30:45 2022`, without weekday and seconds."""
    return (*cells[:-1], _short_time(cells[-1]))


def _short_time(text: str) -> str:
    words = text.split()
    return " ".join([*words[1:3], words[3][:5], words[4]]) if len(words) == 5 else text
