"""Parts of a file with more text than is needed: unbiased, reproducible, and never more at once."""

import json
import os
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet

from chai_attention.calibration.drawing import Drawing, Piece, Run
from chai_attention.calibration.records import Chat


def numbered(count, size=10):
    return [Piece(n, 0, True, f"{n:0{size}d}") for n in range(count)]


def drawn(pieces, most, seed=0):
    drawing = Drawing(most, seed)
    for piece in pieces:
        drawing.add(piece)
    return [*drawing.contents()]


def test_every_document_is_as_likely_as_any_other():
    """30 of 300, 400 times over: each 40 times on average, give or take 6."""
    counts = Counter(text for seed in range(400) for text in drawn(numbered(300), 305, seed))
    assert len(counts) == 300
    assert sum(counts.values()) == 400 * 30
    assert min(counts.values()) > 15
    assert max(counts.values()) < 65
    thirds = [sum(counts[f"{n:010d}"] for n in range(at, at + 100)) for at in (0, 100, 200)]
    assert all(abs(third - 4000) < 200 for third in thirds)  # neither the beginning nor the end


def test_long_documents_are_no_more_likely_than_short_ones():
    pieces = [Piece(n, 0, True, str(n % 2) * (10 if n % 2 else 50)) for n in range(400)]
    texts = [text for seed in range(50) for text in drawn(pieces, 1000, seed)]
    share = sum(text[0] == "1" for text in texts) / len(texts)
    assert 0.45 < share < 0.55


def test_never_is_more_kept_than_asked_for():
    drawing = Drawing(100, seed=0)
    for piece in numbered(200, size=7):
        drawing.add(piece)
        assert drawing.kept <= 100
    assert drawing.seen == 1400
    assert len([*drawing.contents()]) == 14


def test_what_there_is_room_for_is_kept_whole_and_in_order():
    chat = Chat(({"role": "user", "content": "Hi"},), "here")
    pieces = [
        Piece(0, 0, False, "one "), Piece(0, 1, False, "two "), Piece(0, 2, True, "three"),
        Piece(1, 0, True, chat), Piece(3, 0, True, "four"),
    ]  # fmt: skip
    found = drawn(pieces, 10**6)
    assert found == ["one two three", chat, "four"]
    assert not any(isinstance(content, Run) for content in found)


def test_neighbours_are_one_run_and_a_document_with_a_piece_missing_is_none():
    pieces = [Piece(0, part, part == 99, f"{part:02d} ") for part in range(100)]
    found = drawn(pieces, 210)
    assert all(isinstance(run, Run) for run in found)
    for run in found:
        places = [int(part) for part in run.split()]
        assert places == [*range(places[0], places[0] + len(places))]
    assert 60 <= sum(len(run.split()) for run in found) <= 70
    assert 1 < len(found) < 60


def test_the_seed_decides():
    pieces = numbered(300)
    assert drawn(pieces, 305, seed=5) == drawn(pieces, 305, seed=5)
    assert drawn(pieces, 305, seed=5) != drawn(pieces, 305, seed=6)


MEMORY = """
import json, resource, sys, warnings

warnings.simplefilter("ignore")

from chai_attention.calibration import texts, token_text
from chai_attention.calibration.request import TextRequest
from chai_attention.calibration.settings import Settings
from chai_attention.calibration.sources import Source
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

texts.LEAST_READ = 1 << 18
token_text.PIECE = 1 << 14
model, tokenizer, found = tiny_model("llama"), tiny_tokenizer(), {}
for size in ("small", "large"):
    for kind in sys.argv[1:]:
        request = TextRequest([Source(f"{size}.{kind}")], samples=32, held_out=16, length=64)
        chosen = request.settle(Settings(save=0.2), model, tokenizer)
        assert len(request.read(model, tokenizer, chosen).sequences) == 32
        found[f"{size} {kind}"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(found))
"""
KINDS = ("txt", "jsonl", "json", "csv", "parquet")
ROWS = [{"text": f"Record {n} of a text. " * 50} for n in range(250)]


def write(path, times):
    """``times`` 280 KB of records; written bit by bit."""
    lines = [json.dumps(row) for row in ROWS]
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(ROWS)
        options = {"compression": "none", "use_dictionary": False}
        with pyarrow.parquet.ParquetWriter(path, table.schema, **options) as file:
            for _ in range(times):
                file.write_table(table)
        return
    with path.open("w") as file:
        for time in range(times):
            if path.suffix == ".json":
                file.write(("," if time else "[") + ",".join(lines))
            elif path.suffix == ".csv":
                file.write("" if time else "text\n")
                file.writelines(f'"{row["text"]}"\n' for row in ROWS)
            else:
                file.write("\n".join(lines) + "\n")
        file.write("]" if path.suffix == ".json" else "")


def test_a_text_of_forty_megabytes_takes_the_memory_of_one_of_two(tmp_path):
    for size, megabytes in (("small", 2), ("large", 40)):
        for kind in KINDS:
            write(tmp_path / f"{size}.{kind}", times=4 * megabytes)
            assert (tmp_path / f"{size}.{kind}").stat().st_size > megabytes * 10**6
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *KINDS],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    before = max(peaks[f"small {kind}"] for kind in KINDS)
    grown = {kind: peaks[f"large {kind}"] - before for kind in KINDS}
    assert max(grown.values()) < 16, grown
