"""`sat-lightning generate --ckpt PATH --prompt TEXT`, or `--input prompts.jsonl --output out.jsonl`: write on.

A prompt alone is continued on the terminal as it is written. With --output the prompts of a file go in batches of like
length; a run that was killed goes on where it stopped when the same command is given again, and no prompt is answered
twice. Lines stand in the order in which they were finished until all are there, then in that of the input. Each holds
all that the input's line did, and: index (the input's line, from 0 on), generated (text), finish ("end", "stop" or
"length"), num_tokens, and for beams score and alternatives. With --draft a smaller model proposes tokens: texts of the
same distribution (with --temperature 0 the same texts) in fewer steps of the large one. With --chat each prompt is a
message, put into the form that the run was trained with, or into the model's chat template.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from tqdm import tqdm

from sat_lightning.errors import DataError, InputError, UsageError
from sat_lightning.generation import Generation, GenerationOptions, generate, generate_speculatively, stream
from sat_lightning.generation.runner import longest_of, writer_of
from sat_lightning.model import EncoderDecoderModel
from sat_lightning.training.commands.records import Output, Record, only_writer, read_records
from sat_lightning.training.commands.source import Source, describe_path, find_weights, load_model, load_source
from sat_lightning.training.commands.template import use_template
from sat_lightning.training.commands.words import (
    Parser,
    make_generation_options,
    make_parser,
    make_strategy,
    read_token,
)

#: Batches whose prompts are sorted by length together.
_BATCHES_PER_BLOCK = 64
#: Settings that do not change what is written, or not what an output holds.
_NOT_SETTINGS = frozenset(
    "output overwrite only_new batch_size device check_every compile prefill_chunk prompt".split()
)


def run_generate(verb: str, words: list[str]) -> None:
    """Run the verb.

    Args:
        verb: its name.
        words: what stands after it.

    Raises:
        UsageError: the words cannot be understood.
        SatError: there is no model, no tokenizer or no input, or the model cannot write.
    """
    options = _make_parser(verb).parse_args(words)
    if bool(options.prompt) == bool(options.input):
        raise UsageError("give either --prompt TEXT, which may be given again, or --input FILE.jsonl.")
    if options.input and not options.output:
        raise UsageError(f"--input {options.input} needs --output FILE.jsonl.")
    if options.draft and options.compile:
        raise UsageError("--compile compiles the step of one token, and with --draft several are read at once.")
    if options.num_drafts is not None and not options.draft:
        raise UsageError("--num-drafts says how much a draft proposes: give --draft PATH too.")
    if options.batch_size < 1:
        raise UsageError(f"--batch-size is {options.batch_size}; it is at least 1.")
    try:
        if options.output:
            with only_writer(options.output):
                _write_file(options)
        else:
            _write_terminal(options)
    except InputError as error:  # a prompt the model cannot take, or logits that are none: one line says it
        raise DataError(str(error)) from error


def _make_parser(verb: str) -> Parser:
    parser = make_parser(verb, __doc__)
    add = parser.add_argument_group("what is written").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="to go on from; may be given again")
    add("--input", metavar="FILE", help='lines {"prompt": "..."}; other entries are kept')
    add("--field", default="prompt", metavar="NAME", help="of the text in a line of the input; default: prompt")
    add("--output", metavar="FILE", help="where lines are added; not finished, it is gone on with")
    add("--overwrite", action="store_true", help="begin the output anew")
    add("--begin-token", action="append", metavar="TOKEN", help="id or text of a token before every prompt; may be given again; default: what a model folder's tokenizer puts there")  # fmt: skip # noqa: E501
    add("--chat", action="store_true", default=None, help="each prompt is a message: in the form of training, or the model's chat template")  # fmt: skip # noqa: E501
    add("--draft", metavar="PATH", help="a smaller model of the same tokenizer, which proposes tokens: fewer steps of the large one; texts are shown whole")  # fmt: skip # noqa: E501
    add("--num-drafts", type=int, metavar="N", help="tokens the draft proposes at once; default: 4")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at once; default: 8")
    add("--truncate", action="store_true", help="leave out the beginning of prompts that are too long")
    add("--only-new", action="store_true", help="on the terminal, leave out the prompts")
    return parser


def _write_terminal(options: argparse.Namespace) -> None:
    source = _load(options)
    strategy, settings = make_strategy(options, source), make_generation_options(options, source)
    write = _make_writer(options, source)
    for index, prompt in enumerate(options.prompt):
        ids = _read_ids(Record(index, prompt), source, settings, options.truncate)
        texts: Iterator[str]
        is_whole = options.num_beams > 1 or options.draft
        if is_whole:
            (found,) = write([ids], strategy=strategy, tokenizer=source.tokenizer, options=settings, row_ids=[index])
            best = [found, *found.alternatives][: options.n_best]
            texts = iter([("" if options.only_new else prompt) + str(each.text) + "\n" for each in best])
        else:
            parts = stream(
                source.model, [ids], strategy=strategy, tokenizer=source.tokenizer, options=settings, row_ids=[index]
            )
            texts = chain([] if options.only_new else [prompt], (part.text for part in parts))
        say("" if index == 0 else "\n")
        for text in texts:
            say(text)
        say("" if is_whole else "\n")


def _write_file(options: argparse.Namespace) -> None:
    texts = enumerate(options.prompt)
    given = [Record(i, text, {options.field: text}) for i, text in texts]
    records = given or read_records(options.input, options.field)
    output = Output(options.output, _settings(options), options.overwrite)
    options.seed = output.settings["seed"]
    source = _load(options)
    strategy, settings = make_strategy(options, source), make_generation_options(options, source)
    write = _make_writer(options, source)
    for record in records:  # one that is too long is refused now, and not after hours
        _read_ids(record, source, settings, options.truncate)
    output.begin({**output.settings, "seed": options.seed}, records)
    todo = [record for record in records if record.index not in output.done]
    with tqdm(total=len(records), initial=len(output.done), unit="prompt", disable=None, file=sys.stderr) as progress:
        for batch in _batches(todo, source, settings, options):
            found = write(
                [ids for _, ids in batch], strategy=strategy, tokenizer=source.tokenizer,
                options=settings, row_ids=[record.index for record, _ in batch],
            )  # fmt: skip
            output.append(_line(record, one, options.n_best) for (record, _), one in zip(batch, found, strict=True))
            progress.update(len(batch))
    output.sort()
    sys.stderr.write(f"{options.output}: {len(todo)} written, {len(records) - len(todo)} were there.\n")


def _make_writer(options: argparse.Namespace, source: Source) -> Callable[..., list[Generation]]:
    """Return `generate` of the model, or with a draft its speculative form."""
    if not options.draft:
        return partial(generate, source.model)
    weight = next(source.model.parameters())
    draft = load_model(options.draft).to(weight.device, weight.dtype).eval()
    return partial(
        generate_speculatively, source.model, draft, num_drafts=4 if options.num_drafts is None else options.num_drafts
    )


def _batches(
    records: Sequence[Record], source: Source, settings: GenerationOptions, options: argparse.Namespace
) -> Iterator[list[tuple[Record, list[int]]]]:
    """Yield batches of like length, the longest of each block first, so that memory runs out at once or never."""
    size = options.batch_size
    for start in range(0, len(records), size * _BATCHES_PER_BLOCK):
        block = records[start : start + size * _BATCHES_PER_BLOCK]
        rows = [(record, _read_ids(record, source, settings, options.truncate)) for record in block]
        rows.sort(key=lambda row: -len(row[1]))
        for first in range(0, len(rows), size):
            yield rows[first : first + size]


def _read_ids(record: Record, source: Source, settings: GenerationOptions, truncates: bool) -> list[int]:
    """Return the ids of a prompt that the model has room for; of an empty one the beginning of a document."""
    prompt = record.prompt
    is_pair = isinstance(source.model, EncoderDecoderModel)
    begin: list[int] = []
    if source.template is not None and isinstance(prompt, str):
        ids = source.template.encode([{"role": "user", "content": prompt}])
    elif isinstance(prompt, str):
        begin = source.begin_tokens
        ids = [int(token) for token in source.tokenizer.encode(prompt)] + (source.close_tokens if is_pair else [])
    else:
        ids = list(prompt)
    if not begin and not ids:
        begin = [int(source.tokenizer.end_of_document_id)]
    if outside := [token for token in (*begin, *ids) if not 0 <= token < source.model.config.vocab_size]:
        raise DataError(
            f"prompt {record.index + 1} holds the id {outside[0]}; the model has {source.model.config.vocab_size} "
            "words, from 0 on. Is the tokenizer the model's own?"
        )
    longest = longest_of(source.model.encoder if is_pair else writer_of(source.model))
    if longest is None:
        return [*begin, *ids]
    room = longest if is_pair else longest - int(settings.max_new_tokens or 0)
    if room < 1:
        raise UsageError(f"--max-new-tokens is {settings.max_new_tokens}, and the model has {longest} positions.")
    num_tokens = len(begin) + len(ids)
    if num_tokens > room and not truncates:
        raise DataError(
            f"prompt {record.index + 1} has {num_tokens} tokens; the model has {longest} positions, {room} of them "
            f"beside --max-new-tokens {settings.max_new_tokens}. Lower that, or give --truncate."
        )
    return [*begin, *ids[max(0, num_tokens - room) :]][:room]


def _line(record: Record, found: Generation, n_best: int) -> dict[str, Any]:
    line = {**record.fields, "index": record.index, "generated": found.text, "finish": found.finish}
    line["num_tokens"] = len(found.tokens)
    if found.score is not None:
        others = found.alternatives[: n_best - 1]
        line["score"] = float(found.score)
        line["alternatives"] = [{"generated": other.text, "score": float(other.score or 0)} for other in others]
    return line


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what decides about the text, as plain values."""
    values = {name: value for name, value in vars(options).items() if name not in _NOT_SETTINGS}
    paths = {"ckpt": find_weights(values["ckpt"])[0], "input": values["input"]}
    paths |= {"draft": find_weights(values["draft"])[0]} if values["draft"] else {}
    return values | {name: describe_path(path) for name, path in paths.items() if path}


def _load(options: argparse.Namespace) -> Source:
    source = load_source(options.ckpt, tokenizer=options.tokenizer, dtype=options.dtype, device=options.device)
    if options.chat:
        use_template(source)
    if options.begin_token is not None:
        source.begin_tokens = [read_token(word, f"--begin-token {word!r}", source) for word in options.begin_token]
    return source


def say(text: str) -> None:
    """Write to the terminal at once."""
    if text:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:  # a terminal that is no UTF-8
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
        sys.stdout.flush()
