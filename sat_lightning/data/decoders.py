"""Bytes of a sample's members -> values, by their names."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sat_lightning.data.samples import BadSampleError, import_extra
from sat_lightning.data.tables import parse_json
from sat_lightning.errors import DataError

Sample = dict[str, Any]

META_KEYS = ("key", "__key__")
"""What the key of a sample is called in its metadata."""


def decode_sample(sample: Sample) -> Sample:
    """Turn the members of a sample into values by the last part of their names.

    `json` is parsed, `txt`, `text`, `html` and `md` are decoded, `cls`, `index` and `id` are integers, `npy` is an
    array, `jpg`, `png`, ... are arrays uint8 `[h, w, 3]`; anything else stays bytes. Pickles are never read.

    Args:
        sample: bytes by field.

    Returns:
        Values by field, and the fields of the metadata.

    Raises:
        BadSampleError: a member is not what its name says, or there should be metadata and is none.
    """
    where = f"{sample['__shard__']}, key {sample['__key__']}"
    decoded: Sample = {}
    for field, content in sample.items():
        decoder = _DECODERS.get(field.rpartition(".")[2].lower()) if isinstance(content, bytes) else None
        try:
            if field == "__metadata__":
                decoded |= {name: value for name, value in parse_json(content).items() if name not in META_KEYS}
            else:
                decoded[field] = content if decoder is None else decoder(content)
        except DataError:
            raise
        except Exception as error:  # a broken image or array raises whatever its library likes
            if field == "__metadata__" and not content:
                raise BadSampleError(
                    f"{where}: no row with this key in its .meta.jsonl. Add it, or remove the file."
                ) from error
            raise BadSampleError(
                f"{where}: field '{field}' cannot be decoded ({type(error).__name__}: {error}). Replace or remove the "
                "sample."
            ) from error
    return decoded


def _decode_image(content: bytes) -> NDArray[np.uint8]:
    image = import_extra("PIL.Image", "an image in a shard")
    return np.array(image.open(io.BytesIO(content)).convert("RGB"))


def _decode_array(content: bytes) -> NDArray[Any]:
    return np.load(io.BytesIO(content), allow_pickle=False)


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "json": json.loads,
    "npy": _decode_array,
    **dict.fromkeys(("txt", "text", "html", "md"), bytes.decode),
    **dict.fromkeys(("cls", "index", "id"), int),
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"), _decode_image),
}
