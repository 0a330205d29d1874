"""The folder of a run with its configuration and last checkpoint, as train.py leaves it, without training."""

import torch
from omegaconf import OmegaConf

from blockwright.training.data.tokenizers.tokenizer import Bytes


def write_run(folder, decoder, text):
    """A run on twelve files of the same text, in windows of 48 bytes."""
    for i in range(12):
        (folder / f"{i}.txt").write_text(text)
    corpus = {"_target_": "blockwright.training.data.corpus.TextFiles", "files": str(folder / "*.txt")}
    data = {"name": "text", "sequence_length": 48, "batch_size": 4}
    data |= {
        "tokenizer": {"_target_": "blockwright.training.data.tokenizers.tokenizer.Bytes"},
        "cache_dir": str(folder / "cache"),
    }
    (folder / ".hydra").mkdir()
    OmegaConf.save({"data": {**data, "corpus": corpus}}, folder / ".hydra" / "config.yaml")
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    parts = {"state_dict": weights, "hyper_parameters": {"model": decoder.config}}
    (folder / "checkpoints").mkdir()
    torch.save({**parts, "TextDataModule": {"tokenizer": Bytes().to_json()}}, folder / "checkpoints" / "last.ckpt")
    return folder
