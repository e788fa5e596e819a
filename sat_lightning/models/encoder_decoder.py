"""A plain encoder with a plain decoder.

What differs from the plain transformer:
- there are two, `encoder` and `decoder`, which read words from one table;
- the encoder returns hidden states, the decoder attends to them and is causal.
"""

from __future__ import annotations

from sat_lightning.model import EncoderDecoderModel, register_model

__all__ = ["EncoderDecoderModel"]

register_model(EncoderDecoderModel)
