"""Megatron Bridge: values of its ``ConfigContainer``, to be laid over a recipe by ``process_config_with_overrides``.

Keys are those of Megatron Bridge and Megatron-LM of August 2026. The model itself is not among them: the recipe's is
made from config.json by ``AutoBridge.from_hf_pretrained(DIR).to_megatron_provider(load_weights=False)``.
"""

from __future__ import annotations

from typing import Any

from blockwright.plugins.planner.handover.training import MISSING, Engine, Takes, Training

# ZeRO-1, its distributed optimizer; its FSDP has settings of its own.
ALL = Takes({"shard": (False,)})
FAMILIES = dict.fromkeys(
    (
        *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "olmoe", "gpt_oss", "gemma2"),
        *("deepseek_v2", "deepseek_v3"),
    ),
    ALL,
)
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {"recompute_granularity": None},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def container(training: Training, model_type: str) -> dict[str, Any]:
    """The values."""
    job, optimizer, rates = training.job, training.optimizer, training.rates
    weights = {"pretrained_checkpoint": str(training.folder)} if training.has_weights else {}
    return {
        "model": _model(training),
        "train": {
            "train_iters": training.steps,
            "global_batch_size": job.batch,
            "micro_batch_size": training.layout.micro_batch,
        },
        "optimizer": {
            "optimizer": "adam",
            "lr": optimizer.lr,
            "min_lr": optimizer.lr * rates.floor,
            "weight_decay": optimizer.weight_decay,
            "adam_beta1": optimizer.betas[0],
            "adam_beta2": optimizer.betas[1],
            "adam_eps": optimizer.eps,
            "clip_grad": training.clip,
            "use_distributed_optimizer": True,
        },
        "scheduler": {
            "lr_decay_style": rates.style,
            "lr_warmup_iters": rates.warmup,
            "lr_decay_iters": training.steps,
            **({} if rates.decay is None else {"lr_wsd_decay_iters": rates.decay, "lr_wsd_decay_style": rates.shape}),
            # The scheduler sets the weight decay at each step: without these to a value of the recipe's.
            "start_weight_decay": optimizer.weight_decay,
            "end_weight_decay": optimizer.weight_decay,
            "weight_decay_incr_style": "constant",
        },
        "ddp": {"use_distributed_optimizer": True},
        "dataset": {"seq_length": job.length, "data_path": MISSING},
        "tokenizer": {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": training.tokenizer},
        "checkpoint": weights,
        "rng": {"seed": training.seed},
        "mixed_precision": "bf16_mixed",
    }


def _model(training: Training) -> dict[str, Any]:
    layout = training.layout
    uneven = {"pipeline_model_parallel_layout": stages(training)} if layout.pipeline > 1 else {}
    return {
        "seq_length": training.job.length,
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.tensor > 1,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.interleave if layout.interleave > 1 else None,
        **uneven,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        # Experts are whole: ``expert`` of the planner counts the ranks of a tensor group too.
        "expert_tensor_parallel_size": 1 if layout.expert > 1 else None,
        **RECOMPUTE[str(layout.recompute)],
    }


def stages(training: Training) -> str:
    """Layers of each stage of the pipeline in Megatron's letters: E embedding, t layer, m prediction, L loss.

    Written out, since Megatron refuses layers that the stages do not divide. The last stages, which have the head, have
    fewer.
    """
    n = training.layout.pipeline * training.layout.interleave
    each, more = divmod(training.n_layers, n)
    found = ["t" * (each + (stage < more)) for stage in range(n)]
    found[0] = "E" + found[0]
    found[-1] += "m" * training.n_predicted + "L"
    return "|".join(found)


MEGATRON_BRIDGE = Engine("Megatron Bridge", "megatron_bridge.yaml", FAMILIES, container)
