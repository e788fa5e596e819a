"""How many samples a second come out of a jsonl file, a memory map of tokens and tar shards, beside peers?

One process without loader workers reads the same files from the page cache, round by round in rotated order, and
decodes every sample; the contestants of a format must agree on what they have read. Preparation (an index, a
conversion) is done before and timed apart.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import timing
import torch
import webdataset
from timing import spread

from sat_lightning.data import ShardStream, StreamOptions, open_records

#: Reads samples in batches of 32; returns a sum over what they hold.
Read = Callable[[], int]

BATCH_SIZE = 32
LENGTH = 1024
NUM_SHARDS = 8
SHUFFLE_SIZE = 1000
WORDS = "the transformer reads one token after another and writes only what it has not yet said ".split()


@dataclass(frozen=True)
class Contestant:
    """One way to read one format, the first of a format being ours."""

    name: str
    read: Read
    prepared: float


def prepare(name: str, build: Callable[[], Read]) -> Contestant:
    start = time.perf_counter()
    read = build()
    return Contestant(name, read, time.perf_counter() - start)


def make_texts(num_samples: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(20, 180))) for _ in range(num_samples)]


def by_number(rows: Any, num_samples: int, size_of: Callable[[Any], int]) -> Read:
    """Read every row once, in a shuffled order."""
    batches = np.random.default_rng(1).permutation(num_samples)
    gather = rows.__getitems__ if hasattr(rows, "__getitems__") else lambda numbers: [rows[n] for n in numbers]

    def read() -> int:
        total = 0
        for start in range(0, num_samples, BATCH_SIZE):
            total += sum(map(size_of, gather(batches[start : start + BATCH_SIZE].tolist())))
        return total

    return read


def in_turn(samples: Callable[[], Any], size_of: Callable[[Any], int]) -> Read:
    return lambda: sum(map(size_of, samples()))


def text_size(row: dict[str, Any]) -> int:
    return len(row["text"]) + int(row["label"])


def read_jsonl(folder: Path, texts: list[str]) -> list[Contestant]:
    file, num = folder / "rows.jsonl", len(texts)
    rows = [json.dumps({"text": text, "label": number % 10}) for number, text in enumerate(texts)]
    file.write_text("\n".join(rows))
    cache = str(folder / "cache")

    def load() -> Any:
        return datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)

    def stream() -> Any:
        return datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)

    options = StreamOptions(shuffle_size=SHUFFLE_SIZE, num_epochs=1, cache_dir=cache)
    return [
        prepare("jsonl by number: ours", lambda: by_number(open_records(str(file), cache_dir=cache), num, text_size)),
        prepare("jsonl by number: datasets (Arrow)", lambda: by_number(load(), num, text_size)),
        prepare("jsonl stream, shuffled: ours", lambda: in_turn(lambda: ShardStream(str(file), options), text_size)),
        prepare(
            "jsonl stream, shuffled: datasets",
            lambda: in_turn(lambda: stream().shuffle(seed=0, buffer_size=SHUFFLE_SIZE), text_size),
        ),
    ]


def token_size(row: dict[str, Any]) -> int:
    return int(row["input_ids"][0]) + int(row["target_ids"][-1])


def read_tokens(folder: Path, num: int) -> list[Contestant]:
    tokens = np.random.default_rng(0).integers(0, 50000, num * LENGTH + 1).astype(np.uint16)
    tokens.tofile(folder / "tokens.bin")

    def load() -> Any:
        windows = np.lib.stride_tricks.sliding_window_view(tokens, LENGTH + 1)[::LENGTH].astype(np.int32)
        datasets.Dataset.from_dict({"tokens": windows}).save_to_disk(folder / "arrow")
        return datasets.load_from_disk(folder / "arrow").with_format("numpy")

    class Plain:
        """What a training script does by hand, as nanoGPT does."""

        def __getitems__(self, numbers: list[int]) -> list[dict[str, torch.Tensor]]:
            data = np.memmap(folder / "tokens.bin", dtype=np.uint16, mode="r")
            rows = [data[n * LENGTH : n * LENGTH + LENGTH + 1].astype(np.int64) for n in numbers]
            return [{"input_ids": torch.from_numpy(r[:-1]), "target_ids": torch.from_numpy(r[1:])} for r in rows]

    class Arrow:
        def __init__(self) -> None:
            self.rows = load()

        def __getitems__(self, numbers: list[int]) -> list[dict[str, torch.Tensor]]:
            rows = torch.from_numpy(self.rows[numbers]["tokens"]).long()
            return [{"input_ids": row[:-1], "target_ids": row[1:]} for row in rows]

    path = str(folder / "tokens.bin")
    return [
        prepare(
            "token rows by number: ours", lambda: by_number(open_records(path, sequence_length=LENGTH), num, token_size)
        ),
        prepare("token rows by number: numpy by hand", lambda: by_number(Plain(), num, token_size)),
        prepare("token rows by number: datasets (Arrow)", lambda: by_number(Arrow(), num, token_size)),
    ]


def read_tar(folder: Path, texts: list[str]) -> list[Contestant]:
    per_shard = -(-len(texts) // NUM_SHARDS)
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for number in range(shard * per_shard, min((shard + 1) * per_shard, len(texts))):
                for field, content in (("txt", texts[number].encode()), ("cls", b"%d" % (number % 10))):
                    member = tarfile.TarInfo(f"{number:08}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    pattern, cache = str(folder / f"{{000..{NUM_SHARDS - 1:03}}}.tar"), str(folder / "cache")

    def size_of(sample: dict[str, Any]) -> int:
        return len(sample["txt"]) + int(sample["cls"])

    def library() -> Any:
        shards = webdataset.WebDataset(pattern, shardshuffle=NUM_SHARDS, seed=0)
        return shards.shuffle(SHUFFLE_SIZE).decode()

    def streamed() -> Any:
        files = sorted(str(file) for file in folder.glob("*.tar"))
        rows = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
        return rows.shuffle(seed=0, buffer_size=SHUFFLE_SIZE)

    def ours(pattern: str) -> Any:
        return ShardStream(pattern, StreamOptions(shuffle_size=SHUFFLE_SIZE, num_epochs=1, cache_dir=cache))

    return [
        # As a URL it is read from its beginning in one pass, as a remote shard is; a local file has an index.
        prepare("tar stream, shuffled: ours, by URL", lambda: in_turn(lambda: ours(f"file://{pattern}"), size_of)),
        prepare("tar stream, shuffled: ours, with an index", lambda: in_turn(lambda: ours(pattern), size_of)),
        prepare("tar stream, shuffled: webdataset", lambda: in_turn(library, size_of)),
        prepare("tar stream, shuffled: datasets", lambda: in_turn(streamed, size_of)),
        prepare("tar by number: ours", lambda: by_number(open_records(pattern, cache_dir=cache), len(texts), size_of)),
    ]


def compare(contestants: list[Contestant], num_samples: int, arguments: argparse.Namespace) -> list[list[str]]:
    """Check that all read the same, and time them; returns rows of the table."""
    sums = {contestant.name: contestant.read() for contestant in contestants}
    if len(set(sums.values())) > 1:
        raise SystemExit(f"the contestants read different samples: {sums}")
    samples = timing.measure({c.name: c.read for c in contestants}, arguments.rounds, own_time=arguments.own_time)
    rows, first = [], contestants[0]
    for contestant in contestants:
        if contestant.name.partition(":")[0] != first.name.partition(":")[0]:
            first = contestant
        rates = [num_samples / seconds for seconds in samples.seconds[contestant.name]]
        ratio = spread(samples.ratios(first.name, contestant.name), 2)
        rows.append(
            [contestant.name, spread(rates, 0), "1" if contestant is first else ratio, f"{contestant.prepared:.2f}"]
        )
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-time", action="store_true", help="CPU time of this process, on a machine in use")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    parser.add_argument("--smoke", action="store_true", help="few samples, to see that all runs")
    arguments = parser.parse_args()
    num_samples = 200 if arguments.smoke else arguments.num_samples
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    rows = []
    texts = make_texts(num_samples)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SAT_HOME"] = folder
        for contestants in (
            read_jsonl(Path(folder), texts),
            read_tokens(Path(folder), num_samples),
            read_tar(Path(folder), texts),
        ):
            rows += compare(contestants, num_samples, arguments)
    header = ["what reads", "samples/s", "times slower than ours", "prepared once in s"]
    clock = "CPU time of the process" if arguments.own_time else "time on the wall"
    versions = f"datasets {datasets.__version__}, webdataset {webdataset.__version__}, numpy {np.__version__}"
    text = (
        f"\n{num_samples} samples of {sum(map(len, texts)) / num_samples:.0f} characters, or of {LENGTH} tokens; "
        f"{arguments.rounds} rounds; {clock}; median [lowest..highest].\n{timing.machine('cpu')}; {versions}\n\n"
        f"{timing.table(header, rows)}\n"
    )
    print(text)
    if arguments.output:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
