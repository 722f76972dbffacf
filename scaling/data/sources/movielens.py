"""MovieLens: ratings of films and free-text tags by the same users (Harper and Konstan 2015,
https://doi.org/10.1145/2827872; https://grouplens.org/datasets/movielens).

A folder as it is unpacked: ``ratings``, ``movies`` and ``tags`` as ``.csv`` (ml-latest,
ml-latest-small, ml-20m, ml-25m, ml-32m), or as ``.dat``, with fields parted by ``::`` and without a
header (ml-1m, ISO-8859-1 and without tags; ml-10m, UTF-8).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from scaling.config import Frozen, Name
from scaling.data.sources import Log, resolve
from scaling.data.sources.delimited import Row, csv_rows, find, parsed
from scaling.data.sources.lines import read_lines
from scaling.data.sources.values import finite_number, known, number_id, unix_time, user_id

RATINGS = ("userId", "movieId", "rating", "timestamp")
MOVIES = ("movieId", "title", "genres")
TAGS = ("userId", "movieId", "tag", "timestamp")


class Config(Frozen):
    """``[source]`` of a corpus file."""

    kind: Literal["movielens"]
    path: str
    """Folder of the files, each plain or ``.gz``."""
    ratings: Name = "ratings"
    """Service of the films a user rated."""
    tags: Name | None = None
    """Service of the tags a user gave; the tag is the item. None: they are not read."""
    genres: bool = False
    """Whether a film's text is its title and its genres, or its title alone."""


def files(config: Config, base: Path) -> list[Path]:
    """The files read: ratings, films and, if asked for, tags."""
    folder = resolve(base, config.path)
    tables = ["ratings", "movies", *(["tags"] if config.tags else [])]
    return [find(folder, f"{table}.csv", f"{table}.dat") for table in tables]


def rows(config: Config, base: Path) -> Iterator[Log]:
    """Logs of the ratings, then of the tags; films that ``movies`` lacks are untitled.

    Raises:
        CorpusError: a file is missing, torn or no table of this format.
    """
    ratings, movies, *tags = files(config, base)
    films: dict[str, tuple[str, str | None]] = {}

    def film(line: int, movie: str, title: str, genres: str) -> None:
        listed = None if genres == "(no genres listed)" else genres
        text = f"{title} {listed.replace('|', ' ')}" if config.genres and listed else title
        films[number_id(movie, "film")] = (text, listed)

    def rating(line: int, user: str, movie: str, stars: str, time: str) -> Log:
        text, genres = films.get(number_id(movie, "film"), (None, None))
        return Log(
            user_id(user),
            config.ratings,
            movie,
            text,
            unix_time(time),
            line,
            finite_number(stars, "rating"),
            genres,
        )

    def tag(line: int, user: str, movie: str, words: str, time: str) -> Log:
        return Log(
            user=user_id(user),
            service=config.tags,
            text=known(words, "tag"),
            time=unix_time(time),
            position=line,
        )

    yield from parsed(movies, _table(movies, MOVIES), film, latin_1=_is_dat(movies))
    yield from parsed(ratings, _table(ratings, RATINGS), rating, latin_1=_is_dat(ratings))
    for path in tags:
        yield from parsed(path, _table(path, TAGS), tag, latin_1=_is_dat(path))


def _is_dat(path: Path) -> bool:
    return ".dat" in path.suffixes


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    return _dat_rows(path, len(columns)) if _is_dat(path) else csv_rows(path, columns)


def _dat_rows(path: Path, width: int) -> Iterator[Row]:
    for line, text in read_lines(path):
        values = text.split("::")
        wrong = f"{len(values)} fields parted by '::' instead of {width}"
        yield line, values if len(values) == width else wrong
