"""Run folders of small random models that speak a chat format."""

import json

import torch
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

from blockwright.blocks.compose import compose
from blockwright.training.data.tokenizers.pretrained import Pretrained

END, START, STOP = 256, 257, 258
WORDS = {"<|endoftext|>": END, "<|im_start|>": START, "<|im_end|>": STOP}
TEMPLATE = """{% if messages[0].role != 'system' %}<|im_start|>system
Be kind.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def words(folder, template=TEMPLATE):
    """Bytes as tokens, the special tokens of ChatML, and a template beside them."""
    engine = Engine(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(list(WORDS))
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", **({} if template is None else {"chat_template": template})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Pretrained(str(folder / "tokenizer.json"))


def save(folder, composition, tokenizer, trained=None, **changes):
    """Write the run of a random but sharp model.

    Args:
        folder: of the run
        composition: of the model, with changes
        tokenizer: in its checkpoint
        trained: the format of its conversations; None for a training on text
    """
    decoder = compose(
        composition(vocab_size=264, max_positions=512, init={"std": 0.3, "depth_scaled": False}, **changes), seed=3
    )
    parts = {
        "state_dict": {f"decoder.{k}": v for k, v in decoder.state_dict().items()},
        "hyper_parameters": {"model": decoder.config},
        "configuration": {"data": {"name": "text"} if trained is None else {"name": "chat", "chat": trained}},
        "global_step": 1200,
    }
    if tokenizer is not None:
        parts["ChatDataModule"] = {"tokenizer": tokenizer.to_json()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(parts, folder / "checkpoints" / "last.ckpt")
    return folder
