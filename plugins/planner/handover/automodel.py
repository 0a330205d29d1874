"""NeMo AutoModel: the YAML file of its recipe for next-token prediction, as ``automodel FILE`` takes it.

Keys are those of NeMo AutoModel 0.7.
"""

from __future__ import annotations

import math
from typing import Any

from blockwright.plugins.planner.handover.training import MISSING, Engine, Takes, Training

LLM = "nemo_automodel.NeMoAutoModelForCausalLM"
ALWAYS = {
    "shard": (True,),  # FSDP2
    "context": (1,),  # needs attention of Transformer Engine, which is to be chosen by hand
    "recompute": ("none", "full"),  # its selective recomputing keeps other results
}
DENSE = Takes({**ALWAYS, "expert": (1,)})
ROUTED = Takes({**ALWAYS, "tensor": (1,)})
NATIVE_DENSE = ("llama", "qwen2", "qwen3")
NATIVE_ROUTED = ("qwen3_moe", "gpt_oss", "deepseek_v3")
# By transformers' own model; the experts of a mixture are not distributed.
OTHERS = ("mistral", "mixtral", "olmo2", "gemma2")
FAMILIES = {**dict.fromkeys((*NATIVE_DENSE, *OTHERS), DENSE), **dict.fromkeys(NATIVE_ROUTED, ROUTED)}


def recipe(training: Training, model_type: str) -> dict[str, Any]:
    """The values."""
    job, layout, optimizer = training.job, training.layout, training.optimizer
    data = layout.data(job)
    # A pipeline takes all its micro-batches at once, and accumulates nothing outside.
    local = job.batch // data if layout.pipeline > 1 else layout.micro_batch
    return {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": training.seed,
        "step_scheduler": {
            "global_batch_size": job.batch,
            "local_batch_size": local,
            "max_steps": training.steps,
            "num_epochs": 1,
            "ckpt_every_steps": 1000,
        },
        "dist_env": {"backend": "nccl", "timeout_minutes": 30},
        "model": _model(training),
        "distributed": _distributed(training, model_type),
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.megatron_dataset.MegatronPretraining",
            "paths": MISSING,
            "seq_length": job.length,
            "split": "0.99, 0.01, 0.00",
            "splits_to_build": "train",
            "tokenizer": {
                "_target_": "nemo_automodel._transformers.auto_tokenizer.NeMoAutoTokenizer.from_pretrained",
                "pretrained_model_name_or_path": training.tokenizer,
            },
        },
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "torch.utils.data.default_collate",
            "dataloader_type": "single",
        },
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": optimizer.lr,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "lr_scheduler": _rates(training),
        "clip_grad_norm": {"max_norm": training.clip},
        "checkpoint": {"enabled": True, "checkpoint_dir": "checkpoints/"},
    }


def _model(training: Training) -> dict[str, Any]:
    """fp32 weights for the optimizer; FSDP2 gathers them in bf16, as its default policy says."""
    folder = str(training.folder)
    if training.has_weights:
        source: dict[str, Any] = {"_target_": f"{LLM}.from_pretrained", "pretrained_model_name_or_path": folder}
    else:
        config = {"_target_": "transformers.AutoConfig.from_pretrained", "pretrained_model_name_or_path": folder}
        source = {"_target_": f"{LLM}.from_config", "config": config}
    return {**source, "torch_dtype": "float32"}


def _distributed(training: Training, model_type: str) -> dict[str, Any]:
    layout = training.layout
    sizes = {"tp_size": layout.tensor, "cp_size": layout.context, "pp_size": layout.pipeline}
    found: dict[str, Any] = {
        "strategy": "fsdp2",
        **sizes,
        "ep_size": layout.expert,
        "activation_checkpointing": layout.recompute == "full",
    }
    if layout.pipeline > 1:
        found["pipeline"] = _pipeline(training, own=model_type not in OTHERS)
    if layout.expert > 1:
        found["moe"] = {"reshard_after_forward": False, "wrap_outer_model": layout.pipeline == 1}
    return found


def _pipeline(training: Training, own: bool) -> dict[str, Any]:
    """``layers_per_stage`` sets the number of stages, which are then filled evenly."""
    layout = training.layout
    stages = layout.pipeline * layout.interleave
    return {
        "pp_schedule": "interleaved1f1b" if layout.interleave > 1 else "1f1b",
        "pp_microbatch_size": layout.micro_batch,
        "layers_per_stage": math.ceil(training.n_layers / stages),
        "round_virtual_stages_to_pp_multiple": "up",
        "scale_grads_in_schedule": False,
        # transformers' forward passes expect whole models; AutoModel's own ones take parts.
        "patch_inner_model": not own,
        "patch_causal_lm_model": not own,
    }


def _rates(training: Training) -> dict[str, Any]:
    rates, peak = training.rates, training.optimizer.lr
    decay = {} if rates.decay is None else {"wsd_decay_steps": rates.decay, "lr_wsd_decay_style": rates.shape}
    return {
        "lr_decay_style": rates.style,
        "lr_warmup_steps": rates.warmup,
        "lr_decay_steps": training.steps,
        "init_lr": 0.0,
        "min_lr": peak * rates.floor,
        **decay,
    }


AUTOMODEL = Engine("NeMo AutoModel", "automodel.yaml", FAMILIES, recipe)
