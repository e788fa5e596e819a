"""A tiny run that leaves a language model of bytes, for what reads runs."""

from __future__ import annotations

from pathlib import Path

from sat_lightning.cli import main

RECIPE = """
model:
  class_path: LanguageModelingTask
  init_args:
    model:
      class_path: GPT2Model
      init_args:
        config: {num_layers: 1, hidden_size: 16, num_attention_heads: 2, vocab_size: 257, max_sequence_length: 48}
    mixins: %s
    optim: {learning_rate: 0.02}
data:
  class_path: SATDataModule
  init_args: {path: text.txt, sequence_length: 16, batch_size: 4, validation: 0.2}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 3
  enable_progress_bar: false
  enable_model_summary: false
  callbacks: %s
"""


def fit_writer(mixins: str = "null", callbacks: str = "null", more: str = "") -> Path:
    """Train in the current folder; return that of the run, below it."""
    Path("text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    Path("tiny.yaml").write_text(RECIPE % (mixins, callbacks) + more)
    main(["fit", "--config", "tiny.yaml"])
    return Path("runs/tiny/version_0")
