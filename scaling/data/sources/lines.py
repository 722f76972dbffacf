"""Lines of text files, for the sources that parse them one by one."""

from collections.abc import Iterator
from pathlib import Path

from scaling.data.corpus import CorpusError
from scaling.data.sources import UNREADABLE, open_text


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines of a file that are not blank, without their ends.

    Raises:
        CorpusError: the file is missing, torn, or no gzip though it is named so.
    """
    with open_text(path, "utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if line := line.rstrip("\r\n"):
                    yield number, line
        except UNREADABLE as e:
            raise CorpusError(f"{path}: cannot be read to its end: {e}") from None
