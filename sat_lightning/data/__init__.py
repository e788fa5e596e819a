"""From files on disk to rows of token ids: sources, tokenizers, the token store, packing, splitting and order.

The stages know no model and no trainer, and each can be used alone. For pretraining, documents run together::

    source = open_source("stdlib://")                            # documents, read lazily
    store = prepare_store(source, ByteTokenizer(), cache_dir)    # tokens, prepared once, memory-mapped
    spans = split_spans(store, validation=0.05)                  # which tokens train, validate, test
    rows = PackedTokens(store, 256, spans["train"])              # map-style dataset of rows
    mixture = Mixture([len(rows)], seed=0)                       # which row comes when; of several sources, if need be
    batches = ShardedBatches(mixture, 8)                         # who takes which rows: a batch_sampler, on any ranks

Where a row of a file is a sample, it is read by number, and where it cannot be, as a stream::

    records = open_records("answers.jsonl")                      # rows, decoded when asked for
    samples = ProcessedRecords(records, Tokenize("bytes", ["prompt", "answer"], learned=["answer"]))
    loader = DataLoader(samples, 8, collate_fn=PadCollate())     # padded; PackedDocuments packs them instead
    stream = ShardStream("s3://bucket/{000..031}.tar")           # samples of remote shards, resumed exactly

`SATDataModule` does all of this from YAML. Samples of their own, packed several to a row or in batches by tokens::

    path: [{path: chat.jsonl, tokens: 0.7}, {path: forum.parquet, tokens: 0.3, process_fn: mine.to_sample}]
    options:
      samples: {fields: [prompt, answer], learned: [answer], too_long: truncate}    # pack: true for packed rows
      bucket_size: 4096                                                             # similar lengths side by side
      max_tokens: 16384                                                             # of a rank's batch, with padding
      unpad: true                                                                   # layers compute no padding

Text around the fields, or the messages of a chat, are `samples.template`: `"Question: {prompt} Answer: {answer}"`, or
`chat` for the template of the tokenizer's folder. A validation path is read as that of training, or has its own fields.
"""

# Importing the formats registers them; none of them imports a library of the extra [data] before it is used.
from sat_lightning.data import arrays as _arrays  # noqa: F401
from sat_lightning.data import columns as _columns  # noqa: F401
from sat_lightning.data import demo as _demo  # noqa: F401
from sat_lightning.data import docstrings as _docstrings  # noqa: F401
from sat_lightning.data import formats as _formats  # noqa: F401
from sat_lightning.data import libraries as _libraries  # noqa: F401
from sat_lightning.data import tables as _tables  # noqa: F401
from sat_lightning.data import urls as _urls  # noqa: F401
from sat_lightning.data import webdataset as _webdataset  # noqa: F401
from sat_lightning.data.batches import Place, ShardedBatches
from sat_lightning.data.collate import LabelCollate, PadCollate, batch_by_tokens, bucket_by_length
from sat_lightning.data.documents import DocumentCollate, PackedDocuments, separate_documents
from sat_lightning.data.entries import WeightedPath
from sat_lightning.data.labelled import Labels
from sat_lightning.data.mixed import MixedRows
from sat_lightning.data.mixture import Mixture, Share
from sat_lightning.data.model_tokenizers import SentencePieceFile, get_tokenizer
from sat_lightning.data.order import PADDING_ROW, ShardedOrder, permute
from sat_lightning.data.packing import IGNORED_TARGET, PackedTokens
from sat_lightning.data.pairs import PairCollate, TokenizePair
from sat_lightning.data.preparation import prepare_store
from sat_lightning.data.records import Records, open_records
from sat_lightning.data.rowsamples import SampleOptions
from sat_lightning.data.samples import BadSampleError
from sat_lightning.data.sources import Source, SourceOptions, Unfinished, open_source, register_source
from sat_lightning.data.split import split_spans
from sat_lightning.data.store import TokenStore
from sat_lightning.data.stream import ShardStream, StreamOptions
from sat_lightning.data.tokenizer import ByteTokenizer, Tokenizer, TokenizersFile, load_tokenizer
from sat_lightning.data.transforms import ProcessedRecords, Tokenize
from sat_lightning.data.unpad import UnpadCollate

__all__ = [
    "IGNORED_TARGET",
    "PADDING_ROW",
    "BadSampleError",
    "ByteTokenizer",
    "DocumentCollate",
    "LabelCollate",
    "Labels",
    "MixedRows",
    "Mixture",
    "PackedDocuments",
    "PackedTokens",
    "PadCollate",
    "PairCollate",
    "Place",
    "ProcessedRecords",
    "Records",
    "SampleOptions",
    "SentencePieceFile",
    "ShardStream",
    "Share",
    "ShardedBatches",
    "ShardedOrder",
    "Source",
    "SourceOptions",
    "StreamOptions",
    "TokenStore",
    "Tokenize",
    "TokenizePair",
    "Tokenizer",
    "TokenizersFile",
    "Unfinished",
    "UnpadCollate",
    "WeightedPath",
    "batch_by_tokens",
    "bucket_by_length",
    "get_tokenizer",
    "load_tokenizer",
    "open_records",
    "open_source",
    "permute",
    "prepare_store",
    "register_source",
    "separate_documents",
    "split_spans",
]
