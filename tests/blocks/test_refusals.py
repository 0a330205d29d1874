"""Models that cannot be: each is refused at its path, with the rule and a remedy, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml

from blockwright import registry
from blockwright.blocks.compose import check
from blockwright.registry import ConfigError

# Rows of: path below model (none: at model itself) | change of a small model, as YAML | word of the remedy or the rule.
REFUSED = {
    "sizes": """
d_modell              | d_modell: 3 | 'd_model'
d_model               | d_model: "48" | model.d_model=
d_model               | d_model: 48.0
d_model               | d_model: true
d_model               | d_model: null
d_model               | d_model: ???
d_model               | d_model: 0 | =1
vocab_size            | vocab_size: 0
vocab_size            | vocab_size: null
vocab_size            | vocab_size: 1000000000000000000000000000000 | smaller
vocab_size            | {vocab_size: 1000000000000, d_model: 48000000000} | smaller
attention             | d_model: 480000000000 | Lower its widths
n_layers              | n_layers: 0
n_layers              | n_layers: null
n_layers              | n_layers: 1000000000
max_positions         | max_positions: 0
max_positions         | max_positions: 1000000000000000000 | smaller
                      | {max_positions: 10000000000000, position: learned} | Lower its widths
tie_embeddings        | tie_embeddings: "yes"
tie_embeddings        | tie_embeddings: 1
init                  | init: null | std
init.sd               | init: {sd: 0.1} | 'std'
init.std              | init: {std: small} | 0.006
init.std              | init: {std: -0.1}
init.std              | init: {std: .nan}
init.std              | init: {std: .inf}
init.depth_scaled     | init: {depth_scaled: 1}
mtp.depht             | mtp: {depht: 1}
mtp.depth             | mtp: {depth: -1}
mtp.depth             | mtp: {depth: 1.5}
mtp.loss_weight       | mtp: {loss_weight: -0.1}
mtp.loss_weight       | mtp: {loss_weight: much}
""",
    "nodes": """
attentoin             | attentoin: gqa | 'attention'
attention             | attention: null | +model/attention=
ffn                   | ffn: null | +model/ffn=
norm                  | norm: null
residual              | residual: null
position              | position: null
attention.name        | attention: gqqa | 'gqa'
attention.name        | attention: {name: swiglu} | gqa, grouped_tied
attention.name        | attention: {name: null}
attention             | attention: {n_heads: 8} | gqa, grouped_tied
attention             | attention: [gqa]
attention             | attention: 5
attention.n_head      | attention: {name: gqa, n_head: 8} | 'n_heads'
attention.d_model     | attention: {name: gqa, d_model: 8} | n_heads
attention.n_heads     | attention: {name: gqa, n_heads: "8"} | int
attention.n_heads     | attention: {name: gqa, n_heads: 8.0}
attention.bias        | attention: {name: gqa, bias: "no"} | bool
attention.bias        | attention: {name: gqa, bias: 0}
attention.position    | attention: {name: gqa, position: 7} | rope
attention.position.thetta | attention: {name: gqa, position: {thetta: 1}} | 'theta'
residual.ffn_norm.epss | residual: {name: prenorm, ffn_norm: {epss: 1}} | 'eps'
qk_norm               | {attention: mla, qk_norm: per_head} | |gqa|
qk_norm (layer 1)     | overrides: [{layers: 1, attention: mla, qk_norm: full}] | |gqa|
scores                | {attention: mla, scores: {name: softcap, cap: 3.0}} | model.scores=null
scores                | {attention: {name: gqa, scores: sinks}, scores: softcap} | |gqa|
dropping              | dropping: device_budget | ffn moe
balance               | balance: expert | gating
entry                 | entry: add
convolution           | convolution: canon
layout                | layout: ffn | leave out model.layout
layout.ffnn           | layout: {ffnn: ffn} | 'ffn'
layout.ffn            | layout: {ffn: ffn swoglu} | 'swiglu'
layout.loop           | layout: {loop: cycle*4}
variants.ffn.wide.dff | variants: {ffn: {wide: {name: swiglu, dff: 3}}} | 'd_ff'
variants.ffn.wide.dff | variants: {ffn: {wide: {dff: 3}}} | 'd_ff'
variants.ffn.wide.name | variants: {ffn: {wide: swoglu}} | 'swiglu'
variants.attention.full.window | {variants: {attention: {full: {window: null}}}, \
    layout: {attention: attention full}} | model.variants.attention=null
overrides             | overrides: {layers: 0} | leave out model.overrides
overrides.0.layers    | overrides: [{layers: 5, ffn: gelu}] | 0 to 1
ffn (layer 1).dff     | overrides: [{layers: 1, ffn: {dff: 3}}] | 'd_ff'
position (layer 1)    | overrides: [{layers: 1, position: learned}] | model.position
position (layer 1)    | layout: {position: position sinusoidal} | model.position
attention.position    | attention: {name: gqa, position: learned} | model.position
attention (layer 1).position | overrides: [{layers: 1, attention: {position: {name: sinusoidal}}}] | model.position
""",
    "attention": """
attention.n_heads     | attention: {name: gqa, n_heads: 7} | nearest number that does is 6
attention.n_kv_heads  | attention: {name: gqa, n_heads: 8, n_kv_heads: 3}
attention.n_kv_heads  | attention: {name: gqa, n_kv_heads: 0}
attention.n_heads     | attention: {name: gqa, n_heads: 0, head_dim: 6}
attention.head_dim    | attention: {name: gqa, head_dim: 0}
attention.n_heads     | attention: {name: mha, n_heads: 0}
attention.head_dim    | attention: {name: mqa, head_dim: 0}
attention.n_heads     | attention: {name: mla, n_heads: 5}
attention.n_heads     | attention: {name: mla, n_heads: 0, kv_lora_rank: 4, qk_nope_head_dim: 4, \
    qk_rope_head_dim: 4, v_head_dim: 4}
attention.kv_lora_rank | attention: {name: mla, n_heads: 4, kv_lora_rank: 0}
attention.q_lora_rank | attention: {name: mla, n_heads: 4, q_lora_rank: 0}
attention.qk_nope_head_dim | attention: {name: mla, n_heads: 4, qk_nope_head_dim: 0}
attention.qk_rope_head_dim | attention: {name: mla, n_heads: 4, qk_rope_head_dim: 0}
attention.v_head_dim  | attention: {name: mla, n_heads: 4, v_head_dim: 0}
position.rotary_fraction | attention: {name: mla, n_heads: 4, qk_rope_head_dim: 5} | even
attention.n_groups    | attention: {name: shared_kv, n_heads: 4, n_groups: 3}
attention.rope_head_dim | attention: {name: shared_kv, n_heads: 4, rope_head_dim: 14}
attention.compressor.head_dim | attention: {name: shared_kv, n_heads: 4, compressor: {name: csa, every: 3, \
    n_heads: 2, head_dim: 4, top_k: 2}}
attention.compressor.every | attention: {name: shared_kv, n_heads: 4, compressor: {name: hca, every: 1}}
attention.scores      | attention: {name: shared_kv, n_heads: 4, compressor: {name: hca}, scores: dcmha} | means of many
attention.n_key_heads | attention: {name: gated_delta_2, n_key_heads: 2}
attention.n_heads     | attention: {name: gated_delta_2, n_heads: 5} | divide d_model
attention.n_heads     | attention: {name: rwkv7, n_heads: 7} | divide d_model
attention.gate_rank   | attention: {name: rwkv7, gate_rank: 0}
attention.n_groups    | attention: {name: mamba3, n_heads: 6, n_groups: 4} | divide n_heads
attention.rotated     | attention: {name: mamba3, state_dim: 3, rotated: 0.5} | at least one pair
attention.rotated     | attention: {name: mamba3, rotated: 1.5}
attention.rank        | attention: {name: mamba3, rank: 0}
attention.least_step  | attention: {name: mamba3, least_step: 0.2} | most_step
attention.decay.least_step | attention: {name: gated_delta, decay: {name: head, least_step: 0.2}} | most_step
attention.taps        | attention: {name: kda, taps: 100000000}
attention.readout     | attention: {name: mha, n_heads: 4, readout: difference}
attention.readout     | attention: {name: gqa, n_heads: 6, n_kv_heads: 2, readout: difference}
attention.readout     | attention: {name: mla, n_heads: 4, readout: difference}
attention.readout.name | attention: {name: gqa, readout: exclusiv}
attention.readout.strength | attention: {name: gqa, readout: {name: exclusive, strength: 2}}
attention.readout     | attention: {name: gated_delta, readout: exclusive}
attention.name        | attention: exclusive
scores.cap            | scores: {name: softcap, cap: 0.0}
scores.rank           | scores: {name: dcmha, rank: 0}
scores.width          | scores: {name: dcmha, width: 0}
attention.selector    | attention: {name: gqa, selector: {name: dsa}, scores: sinks} | plain softmax
""",
    "positions": """
position.theta        | position: {name: rope, theta: 0}
position.theta        | position: {name: rope, theta: .nan}
position.rotary_fraction | position: {name: rope, rotary_fraction: 0.0}
position.rotary_fraction | position: {name: rope, rotary_fraction: 1.1}
position.pairing      | position: {name: rope, pairing: half} | Literal
position.theta        | position: {name: none, theta: 1} | no parameters
position.factor       | position: {name: yarn, factor: 0.5}
position.factor       | position: {name: yarn, factor: .nan}
position.theta        | position: {name: yarn, theta: 1.0}
position.original_positions | position: {name: yarn, original_positions: 0}
position.beta_slow    | position: {name: yarn, beta_slow: 0.0}
position.long_factors | position: {name: longrope, long_factors: [1.0, 2.0]}
position.short_factors | {attention: {name: gqa, n_heads: 4}, position: {name: longrope, short_factors: [0, 1, \
    1, 1, 1, 1]}}
position.original_positions | position: {name: longrope, original_positions: 1}
position.theta        | position: {name: sinusoidal, theta: 0.0}
position.high_freq_factor | position: {name: rope_llama3, high_freq_factor: 1.0}
position.original_positions | position: {name: rope_llama3, original_positions: 0}
position.rotary_fraction | {attention: {name: gqa, n_heads: 4}, position: {name: rope_ntk, rotary_fraction: 0.2}}
position.rotary_fraction | attention: {name: gqa, n_heads: 4, head_dim: 7} | even
position              | {d_model: 49, attention: {name: gqa, n_heads: 4, head_dim: 8}, position: sinusoidal} | even
position.rank         | position: {name: banded, rank: 0}
position.extent       | position: {name: banded, extent: 0}
position.floor        | position: {name: log_scaled, floor: 0}
position.scale        | position: {name: log_scaled, scale: -0.1}
""",
    "convolutions": """
attention.key_conv.taps | attention: {name: gqa, n_heads: 4, key_conv: {name: canon, taps: 1}}
attention.key_conv.taps | attention: {name: gqa, key_conv: {name: canon, taps: 100000000}}
attention.key_conv.name | attention: {name: gqa, n_heads: 4, key_conv: rmsnorm}
ffn.up_conv.spread    | ffn: {name: swiglu, up_conv: {name: canon, spread: -1}}
ffn.up_conv.name      | ffn: {name: gelu, up_conv: cannon}
ffn.gate_conv         | ffn: {name: gelu, gate_conv: canon}
""",
    "residuals": """
residual.residual     | residual: {name: convolved, residual: null}
residual.residual     | residual: {name: convolved, residual: convolved} | Name another residual
residual.residual     | residual: {name: convolved, residual: {name: convolved, residual: prenorm}} | \
    Name another residual
residual.mixing       | residual: {name: mhc, n_streams: 7} | sinkhorn
variants.residual.plain | {residual: mhc, variants: {residual: {plain: {name: prenorm}}}, \
    layout: {residual: residual plain*}}
residual.capacity     | residual: {name: mixture_of_depths, capacity: 0}
residual.capacity     | residual: {name: mixture_of_depths, capacity: 1.5}
residual.predictor_loss | residual: {name: mixture_of_depths, predictor_loss: -1}
residual.capacity     | residual: {name: sigmoid_skip, capacity: 0.5}
ffn                   | {residual: mixture_of_depths, ffn: {name: swiglu, gate_conv: canon}} | Canon
ffn                   | {residual: mixture_of_depths, ffn: {name: shortcut, later: swiglu}} | Shortcut
ffn                   | {residual: mixture_of_depths, ffn: {name: scaled, ffn: {name: shortcut, \
    later: swiglu}}} | Shortcut
residual.ffn_conv     | residual: {name: convolved, residual: mixture_of_depths, ffn_conv: canon}
residual.ffn_out_conv | residual: {name: convolved, residual: mixture_of_depths, ffn_out_conv: silu}
variants.ffn.plain    | {ffn: {name: shortcut, later: swiglu}, variants: {ffn: {plain: {name: swiglu}}}, \
    layout: {ffn: ffn plain}}
variants.ffn.plain    | {n_layers: 3, ffn: {name: shortcut, later: swiglu}, variants: {ffn: {plain: {name: swiglu}}}, \
    layout: {ffn: ffn plain*}}
""",
    "over depth": """
kv_source (layer 0)   | {kv_source: lent, layout: {kv_source: borrowed lent}} | no layer below layer 0
kv_source (layer 1)   | {attention: {name: sliding_window, window: 5}, kv_source: lent, \
    variants: {attention: {full: {window: null}}}, layout: {kv_source: lent borrowed, \
    attention: attention full}} | lend window 5
kv_source (layer 1)   | {kv_source: lent, variants: {attention: {other: {n_kv_heads: 1}}}, \
    layout: {kv_source: lent borrowed, attention: attention other}} | k 1×6
kv_source (layer 1)   | {kv_source: lent, layout: {kv_source: lent borrowed}, overrides: [{layers: 1, \
    position: {theta: 500.0}}]} | other angles
kv_source (layer 1)   | {kv_source: lent, layout: {kv_source: lent borrowed}, position: {name: log_scaled, \
    inner: rope}, overrides: [{layers: 1, position: {inner: {theta: 500.0}}}]} | other angles
attention.values      | {kv_source: lent, layout: {kv_source: lent borrowed}, values: value_residual} | it borrows them
mtp.depth             | {kv_source: lent, layout: {kv_source: lent borrowed}, mtp: {depth: 1}} | begins with none
kv_source             | {attention: differential, kv_source: lent, layout: {kv_source: lent borrowed}}
attention             | {attention: {name: gqa, selector: {name: shared, of: dsa}}, \
    variants: {attention: {state: {name: kda}}}, layout: {attention: state attention}} | none below layer 1
loop.last             | loop: {name: cycle, last: 4}
loop.last             | loop: {name: cycle, first: 1, last: 0}
loop.first            | loop: {name: cycle, first: -5}
loop.visits           | loop: {name: cycle, visits: 0}
loop.visits           | loop: {name: cycle, visits: 1025}
loop.visit            | loop: {name: cycle, visit: 3}
loop.exit             | {n_layers: 3, loop: {name: cycle, first: 1, last: 1, visits: 3, exit: gate}}
loop.exit             | loop: {name: repeat, visits: 3, entry: normed, exit: gate}
loop.gradient_visits  | loop: {name: cycle, first: 1, last: 1, visits: 3, gradient_visits: 1}
loop.visit_draw.least | loop: {name: cycle, visits: 3, visit_draw: {name: uniform, least: 4}}
loop.visit_draw.mean  | loop: {name: cycle, visit_draw: {name: poisson_lognormal, mean: 1.0e+300}}
loop.visit_draw.sigma | loop: {name: cycle, visit_draw: {name: poisson_lognormal, sigma: 1.0e+160}}
loop.visit_draw.most  | loop: {name: cycle, visit_draw: {name: uniform, most: 1000000000000}}
loop.entry            | {loop: {name: cycle, visits: 3, entry: add}, residual: mhc}
memory.width          | memory: {name: engram, rows: 31, n_heads: 2, width: 13, end: 5}
memory.end            | memory: {name: engram, rows: 31, end: 61}
memory.ngram          | memory: {name: engram, rows: 31, ngram: 1}
memory.rows           | memory: {name: engram, rows: 1}
memory.rows           | memory: {name: engram}
memory.ordinal        | memory: {name: engram, rows: 37, ordinal: 1000000000000}
memory.taps           | memory: {name: engram, rows: 37, taps: 100000000}
memory.width          | memory: {name: per_layer_embedding, width: 0}
memory.name           | memory: engrams
memory                | {memory: {name: engram, rows: 31}, residual: attention_residual}
layout.memory         | {memory: {name: engram, rows: 31}, layout: {memory: engram*2 none}}
""",
    "mixtures": """
gating                | {ffn: moe, gating: null, layout: null, variants: null} | +model/gating=
experts               | {ffn: moe, experts: null, layout: null, variants: null} | +model/experts=
experts.d_ff          | experts: swiglu | model.experts.d_ff=<int ≥ 1>
gating.topk           | {layout: {ffn: dense*2}, gating: {name: softmax_topk, topk: 2}} | 'top_k'
ffn.n_experts         | ffn: {name: moe, n_experts: 0}
ffn.shared            | ffn: {name: moe, shared: {name: moe}} | itself
ffn.now               | ffn: {name: shortcut, now: {name: moe, n_experts: 5}} | dense
gating.balance.1.alfa | gating: {name: softmax_topk, balance: [expert, {name: z_loss, alfa: 1.0}]} | 'alpha'
gating.n_shared       | gating: {name: sigmoid_sink, top_k: 2, n_shared: 2}
ffn.dropping.n_devices | ffn: {name: moe, dropping: {name: device_budget, n_devices: 3}}
ffn.dropping.n_devices | ffn: {name: moe, dropping: {name: device_budget, n_devices: 0}}
ffn.dropping.capacity | ffn: {name: moe, dropping: {name: device_budget, n_devices: 4, capacity: 0.0}}
ffn.dropping.exempt   | ffn: {name: moe, dropping: {name: device_budget, n_devices: 4, exempt: 1.5}}
ffn.dropping.exempt   | ffn: {name: moe, dropping: {name: device_budget, n_devices: 4, exempt: -0.1}}
""",
}


def rows() -> list[tuple[str, str, dict[str, Any], str]]:
    found = []
    for family, text in REFUSED.items():
        for line in text.strip().splitlines():
            path, change, *word = (part.strip() for part in line.split(" | "))
            found.append((family, path, yaml.safe_load(change), word[0] if word else ""))
    gates = {name: {"name": name, "top_k": 3} for name in registry.names("gating")}
    for node in gates.values():
        found += [("mixtures", "gating.top_k", {"gating": {**node, "top_k": k}}, "") for k in (0, 7)]
    for node in (gates["group_limited"], gates["sigmoid_bias"]):
        wrong = [("n_groups", {"n_groups": g}) for g in (0, 4, 12)]
        wrong += [("top_groups", {"n_groups": 3, "top_groups": g}) for g in (0, 4)]
        wrong += [("top_k", {"n_groups": 3, "top_groups": 1})]
        found += [("mixtures", f"gating.{name}", {"gating": {**node, **change}}, "") for name, change in wrong]
    for name in ("device", "communication"):
        loss = {"name": "softmax_topk", "balance": {"name": name}}
        for n in (0, 4, 12):
            changed = {"gating": {**loss, "balance": {"name": name, "n_devices": n}}}
            found.append(("mixtures", "gating.balance.n_devices", changed, ""))
    for kind in ("experts", "ffn"):
        for name in registry.names(kind):
            if "d_ff" in registry.lookup(kind, name).schema.parameters:
                family = "mixtures" if kind == "experts" else "nodes"
                found += [(family, f"{kind}.d_ff", {kind: {"name": name, "d_ff": 0}}, "")]
    for name in ("rope_linear", "rope_ntk", "rope_llama3"):
        for key, value in (("factor", 0.5), ("factor", -1.0), ("theta", 0.0)):
            found.append(("positions", f"position.{key}", {"position": {"name": name, key: value}}, ""))
    return found


@pytest.mark.parametrize("family", REFUSED)
def test_what_no_model_can_be_is_refused_at_its_path_with_a_remedy(tiny: Callable[..., Any], family: str) -> None:
    wrong = []
    for of, path, change, word in rows():
        if of != family:
            continue
        try:
            check({**tiny(moe=family == "mixtures"), **change})
            wrong.append((change, "is accepted"))
        except ConfigError as refusal:
            at = f"model.{path}".rstrip(".")
            if refusal.path != at or not refusal.rule or word not in f"{refusal.rule} {refusal.remedy}":
                wrong.append((change, f"at {refusal.path}, not at {at}: {refusal.rule}. {refusal.remedy}"))
            elif not refusal.remedy or not _is_value(change, path, refusal.value):
                wrong.append((change, f"tells {refusal.value!r}, and the remedy {refusal.remedy!r}"))
    assert not wrong, "\n".join(map(str, wrong))


def _is_value(change: Any, path: str, told: Any) -> bool:
    """Whether a refusal tells the number that is written at its path."""
    for key in path.split("."):
        change = change.get(key) if isinstance(change, Mapping) else None
    return not isinstance(change, int | float) or isinstance(told, str) or told == change or change != change
