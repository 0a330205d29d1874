"""Requests of unequal length on a CPU: one by one, in static batches, in a running batch; ours and transformers'.

``python -m benchmarks.running_batch``. 24 requests arrive at once: prompts of 8 to 64 tokens, answers of exponential
length, greedily, 8 rows. Both models have the same shape, a Llama of width 256, in fp32. A turn takes all ways one
after the other, in an order that shifts; a time is CPU seconds of the process, whose load by others does not count.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, paired, spread
from benchmarks.record import Ratio, Result, Table

ROWS, ROOM, MEAN = 8, 160, 30
SHAPE = {"vocab_size": 512, "width": 256, "layers": 4, "heads": 8, "kv_heads": 2, "d_ff": 768}
OURS, THEIRS = ("one by one", "static", "running"), ("peer one by one", "peer static", "peer running")
RATIOS = (
    ("running", "static", 1.5),
    ("running", "one by one", 2.5),
    ("running", "peer running", 1.1),
    ("static", "peer static", 1.0),
    ("one by one", "peer one by one", None),
)
Request = tuple[list[int], int]  # a prompt, and the number of new tokens


def requests(n: int) -> list[Request]:
    """The same in every run."""
    draw = random.Random(0)
    lengths = [(draw.randint(8, 64), min(96, 1 + int(draw.expovariate(1 / MEAN)))) for _ in range(n)]
    return [([draw.randrange(SHAPE["vocab_size"]) for _ in range(prompt)], new) for prompt, new in lengths]


class Ways:
    """Job of the one contender: answer all requests in one way."""

    def __init__(self, n: int, device: str) -> None:
        self.requests, self.device = requests(n), device
        self.ours, self.peer = our_model(), peer_model()

    def about(self) -> dict[str, Any]:
        """Number of new tokens, and of parameters of both models."""
        sizes = [sum(p.numel() for p in model.parameters()) for model in (self.ours, self.peer)]
        return {"tokens": sum(new for _, new in self.requests), "parameters": sizes}

    def turn(self, first: int) -> dict[str, Any]:
        """CPU seconds of each way, and in how many requests its text differs from one by one."""
        import torch

        ways = {
            "one by one": lambda: static(self.ours, self.requests, 1),
            "static": lambda: static(self.ours, self.requests, ROWS),
            "running": lambda: running(self.ours, self.requests),
            "peer one by one": lambda: peer_static(self.peer, self.requests, 1),
            "peer static": lambda: peer_static(self.peer, self.requests, ROWS),
            "peer running": lambda: peer_running(self.peer, self.requests),
        }
        order = list(ways)[first % len(ways) :] + list(ways)[: first % len(ways)]
        seconds, texts = dict[str, float](), dict[str, list[list[int]]]()
        for way in order:
            with torch.inference_mode():
                start = time.process_time()
                texts[way] = ways[way]()
                seconds[way] = time.process_time() - start
        differing = {
            way: sum(a != b for a, b in zip(texts[way], texts[base], strict=True))
            for base, group in ((OURS[0], OURS), (THEIRS[0], THEIRS))
            for way in group
        }
        return {"seconds": seconds, "differing": differing}


def our_model() -> Any:
    from blockwright import compose

    gqa = {"name": "gqa", "n_heads": SHAPE["heads"], "n_kv_heads": SHAPE["kv_heads"]}
    config = {
        "vocab_size": SHAPE["vocab_size"],
        "d_model": SHAPE["width"],
        "n_layers": SHAPE["layers"],
        "max_positions": 4096,
        "tie_embeddings": True,
        "attention": gqa,
        "position": "rope",
        "ffn": {"name": "swiglu", "d_ff": SHAPE["d_ff"]},
        "norm": "rmsnorm",
        "residual": "prenorm",
    }
    return compose(config, seed=0).eval()


def static(decoder: Any, given: Sequence[Request], rows: int) -> list[list[int]]:
    """Batches that begin and end together."""
    from blockwright.blocks.generation.generate import Continuations
    from blockwright.blocks.generation.sample import Sampling

    texts = []
    for at in range(0, len(given), rows):
        some = given[at : at + rows]
        made = Continuations(decoder, [p for p, _ in some], max(n for _, n in some), Sampling(0.0))
        columns = zip(*made, strict=True)
        texts += [list(column)[:n] for column, (_, n) in zip(columns, some, strict=True)]
    return texts


def running(decoder: Any, given: Sequence[Request]) -> list[list[int]]:
    from blockwright.blocks.generation.batch import Batch
    from blockwright.blocks.generation.job import Job
    from blockwright.blocks.generation.sample import Sampling

    batch = Batch(decoder, ROWS, ROOM)
    jobs = [batch.add(Job(prompt, n, Sampling(0.0))) for prompt, n in given]
    while batch.busy:
        batch.step()
    return [job.tokens for job in jobs]


def peer_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["width"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["d_ff"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def greedily(n: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)


def peer_static(model: Any, given: Sequence[Request], rows: int) -> list[list[int]]:
    import torch

    texts = []
    for at in range(0, len(given), rows):
        some = given[at : at + rows]
        longest = max(len(prompt) for prompt, _ in some)
        padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in some])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in some])
        found = model.generate(padded, attention_mask=mask, generation_config=greedily(max(n for _, n in some)))
        texts += [row[longest : longest + n].tolist() for row, (_, n) in zip(found, some, strict=True)]
    return texts


def peer_running(model: Any, given: Sequence[Request]) -> list[list[int]]:
    """``ContinuousBatchingManager`` with as many rows, and pages for all that they may hold."""
    from transformers.generation import ContinuousBatchingConfig

    pages = ContinuousBatchingConfig(
        num_blocks=64, page_size=32, max_batch_tokens=128, max_requests_per_batch=ROWS, use_cuda_graph=False
    )
    manager = model.init_continuous_batching(generation_config=greedily(96), continuous_batching_config=pages)
    manager.start()
    names = [manager.add_request(prompt, max_new_tokens=n) for prompt, n in given]
    found: dict[str, list[int]] = {}
    while len(found) < len(names):
        if not manager.is_running():
            raise RuntimeError("transformers' manager has ended before its requests")
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            found[result.request_id] = result.generated_tokens
    manager.stop(block=True)
    return [found[name] for name in names]


def tabulate(rounds: Sequence[Mapping[str, Any]], tokens: int) -> tuple[Table, list[Ratio]]:
    """A row per way, and the promised ratios of their speeds."""
    table = Table("Tokens a CPU second", ("way", "tokens/s", "q1", "q3", "other texts"), plotted="tokens/s")
    speeds = {way: {r: tokens / found["seconds"][way] for r, found in enumerate(rounds)} for way in (*OURS, *THEIRS)}
    for way, found in speeds.items():
        of_way = spread(list(found.values()))
        table.rows.append([way, of_way.median, of_way.q1, of_way.q3, max(r["differing"][way] for r in rounds)])
    table.note = (
        f"{tokens} new tokens; at most {ROWS} rows. Other texts: requests whose text is not that of one by one, as "
        "nearly equal logits may fall the other way. The peer is transformers, an equal Llama of other random weights."
    )
    ratios = []
    for ours, theirs, bound in RATIOS:
        gain = paired(speeds[ours], speeds[theirs])
        assert gain is not None
        ratios.append(Ratio(f"{ours} ÷ {theirs}, speed", gain, bound=bound))
    return table, ratios


def main(arguments: Sequence[str] | None = None) -> Result:
    """Race all ways in one process."""
    parser = record.parser("running_batch", __doc__, rounds=5, minutes=8)
    parser.set_defaults(threads=1)
    given = record.read(parser, arguments)
    result = Result("running_batch", machine.about("cpu", given.threads))
    entry = Entry("ways", "benchmarks.running_batch:Ways", {"n": 4 if given.quick else 24})
    rounds: list[dict[str, Any]] = []
    started = time.monotonic()
    with Race([entry], "cpu", given.threads) as race:
        while len(rounds) < given.rounds and (len(rounds) < 1 or time.monotonic() - started < 60 * given.minutes):
            found = race.ask(entry, {"first": len(rounds)})
            if found is None:
                raise SystemExit(f"running_batch: {entry.failed}")
            rounds.append(found)
            print(f"round {len(rounds)}, {time.monotonic() - started:.0f} s", flush=True)
    table, ratios = tabulate(rounds, entry.about["tokens"])
    result.tables.append(table)
    result.ratios += ratios
    result.raw = {"rounds": rounds, "about": entry.about}
    print(result.save(given.out))
    return result


if __name__ == "__main__":
    main()
