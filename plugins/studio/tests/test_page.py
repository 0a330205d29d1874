"""The page in a real browser: all that can be clicked, by mouse and keyboard, refusals, speed, runs, another origin."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import itertools
import os
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sweep_folder
from warm import Warm

from blockwright.blocks.compose import compose
from blockwright.lab.models import load
from blockwright.plugins.hub.family import difference
from blockwright.plugins.studio.choice import Choice, base
from blockwright.registry import ConfigError, names

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("studio_page")]
AXE = Path(__file__).parent / "axe" / "axe-core-4.14.1.min.js.gz"
AXE_SHA256 = "cda5e4385d9437c1fd009f2ff76f7e4049af354d2d6522da2a905c2a69ede4ec"
SECONDS = 120_000  # milliseconds that a test waits for the page, on a machine that does other work


Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Open]:
    """Opens the page at a place; it may complain of nothing."""
    complaints: list[str] = []
    contexts = []

    def open_it(place: str = "#/model/tiny", width: int = 1300, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(address + place)
        page.wait_for_selector("main")
        if "model" in place:
            settled(page)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


def settled(page: Any) -> None:
    """Wait until the page shows the answer to what its address says."""
    place = page.evaluate("location.hash")  # which changes before the page does
    page.wait_for_selector(f'main.model[aria-busy=false][data-shown="{place}"]')


def choose(page: Any, kind: str, name: str) -> None:
    """Choose a block of the model by mouse, in the form."""
    button = page.locator(f'[data-block="{kind}"]')
    if button.count():
        button.click()
    else:
        page.click("button.add")
        page.click(f'dialog [data-value="{kind}"]')
    page.click(f'dialog [data-value="{name}"]')
    page.wait_for_selector("dialog", state="detached")
    settled(page)


def trouble(page: Any) -> str:
    return page.inner_text("[role=status]") if page.locator(".trouble").count() else ""


def on_the_command_line(choice: Choice) -> str:
    """The refusal of a choice; empty for a model that can be built."""
    try:
        load(choice.preset, choice.overrides[1:])
    except ConfigError as error:
        return error.render()
    return ""


def test_an_alternative_gives_a_picture_or_the_refusal_of_the_command_line(visit: Open) -> None:
    page = visit()
    for kind, name in [(k, n) for k in ("attention", "ffn", "norm", "residual") for n in names(k)[::4]]:
        page.evaluate("location.hash = '#/model/tiny'")
        page.wait_for_selector('main[data-shown="#/model/tiny"]')
        before = page.inner_html(".picture")
        choose(page, kind, name)
        expected = on_the_command_line(Choice("tiny", {kind: name}))
        assert trouble(page).split() == expected.split(), f"{kind} {name}"
        unchanged = page.inner_html(".picture") == before
        if expected:
            assert unchanged, f"{kind} {name}: the last picture stays"
        elif kind in base("tiny") and name not in str(base("tiny")[kind]):
            assert not unchanged, f"{kind} {name}"


def test_a_box_of_the_picture_is_exchanged_by_a_click(visit: Open) -> None:
    page = visit("#/model/deepseek_v2")
    page.click('.picture g[data-path="layers.1.attention"]', position={"x": 20, "y": 8})
    page.click('dialog [data-value="gqa"]')
    settled(page)
    assert page.inner_text('[data-block="attention"]') == "gqa"
    assert page.get_attribute('[data-cost="cache_bytes"]', "data-value") == "307200"
    page.go_back()
    settled(page)
    assert page.inner_text('[data-block="attention"]') == "mla", "back undoes"


def test_a_refusal_is_shown_at_its_field_and_the_last_picture_stays(visit: Open) -> None:
    page = visit("#/model/deepseek_v2")
    before = page.inner_html(".picture")
    field = page.locator("#field-attention-n_heads")
    field.fill("abc")
    field.press("Enter")
    page.wait_for_selector("#field-attention-n_heads[aria-invalid=true]")
    refused = on_the_command_line(Choice("deepseek_v2", {"attention.n_heads": "abc"}))
    assert "must be an integer" in refused and trouble(page).split() == refused.split()
    assert "must be an integer" in page.inner_text("#field-attention-n_heads-refusal")
    assert page.inner_html(".picture") == before
    page.click('button[aria-label="Undo the change of n_heads"]')
    page.wait_for_selector('main[data-shown="#/model/deepseek_v2"]')
    assert field.input_value() == "128" and not trouble(page)


def copied(page: Any, what: str) -> str:
    page.click(f"text=Copy as {what}")
    text = page.inner_text("dialog pre")
    page.click("dialog button")
    page.wait_for_selector("dialog", state="detached")
    return text


def test_what_is_copied_is_the_model_that_is_shown(visit: Open) -> None:
    page = visit("#/model/tiny", permissions=["clipboard-read", "clipboard-write"])
    choose(page, "attention", "gqa")
    page.fill("#field-ffn-n_experts", "8")
    page.press("#field-ffn-n_experts", "Enter")
    page.wait_for_selector("#field-ffn-n_experts >> nth=0")
    page.wait_for_selector('main[data-shown*="n_experts=8"]')
    text = copied(page, "YAML")
    assert page.evaluate("navigator.clipboard.readText()").strip() == text.strip()
    model = compose(text, device="meta")
    assert model.config["attention"] == {"name": "gqa"} and model.config["ffn"]["n_experts"] == 8
    command = copied(page, "command")
    assert command == "blockwright train model=tiny model/attention=gqa model.ffn.n_experts=8"
    trained = load("tiny", command.split()[3:])
    assert difference(model, trained) is None
    assert difference(model, compose(base("tiny"), device="meta")) is not None


CLICK_TO_PICTURE = """name => new Promise(done => {
    let start
    new MutationObserver((_, observer) => {
        observer.disconnect()
        requestAnimationFrame(() => done(performance.now() - start))
    }).observe(document.querySelector(".picture"), { childList: true })
    const button = document.querySelector(`dialog [data-value="${name}"]`)
    start = performance.now()
    button.click()
})"""


def cpu_seconds(process: int) -> float:
    """Of a process and those that it has started."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    inner = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, map(int, inner)))


def test_a_click_gives_a_picture_within_a_tenth_of_a_second(visit: Open, server: subprocess.Popen[str]) -> None:
    page = visit("#/model/deepseek_v2")
    took, clicks = [], 24
    for name, _ in zip(itertools.cycle(["gqa", "mha", "mqa", "mla"]), range(clicks + 4), strict=False):
        if len(took) == 4:
            before = cpu_seconds(server.pid)
        page.click('[data-block="attention"]')
        took.append(page.evaluate(CLICK_TO_PICTURE, name))
        settled(page)
    cpu = 1000 * (cpu_seconds(server.pid) - before) / clicks
    took, load = sorted(took[4:]), os.getloadavg()[0]
    middle = statistics.median(took)
    assert cpu < 100
    assert middle < 100 or load > 1, took  # work of others takes the processor meanwhile


def test_the_keyboard_alone_exchanges_a_block_and_a_number(visit: Open) -> None:
    page = visit("#/model/tiny")

    def tab_to(selector: str) -> None:
        for _ in range(300):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"Tab never reaches {selector}")

    tab_to('.picture g[data-path^="layers."][data-path$=".attention"] > rect')
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.type("grouped-query")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector('main[data-shown="#/model/tiny?attention=gqa"][aria-busy=false]')
    focused = page.evaluate("document.activeElement.parentElement.dataset.path")
    assert focused.endswith(".attention"), "the focus stays at the box"
    page.keyboard.press("Space")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    tab = "#field-n_layers"
    page.focus("#preset")
    tab_to(tab)
    page.keyboard.press("Control+a")
    page.keyboard.type("6\n")
    page.wait_for_selector('main[data-shown*="n_layers=6"][aria-busy=false]')
    assert not trouble(page)


def violations(page: Any) -> list[str]:
    data = AXE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == AXE_SHA256
    page.evaluate(gzip.decompress(data).decode())
    found = page.evaluate("axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'] })")
    return [
        f"{v['id']}: {n['html'][:200]} {n['failureSummary'][:300]}" for v in found["violations"] for n in v["nodes"]
    ]


def test_a_name_that_is_typed_is_chosen_before_names_and_descriptions_that_hold_it(visit: Open) -> None:
    page = visit("#/model/deepseek_v2")
    for place, name in (('[aria-label^="preset:"]', "tiny"), ('[data-block="attention"]', "gqa")):
        page.click(place)
        page.wait_for_selector("dialog input:focus")
        page.keyboard.type(name)
        assert page.locator("dialog [data-value]").count() > 1
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog", state="detached")
        settled(page)
    assert page.evaluate("location.hash") == "#/model/tiny?attention=gqa"


def test_a_question_without_an_answer_is_asked_again_by_a_button(browser: Any, address: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.route("**/draw", lambda route: route.fulfill(status=504, json={"error": "No answer: it took longer"}))
    page.goto(f"{address}#/model/tiny")
    for _ in range(2):  # it may fail again
        page.click("text=Try again")
        page.wait_for_selector('.trouble:has-text("took longer")')
    assert violations(page) == []
    page.unroute("**/draw")
    page.click("text=Try again")
    settled(page)
    assert page.locator(".picture svg").count() and not trouble(page)
    assert not page.locator("text=Try again").count()
    context.close()


def test_the_page_is_accessible(visit: Open, folder: Path) -> None:
    finished(folder / "logs" / "train" / "runs" / "finished")
    page = visit("#/model/deepseek_v2", color_scheme="dark")
    assert violations(page) == []
    page.click('[data-block="attention"]')
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.fill("#field-attention-n_heads", "0")
    page.press("#field-attention-n_heads", "Enter")
    page.wait_for_selector(".refusal")
    assert violations(page) == []
    for place, shown in (("#/runs", "table"), ("#/run/train/runs/finished", ".curves svg")):
        page.evaluate("place => { location.hash = place }", place)
        page.wait_for_selector(shown)
        assert violations(page) == []


def test_nothing_is_wider_than_the_page(visit: Open, folder: Path) -> None:
    finished(folder / "logs" / "train" / "runs" / "finished")
    page = visit("#/model/deepseek_v2?attention.n_heads=7", width=360)
    places = {"#/model/deepseek_v2": ".picture svg", "#/runs": "table", "#/run/train/runs/finished": "svg"}
    for place, shown in places.items():
        page.evaluate("place => { location.hash = place }", place)
        page.wait_for_selector(shown)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.evaluate("location.hash = '#/model/deepseek_v2'")
    page.wait_for_selector(".costs")
    page.locator(".choices .block").last.scroll_into_view_if_needed()
    top = page.evaluate("document.querySelector('.costs').getBoundingClientRect().top")
    assert 0 <= top < 900, "the costs are always visible"


def finished(run: Path) -> None:
    if not run.exists():
        curve = sweep_folder.falling(1.5, random.Random(1))
        sweep_folder.write_job(run.parent, 0, ["seed=1"], sweep_folder.completed(1.5), curve).rename(run)


def test_a_training_shows_its_curve_while_it_trains(
    visit: Open, folder: Path, small: list[str], warm: Warm, environment: dict[str, str]
) -> None:
    words = [*small, "trainer.max_steps=100000", "trainer.val_check_interval=5", f"paths.log_dir={folder / 'logs'}"]
    words += ["hydra.run.dir=${paths.log_dir}/train/runs/live"]
    page = visit("#/runs")
    run = warm.start("-m", "blockwright", "train", *words, cwd=folder, env=environment, merge=True)
    try:
        page.click('a:text("train/runs/live")')
        page.wait_for_selector(".state-running")
        seen: set[str] = set()
        until = time.monotonic() + SECONDS / 1000
        while len(seen) < 2 and time.monotonic() < until:
            page.wait_for_selector(".curves svg")
            seen.add(page.inner_html(".curves"))
            page.wait_for_timeout(200)
        assert len(seen) == 2, "the curve grows without a reload"
    finally:
        run.send_signal(15)
        run.communicate()
    page.wait_for_selector(".state:not(.state-running)")


ATTACK = """<body><script>
const studio = %r, done = []
const attempt = (what, options) => fetch(studio + what, { credentials: "include", ...options })
  .then(r => r.text().then(t => done.push([what, r.type, t.length])), e => done.push([what, "blocked", 0]))
Promise.all([
  attempt("/forms"), attempt("/runs"), attempt("/"),
  attempt("/runs", { mode: "no-cors" }), attempt("/forms", { mode: "no-cors" }),
  attempt("/draw", { method: "POST", mode: "no-cors", body: '{"preset": "tiny", "changes": {}}' }),
  attempt("/draw", { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" }),
]).then(() => { document.title = JSON.stringify(done) })
</script><iframe src="%s/"></iframe><script src="%s/page/main.js" type="module"></script></body>"""


@contextmanager
def serving(text: str) -> Iterator[int]:
    """Another server on this machine, whose page has a text."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_a_page_of_another_server_reads_nothing_even_with_the_users_cookie(browser: Any, address: str) -> None:
    studio = address.partition("/?")[0]
    with serving(ATTACK % (studio, studio, studio)) as port:
        context = browser.new_context()
        own = context.new_page()
        own.goto(address)
        own.wait_for_selector("header")
        assert context.cookies()
        other = context.new_page()
        statuses: dict[str, set[int]] = {}
        other.on("response", lambda r: statuses.setdefault(r.url.removeprefix(studio), set()).add(r.status))
        other.goto(f"http://127.0.0.1:{port}/")
        other.wait_for_selector("html:has(title)", state="attached")
        while not other.title():
            other.wait_for_timeout(100)
        found = other.evaluate("JSON.parse(document.title)")
        assert len(found) == 7 and all(kind in ("blocked", "opaque") and not length for _, kind, length in found), found
        for path in ("/forms", "/runs", "/draw", "/page/main.js"):
            assert statuses.get(path, {403}) <= {403}, statuses
        assert not other.frames[1].query_selector("header") if len(other.frames) > 1 else True
        context.close()
