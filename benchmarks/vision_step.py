"""A training step of a small DeepSeek-VL2, ours and assembled from classes of transformers, on the same pictures.

``python -m benchmarks.vision_step``. A race as in ``train_step``; each turn also times seeing (the tower and what is
around it) and reading (the language model on text alone) apart, both without the optimizer. The two are compared on
equal weights first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import machine, record
from benchmarks.models.sighted import SIGHTS, Assembled, Ours, Seen, Sight, drawn, equal, sighted
from benchmarks.peers import BOUNDS, UnequalError
from benchmarks.race import Entry, Race, paired, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.stopwatch import peaks, synchronise
from benchmarks.worker import peak_memory, reset_peak

if TYPE_CHECKING:
    from torch import Tensor

MAKERS: dict[str, type[Ours] | type[Assembled]] = {"ours": Ours, "transformers": Assembled}
NAMES = {"ours": "ours", "transformers": "transformers SigLIP + DeepSeek-V2"}
PROMISED = {"fp32": 1.1, "bf16": 1.2}  # ours ÷ theirs, whole steps, each at its faster settings, at `pages` and `small`
PROMISING = ("pages", "small")
TURN_SECONDS = 1.0  # minimum measured time of each part of a turn
PARTS = ("whole", "seeing", "reading")
COLUMNS = (
    *("contender", "settings", "tokens/s", "q1", "q3", "TFLOP/s", "of peak", "ours ÷ it"),
    *("step, ms", "seeing, ms", "reading, ms", "peak memory, GB", "first loss", "parameters", "remarks"),
)


class VisionStep:
    """Job of a contender: train, and time the parts of a step."""

    def __init__(self, sight: str, maker: str, tuned: bool, dtype: str, device: str) -> None:
        import torch

        from benchmarks.models.base import DTYPES

        torch.manual_seed(0)
        self.sight, self.device, self.tuned = SIGHTS[sight], device, tuned
        self.model: Any = MAKERS[maker](self.sight).to(device=device, dtype=DTYPES[dtype]).train()
        self.weights = list(self.model.parameters())
        self.optimizer: Any = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)
        self.images = _images(self.sight)
        self.draws = torch.Generator().manual_seed(1)
        self.losses: list[float] = []
        self.note, self.settled = "", False

    def about(self) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in self.weights)}

    def turn(self, **ignored: Any) -> dict[str, Any]:
        """The seconds of steps and of their parts, and the peak memory of whole steps."""
        if not self.settled:
            self._choose()
        for _ in range(2 if self.tuned or not self.settled else 0):  # memory taken away while waiting
            self._whole()
        if not self.settled:
            self.settled = True
            reset_peak(self.device)
        self.losses.clear()
        seconds = {"whole": _repeat(self._whole)}
        losses, peak = list(self.losses), peak_memory(self.device)
        seconds |= {"seeing": _repeat(self._see), "reading": _repeat(self._read)}
        return {"seconds": seconds, "losses": losses, "peak_bytes": peak, "note": self.note}

    def _seen(self) -> Seen:
        return drawn(self.sight, self.images, self.draws, self.device)

    def _whole(self) -> float:
        seen = self._seen()
        return self._timed(lambda: self.model.loss(seen.tokens, seen.targets, seen.pictures), True)

    def _read(self) -> float:
        seen = self._seen()
        return self._timed(lambda: self.model.loss(seen.tokens, seen.targets, None), False)

    def _see(self) -> float:
        pictures = self._seen().pictures
        return self._timed(lambda: self.model.see(pictures).square().mean(), False)

    def _timed(self, loss: Callable[[], Tensor], learns: bool) -> float:
        """Seconds of a forward and backward pass, and of the optimizer if it ``learns``."""
        synchronise(self.device)
        start = time.perf_counter()
        found = loss()
        found.backward()
        if learns and self.optimizer is not None:
            self.optimizer.step()
        for weight in self.weights:
            weight.grad = None
        synchronise(self.device)
        seconds = time.perf_counter() - start
        if learns:
            self.losses.append(float(found.detach()))
        return seconds

    def _choose(self) -> None:
        """Try each of the library's settings without the optimizer, and keep the fastest."""
        optimizer, self.optimizer, seconds = self.optimizer, None, {}
        for choice in self.model.choices if self.tuned else ():
            self.model.choose(choice)
            self._whole()
            seconds[choice] = min(self._whole() for _ in range(2))
        if seconds:
            best = min(seconds, key=seconds.__getitem__)
            self.model.choose(best)
            self.note = f"experts: {best}"
        self.optimizer = optimizer
        self.draws.manual_seed(1)


def _repeat(step: Callable[[], float]) -> list[float]:
    seconds: list[float] = []
    while sum(seconds) < TURN_SECONDS:
        seconds.append(step())
    return seconds


def _images(sight: Sight) -> Any:
    from blockwright.blocks.compose import compose

    return compose(sighted(sight), device="meta").images


class Equality:
    """Job: compare ours with the assembled model on equal weights and pictures."""

    def __init__(self, sight: str, device: str) -> None:
        self.sight, self.device = SIGHTS[sight], device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, dtype: str) -> dict[str, Any]:
        """Differences of embeddings of pictures, and of the loss."""
        import torch

        from benchmarks.models.base import DTYPES

        torch.manual_seed(0)
        ours = Ours(self.sight).eval()
        theirs = equal(self.sight, ours.decoder).to(self.device, DTYPES[dtype])
        ours.to(self.device, DTYPES[dtype])
        seen = drawn(self.sight, _images(self.sight), torch.Generator().manual_seed(1), self.device)
        with torch.inference_mode():
            a, b = (model.see(seen.pictures).float() for model in (ours, theirs))
            losses = [float(model.loss(seen.tokens, seen.targets, seen.pictures)) for model in (ours, theirs)]
        worst = (a - b).abs().max() / b.abs().max() if dtype == "fp32" else (a - b).norm() / b.norm()
        return {"embeddings": float(worst), "loss": abs(losses[0] - losses[1])}


def equality(sight: str, dtypes: Sequence[str], device: str, threads: int) -> Table:
    """Compare ours with the assembled model.

    Raises:
        UnequalError: they differ by more than ``peers.BOUNDS``
    """
    columns = ("dtype", "difference of embeddings", "bound", "difference of loss", "bound of loss")
    table = Table(f"Equal outputs of ours and transformers, {sight}", columns)
    with Race([Entry("ours", "benchmarks.vision_step:Equality", {"sight": sight})], device, threads) as race:
        for dtype in dtypes:
            found, bounds = race.ask(race.entries[0], {"dtype": dtype}), BOUNDS[dtype]
            if found is None or found["embeddings"] > bounds[0] or found["loss"] > bounds[1]:
                raise UnequalError(f"{sight}, {dtype}: {race.entries[0].failed or found}")
            table.rows.append([dtype, found["embeddings"], bounds[0], found["loss"], bounds[1]])
    return table


def flops_per_step(sight: Sight) -> dict[str, float]:
    """FLOPs of a step: three times the forward passes, with half of the products of causal attention."""
    import torch

    from blockwright.blocks.compose import compose
    from blockwright.blocks.cost import forward_flops_per_token, input_flops

    decoder, T = compose(sighted(sight), device="meta"), sight.shape.sequence
    images: Any = decoder.inputs["images"]
    seeing = 3.0 * input_flops(images, drawn(sight, images, torch.Generator(), "meta").pictures)
    per_token = 1.5 * (forward_flops_per_token(decoder, T) + forward_flops_per_token(decoder, 1))
    return {"seeing": seeing, "reading": per_token * sight.shape.tokens}


def tabulate(name: str, dtype: str, race: Race) -> tuple[Table, list[Ratio]]:
    """The table and the ratios of one race."""
    sight, title = SIGHTS[name], f"{name} · {dtype}"
    flops = flops_per_step(sight)
    total = sum(flops.values())
    contenders = [entry for entry in race.entries if "maker" in entry.arguments]
    peak = {r: t["flops"] for r, t in race.entries[-1 if dtype == "bf16" else -2].turns.items()}
    rows = {e.label: {part: _seconds(e, part) for part in PARTS} for e in contenders}
    table, ratios = Table(title, COLUMNS, plotted="tokens/s"), []
    for entry in contenders:
        maker, tuned = entry.arguments["maker"], entry.tuned
        settings = "best settings" if tuned else "as it comes"
        if not entry.turns:
            table.rows.append([NAMES[maker], settings, *[None] * 12, f"failed: {entry.failed}"])
            continue
        seconds = rows[entry.label]
        speed = spread([sight.shape.tokens / s for s in seconds["whole"].values()])
        share = paired({r: total / s for r, s in seconds["whole"].items()}, peak)
        mine = next(e for e in contenders if e.arguments["maker"] == "ours" and e.tuned == tuned)
        faster = {part: paired(seconds[part], rows[mine.label][part]) for part in PARTS}
        times = [1e3 * spread(list(seconds[part].values())).median for part in PARTS]
        memory = max(turn["peak_bytes"] for turn in entry.turns.values()) / 1e9
        first = entry.turns[min(entry.turns)]
        table.rows.append(
            [
                *(NAMES[maker], settings, speed.median, speed.q1, speed.q3),
                total / times[0] / 1e9,
                None if share is None else share.median,
                None if maker == "ours" or faster["whole"] is None else faster["whole"].median,
                *(*times, memory, first["losses"][0], entry.about["parameters"], first["note"]),
            ]
        )
        if maker != "ours":
            what = f"ours ÷ {entry.label}"
            ratios += [
                Ratio(f"{title}: {'' if part == 'whole' else f'{part}, '}{what}", found)
                for part, found in faster.items()
                if found is not None
            ]
            ratios += _memory(f"{title}: memory of {what}", mine, entry, name in PROMISING)
    ratios += _at_their_fastest(title, contenders, PROMISED[dtype] if name in PROMISING else None)
    table.note = (
        f"A step is forward, backward and AdamW on {sight.shape.batch} × {sight.shape.sequence} tokens with "
        f"{len(sight.grids) * sight.shape.batch} pictures, {total / 1e9:.3g} GFLOP, of which "
        f"{flops['seeing'] / total:.0%} see. Seeing and reading are timed apart, without the optimizer. Ratios are "
        "medians of those within a round."
    )
    return table, ratios


def _memory(what: str, mine: Entry, entry: Entry, promised: bool) -> list[Ratio]:
    used = paired(*({r: t["peak_bytes"] for r, t in e.turns.items()} for e in (mine, entry)))
    return [] if used is None else [Ratio(what, used, "less", 1.0 if promised else None)]


def _at_their_fastest(title: str, contenders: Sequence[Entry], promised: float | None) -> list[Ratio]:
    """Ours ÷ theirs, each at the settings that are faster for it: settings that help one may hinder the other."""
    fastest = {}
    for maker in MAKERS:
        ran = [e for e in contenders if e.arguments["maker"] == maker and e.turns]
        if not ran:
            return []
        fastest[maker] = min(ran, key=lambda e: spread(list(_seconds(e, "whole").values())).median)
    mine, theirs = fastest["ours"], fastest["transformers"]
    found = paired(_seconds(theirs, "whole"), _seconds(mine, "whole"))
    return (
        []
        if found is None
        else [Ratio(f"{title}: {mine.label} ÷ {theirs.label}, the faster of each", found, bound=promised)]
    )


def _seconds(entry: Entry, part: str) -> dict[int, float]:
    return {index: spread(turn["seconds"][part]).median for index, turn in entry.turns.items()}


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the requested races; a result per size, saved after each race."""
    parser = record.parser("vision_step", __doc__, rounds=9, minutes=12)
    record.add_names(parser, "sizes", "pages,small", list(SIGHTS))
    record.add_names(parser, "dtypes", "fp32,bf16", ("fp32", "bf16"))
    given = record.read(parser, arguments)
    sizes, dtypes = (["smoke"], given.dtypes[:1]) if given.quick else (given.sizes, given.dtypes)
    seconds, results = given.minutes * 60 / (len(sizes) * len(dtypes)), []
    for name in sizes:
        result = Result(f"vision_step_{name}", machine.about(given.device, given.threads))
        result.tables.append(equality(name, dtypes, given.device, given.threads))
        for dtype in dtypes:
            title = f"{name} · {dtype}"
            entries = [_entry(name, maker, tuned, dtype) for maker in MAKERS for tuned in (True, False)]
            entries = [e for e in entries if record.wanted(f"{title} · {e.label}", given.only)]
            print(title, flush=True)
            with Race([*entries, *peaks(dtype, given.device)], given.device, given.threads) as race:
                race.run(given.rounds, seconds, least=1 if given.quick else 2)
            table, ratios = tabulate(name, dtype, race)
            result.tables.append(table)
            result.ratios += ratios
            result.raw[title] = {
                e.label: {"about": e.about, "failed": e.failed, "turns": e.turns} for e in race.entries
            }
            print(result.save(given.out), flush=True)
        results.append(result)
    return results


def _entry(name: str, maker: str, tuned: bool, dtype: str) -> Entry:
    arguments: Mapping[str, Any] = {"sight": name, "maker": maker, "tuned": tuned, "dtype": dtype}
    label = f"{NAMES[maker]}, {'best settings' if tuned else 'as it comes'}"
    return Entry(label, "benchmarks.vision_step:VisionStep", arguments, tuned)


if __name__ == "__main__":
    main()
