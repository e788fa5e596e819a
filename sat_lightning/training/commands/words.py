"""The options that verbs which write text share, and the strategy that they name."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any, NoReturn

from sat_lightning.errors import UsageError
from sat_lightning.generation import BaseStrategy, BeamSearchStrategy, GenerationOptions, constraints
from sat_lightning.generation.beam_scoring import PlainBeamScoring
from sat_lightning.generation.options import CACHE_DTYPES
from sat_lightning.training.commands.source import DTYPES, Source

#: Tokens written at most, where the user does not say.
DEFAULT_NEW_TOKENS = 256


class Parser(argparse.ArgumentParser):
    """Refuses in one line, as all verbs do."""

    def error(self, message: str) -> NoReturn:
        """Raise what the command line shows."""
        raise UsageError(message)


def make_parser(verb: str, description: str | None) -> Parser:
    """Make a parser with the options of model, strategy and speed.

    Args:
        verb: its name.
        description: what `--help` says first.
    """
    parser = Parser(prog=f"sat-lightning {verb}", allow_abbrev=False, description=description)
    model = parser.add_argument_group("model")
    model.add_argument("--ckpt", required=True, metavar="PATH", help="a run's folder, a checkpoint, or a model folder")
    model.add_argument("--tokenizer", help="bytes, a file, or a model's folder; default: the model's, or the run's")
    model.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters; default: float32")
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1...; default: the GPU if there is one")
    model.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of kept keys and values; default: as computed")
    model.add_argument("--prefill-chunk", type=int, metavar="N", help="tokens of the prompt read at once; default: all")
    model.add_argument("--check-every", type=int, default=1, metavar="N", help="look for the end every N tokens")
    model.add_argument("--compile", action="store_true", help="compile the step of one token: for long outputs")
    _add_choosing(parser.add_argument_group("how tokens are chosen"))
    _add_ending(parser.add_argument_group("when a text ends"))
    return parser


def _add_choosing(group: Any) -> None:  # noqa: ANN401
    add = group.add_argument
    add("--temperature", type=float, default=1.0, metavar="T", help="divides the logits; 0 takes the likeliest token")
    add("--top-k", type=int, default=0, metavar="K", help="among the K likeliest; 1 takes the likeliest; 0: all")
    add("--top-p", type=float, default=0.0, metavar="P", help="among the fewest of this probability; 0: all")
    add("--min-p", type=float, default=0.0, metavar="P", help="none less than P times as likely as the likeliest")
    add("--typical-p", type=float, default=0.0, metavar="P", help="the most typical of this probability; 0: all")
    add("--seed", type=int, help="same seed, same text, whatever the batch size; default: a new one")
    add("--num-beams", type=int, default=1, metavar="N", help="above 1: beam search, which draws nothing")
    add("--length-penalty", type=float, default=1.0, metavar="A", help="beams: the exponent of the length")
    add("--n-best", type=int, default=1, metavar="N", help="beams: how many results of each prompt; at most the beams")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: against all tokens so far")
    add("--frequency-penalty", type=float, default=0.0, metavar="F", help="subtracted for each earlier time")
    add("--presence-penalty", type=float, default=0.0, metavar="F", help="subtracted once from earlier tokens")
    add("--no-repeat-ngram-size", type=int, default=0, metavar="N", help="write no n-gram of this size twice")
    add("--regex", metavar="PATTERN", help="write what this matches as a whole, and nothing else")
    add("--json-schema", metavar="FILE", help="write JSON that this schema allows, and nothing else")
    add("--bad-word", action="append", default=[], metavar="TEXT", help="never write this; may be given again")


def _add_ending(group: Any) -> None:  # noqa: ANN401
    add = group.add_argument
    add("--max-new-tokens", type=int, metavar="N", help=f"default: {DEFAULT_NEW_TOKENS}, or half of the positions")
    add("--min-new-tokens", type=int, default=0, metavar="N", help="no end before this many")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    add("--end-token", action="append", default=[], metavar="TOKEN", help="id or text of a token that ends a text, in the place of the model's; may be given again")  # fmt: skip # noqa: E501
    add("--ignore-end", action="store_true", help="no token ends a text")


def make_strategy(options: argparse.Namespace, source: Source) -> Any:  # noqa: ANN401
    """Return the strategy that the options name.

    Args:
        options: of `make_parser`.
        source: its tokenizer reads the bad words.

    Raises:
        UsageError: options that do not go together.
        ConfigError: a value is out of its range.
    """
    if options.regex and options.json_schema:
        raise UsageError("--regex and --json-schema both say what is written. Give one of the two.")
    if not 1 <= options.n_best <= max(1, options.num_beams):
        raise UsageError(
            f"--n-best is {options.n_best}; it is at least 1 and at most --num-beams, {options.num_beams}."
        )
    shared = {
        "top_k": options.top_k, "top_p": options.top_p, "min_p": options.min_p, "typical_p": options.typical_p,
        "signed_repetition_penalty": options.repetition_penalty, "frequency_penalty": options.frequency_penalty,
        "presence_penalty": options.presence_penalty, "no_repeat_ngram_size": options.no_repeat_ngram_size,
        "min_new_tokens": options.min_new_tokens, "bad_words": _bad_words(options.bad_word, source),
        "end_tokens": find_end_tokens(options, source), "temperature": options.temperature,
        "processors": _grammars(options, source),
    }  # fmt: skip
    if options.num_beams == 1:
        return BaseStrategy(**shared)
    if options.temperature == 0:
        raise UsageError("--temperature 0 takes the likeliest token, and --num-beams searches. Give one of the two.")
    return BeamSearchStrategy(options.num_beams, scoring=PlainBeamScoring(options.length_penalty), **shared)


def find_end_tokens(options: argparse.Namespace, source: Source) -> list[int]:
    """Return the ids that end a text.

    Args:
        options: of `make_parser`.
        source: gives the ids where the options give none, and turns text into ids.

    Raises:
        UsageError: an end token is no single token.
    """
    if options.ignore_end and options.end_token:
        raise UsageError("--ignore-end and --end-token contradict each other. Give one of the two.")
    if not options.end_token:
        return [] if options.ignore_end else [x for x in source.end_tokens if x < source.model.config.vocab_size]
    return [read_token(word, f"--end-token {word!r}", source) for word in options.end_token]


def read_token(word: str, option: str, source: Source) -> int:
    """Return the id of a token that an option names.

    Args:
        word: the id, or the text.
        option: and its value, for the message.
        source: turns text into ids.

    Raises:
        UsageError: it is no single token, or one that the model does not have.
    """
    ids = [int(word)] if word.isdecimal() else [int(token) for token in source.tokenizer.encode(word)]
    if len(ids) != 1:
        raise UsageError(f"{option} is {len(ids)} tokens. Give one token, or its id; a text ends at --stop TEXT.")
    if ids[0] >= source.model.config.vocab_size:
        raise UsageError(f"{option} is outside the vocabulary of {source.model.config.vocab_size}, ids from 0 on.")
    return ids[0]


def make_generation_options(options: argparse.Namespace, source: Source) -> GenerationOptions:
    """Return what `generate` is told beside the strategy, with a seed in any case.

    Args:
        options: of `make_parser`; `seed` and `max_new_tokens` are filled in.
        source: how many positions it has bounds the default of `max_new_tokens`.
    """
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    if options.max_new_tokens is None:
        options.max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, source.model.config.max_sequence_length // 2))
    return GenerationOptions(
        max_new_tokens=options.max_new_tokens, end_tokens=[], stop_strings=tuple(options.stop), seed=options.seed,
        prefill_chunk=options.prefill_chunk, cache_dtype=options.cache_dtype, check_every=options.check_every,
        compile=options.compile,
    )  # fmt: skip


def _grammars(options: argparse.Namespace, source: Source) -> list[Any]:
    if options.regex:
        return [constraints.regex(options.regex, source.tokenizer)]
    if not options.json_schema:
        return []
    try:
        schema = Path(options.json_schema).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--json-schema {options.json_schema} cannot be read: {error}.") from error
    return [constraints.json_schema(schema, source.tokenizer)]


def _bad_words(words: list[str], source: Source) -> list[list[int]]:
    """Return the ids of each word, alone and behind a space, as tokenizers tell these apart."""
    spellings = dict.fromkeys(spelling for word in words for spelling in (word, f" {word.lstrip()}"))
    return [ids for word in spellings if (ids := [int(token) for token in source.tokenizer.encode(word)])]
