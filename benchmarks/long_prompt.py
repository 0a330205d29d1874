"""A prompt of 128K tokens: memory of its prefill, perplexity through 6-bit caches, and decoding behind it.

``python -m benchmarks.long_prompt``, of latent attention and DeepSeekMoE in the sizes `small`. The model is first
trained for some minutes on Shakespeare's bytes, in windows whose positions skip ahead (PoSE), so that it has met
every distance. Held-out plays are then read in chunks, in a process for each kind of cache, side by side, and the last
tokens scored, all of them through the cache. Decoding is compared with transformers' on equal weights and equal
caches, of random values, in one process, a step of each in turn; the logits of both must agree.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.shapes import SHAPES, Shape, composition
from benchmarks.worker import peak_memory, reset_peak

TOKENS, SCORED = 131072, 1024
ROWS, WINDOW = 2, 512  # of a training step
ROOM = 512e6  # bytes above weights and cache
WORSE = 0.005  # of perplexity, with 6 bits instead of exact numbers
FASTER = 8.0  # than transformers, a token
EQUAL = 1e-4  # difference of logits, relative to the largest: sums over 128K keys in another order


class Train:
    """Job: train the sizes on Shakespeare's bytes, and write the weights."""

    def __init__(self, shape: str, device: str) -> None:
        self.shape, self.device = SHAPES[shape], device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, weights: str, steps: int, target: int) -> dict[str, Any]:
        """Mean loss of the last twentieth of the steps, nats a byte."""
        import torch

        decoder, text, losses = _decoder(self.shape, "bf16", None), _bytes("train"), []
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, betas=(0.9, 0.95), fused=True)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 20, 1.02 - step / steps)
            tokens, targets, positions = _windows(text, ROWS, target, step)
            loss = decoder.nll(decoder.hidden(tokens, positions)[0], targets) / targets.numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        torch.save(decoder.state_dict(), weights)
        late = losses[-max(1, steps // 20) :]
        return {"loss": sum(late) / len(late)}


class Prefill:
    """Job: read a prompt into one kind of cache."""

    def __init__(self, shape: str, weights: str, bits: int | None, device: str) -> None:
        self.decoder, self.bits = _decoder(SHAPES[shape], "bf16", weights).eval(), bits

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, tokens: int, scored: int) -> dict[str, Any]:
        """Read so many tokens, the last ones scored: bytes of the cache, the peak above weights, nats a byte."""
        import torch

        from blockwright.blocks.generation.generate import prefill

        text = _bytes("test")[None, : tokens + 1].long()
        with torch.inference_mode():
            reset_peak()
            before, start = peak_memory(), time.perf_counter()
            caches = self.decoder.new_caches(1, tokens, self.bits)
            prefill(self.decoder, text[:, : tokens - scored], caches)
            hidden, _ = self.decoder.hidden(text[:, tokens - scored : tokens], caches=caches)
            loss = float(self.decoder.nll(hidden, text[:, tokens - scored + 1 :])) / scored
        found = {"peak": peak_memory() - before, "cache": sum(cache.nbytes for cache in caches)}
        return {**found, "seconds": time.perf_counter() - start, "loss": loss}


class Decode:
    """Job: steps of ours and transformers' on the same cache."""

    def __init__(self, shape: str, device: str) -> None:
        from benchmarks.models.blockwright import Ours
        from benchmarks.models.hugging_face import HuggingFace
        from benchmarks.peers import as_transformers
        from benchmarks.race import Contender

        self.shape = SHAPES[shape]
        self.ours = Ours(self.shape, Contender("ours", "mla_moe", "MLA + DeepSeekMoE", True))
        self.theirs = HuggingFace(self.shape, Contender("transformers", "mla_moe", "DeepSeek-V3", True))
        self.theirs.module = as_transformers(self.ours.decoder.eval(), "mla_moe", "fp32")
        self.theirs.choose("batched_mm")  # the fastest for one token

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, tokens: int, steps: int) -> dict[str, Any]:
        """Seconds of each step of both, and the largest difference of their logits, relative to the largest."""
        import torch

        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        differences = []
        with torch.inference_mode():
            self._fill(tokens, steps)
            for step in range(steps):
                token, logits = torch.tensor([[step]]), {}
                for name in seconds:
                    start = time.perf_counter()
                    logits[name] = getattr(self, name).step(token)
                    seconds[name].append(time.perf_counter() - start)
                difference = (logits["ours"] - logits["theirs"]).abs().max() / logits["theirs"].abs().max()
                differences.append(float(difference))
        return {**seconds, "difference": max(differences)}

    def _fill(self, tokens: int, steps: int) -> None:
        """The same random latents and rotated keys in both caches; transformers keeps a pair's halves apart."""
        import torch

        self.ours.begin(1, tokens + steps)
        self.theirs.begin(1, tokens + steps)
        C, R = self.shape.latent, self.shape.rope
        order = [*range(0, R, 2), *range(1, R, 2)]
        for i, cache in enumerate(self.ours.caches):
            new = torch.randn(1, tokens, C + R)
            cache.append(new)
            latent, rotated = new[:, None].split((C, R), -1)
            self.theirs.cache.update(latent, rotated[..., order], i)


def _decoder(shape: Shape, dtype: str, weights: str | None) -> Any:
    import torch

    from benchmarks.models.base import DTYPES
    from blockwright.blocks.compose import compose

    decoder = compose(composition(shape, "mla_moe")).to(DTYPES[dtype])
    if weights is not None:
        decoder.load_state_dict(torch.load(weights, weights_only=True, mmap=True))
    return decoder


def _bytes(split: str) -> Any:
    """Plays as bytes: those to train on, or the four that are held out, one after the other."""
    import numpy as np
    import torch

    from blockwright.training.data.corpora import Shakespeare
    from blockwright.training.data.corpus import Split

    of: tuple[Split, ...] = ("train",) if split == "train" else ("val", "test")
    text = "".join(play for part in of for play in Shakespeare().documents(part))
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def _windows(text: Any, rows: int, target: int, step: int) -> tuple[Any, Any, Any]:
    """Tokens, targets and positions of random windows, [rows,WINDOW] each."""
    import numpy as np
    import torch

    from blockwright.plugins.long_context.windows import PoSE

    random, skip = np.random.RandomState(step), PoSE(target)
    starts = torch.from_numpy(random.randint(0, len(text) - WINDOW - 1, rows))
    window = text[starts[:, None] + torch.arange(WINDOW + 1)].long()
    positions = np.tile(np.arange(WINDOW), (rows, 1))
    for row in positions:
        skip({"positions": row}, random)
    return window[:, :-1], window[:, 1:], torch.from_numpy(positions)


def main(arguments: Sequence[str] | None = None) -> Result:
    """Train, read and decode; save three tables."""
    parser = record.parser("long_prompt", __doc__, rounds=5, minutes=60)
    parser.add_argument("--shape", default="small", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="of training (default: %(default)s)")
    parser.add_argument("--weights", type=Path, help="file of the trained weights; made if it is missing")
    given = record.read(parser, arguments)
    name, scored = ("smoke", 32) if given.quick else (given.shape, SCORED)
    if given.quick:
        given.tokens, given.steps, given.rounds = 600, 2, 2
    result = Result(f"long_prompt_{name}_{given.tokens}", machine.about("cpu", given.threads))
    if record.wanted("decode", given.only):
        _decoding(result, name, given)
    if record.wanted("prefill", given.only):
        with tempfile.TemporaryDirectory() as folder:
            weights = given.weights or Path(folder) / "weights.pt"
            if not weights.is_file():
                turn = {"weights": str(weights), "steps": given.steps, "target": max(given.tokens, WINDOW)}
                print(_ask("Train", given.threads, turn, shape=name), flush=True)
            _reading(result, name, str(weights), scored, given)
    print(result.save(given.out))
    return result


def _ask(job: str, threads: int, turn: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The answer of a job in a process of its own."""
    entry = Entry(job, f"benchmarks.long_prompt:{job}", arguments)
    with Race([entry], "cpu", threads) as race:
        answer = race.ask(entry, turn)
    if answer is None:
        raise SystemExit(f"{job}: {entry.failed}")
    return answer


def _reading(result: Result, name: str, weights: str, scored: int, given: Any) -> None:
    columns = ("cache", "cache, MB", "peak above weights, MB", "above the cache too, MB", "tokens/s", "nats a byte")
    note = f"Loss of the last {scored:,} of {given.tokens:,} tokens. Both run at a time, with half the threads each."
    table = Table(f"Prefill · {name} · bf16", columns, note=note)
    kinds: dict[str, int | None] = {"exact": None, "6-bit": 6}
    turn, threads = {"tokens": given.tokens, "scored": scored}, max(1, given.threads // len(kinds))

    def read(bits: int | None) -> dict[str, Any]:
        return _ask("Prefill", threads, turn, shape=name, weights=weights, bits=bits)

    with ThreadPoolExecutor(len(kinds)) as both:
        found = dict(zip(kinds, both.map(read, kinds.values()), strict=True))
    for kind, row in found.items():
        above, speed = row["peak"] - row["cache"], given.tokens / row["seconds"]
        table.rows.append([kind, row["cache"] / 1e6, row["peak"] / 1e6, above / 1e6, speed, row["loss"]])
        bound = spread([above / ROOM])
        result.ratios.append(
            Ratio(f"prefill · {name} · {kind}: peak above weights and cache ÷ 512 MB", bound, "less", 1.0)
        )
    worse = math.exp(found["6-bit"]["loss"] - found["exact"]["loss"]) - 1
    result.ratios.append(Ratio(f"prefill · {name}: perplexity of 6-bit ÷ exact − 1", spread([worse]), "less", WORSE))
    result.tables.append(table)
    result.raw["prefill"] = found
    print(found, flush=True)


def _decoding(result: Result, name: str, given: Any) -> None:
    turn = {"tokens": given.tokens, "steps": given.rounds + 1}
    found = result.raw["decode"] = _ask("Decode", given.threads, turn, shape=name)
    ours, theirs = (spread([1 / s for s in found[who][1:]]) for who in ("ours", "theirs"))  # the first does not count
    table = Table(f"Decoding · {name} · fp32 · {given.tokens:,} tokens", ("contender", "tokens/s", "q1", "q3"))
    table.rows += [["ours", ours.median, ours.q1, ours.q3], ["transformers", theirs.median, theirs.q1, theirs.q3]]
    result.tables.append(table)
    each = [b / a for a, b in zip(found["ours"][1:], found["theirs"][1:], strict=True)]
    result.ratios += [
        Ratio(f"decode · {name}: ours ÷ transformers DeepSeek-V3", spread(each), "more", FASTER),
        Ratio(f"decode · {name}: difference of logits", spread([found["difference"]]), "less", EQUAL),
    ]
    print(found, flush=True)


if __name__ == "__main__":
    main()
